"""Logits of our model against stored reference logits, and the distillation loss over vocabulary shards.

Usage: parity.py FOLDER OUT.json, alone or under torchrun with two processes. FOLDER/<model>/ is a Hugging Face
directory, FOLDER/<model>.pt its reference logits. Judges nothing: rank 0 writes what was measured.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region as gather

from halfbyte.training import environment, losses, model, topk
from halfbyte.training.config import Parallel, Recipe, Train
from halfbyte.training.config_distill import Divergence
from halfbyte.training.data import MicroBatch
from halfbyte.training.files import write_json
from halfbyte.training.runtime import Runtime, close_runtime, open_runtime
from halfbyte.training.schedule import collect, token_batch
from halfbyte.training.shape import read_shape

LAYOUTS = {
    1: {"tp1": Parallel()},
    2: {
        "tp2_sp": Parallel(tensor=2, sequence=True),
        "pp2": Parallel(pipeline=2),
        "pp2_uneven": Parallel(pipeline=2, last_stage_layers=1),
    },
}


def logits(folder: Path, recipe: Recipe, runtime: Runtime, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Complete logits [B, S, V] per micro-batch on the last stage, nothing elsewhere."""
    shape = read_shape(folder / "config.json")
    gpt = model.build(shape, recipe, runtime)
    model.import_hf(gpt, folder, shape, runtime)
    return collect(gpt, batches, lambda out, index: gather(out))


def parity(folder: Path, recipe: Recipe, runtime: Runtime) -> dict[str, float]:
    """Largest distance to the reference over two micro-batches of one model."""
    reference = torch.load(folder.with_suffix(".pt"))
    tokens, expected = reference["tokens"], reference["logits"]
    out = logits(folder, recipe, runtime, [token_batch(part) for part in tokens])
    found = {"difference": max(float((a - b).abs().max()) for a, b in zip(out, expected, strict=True))} if out else {}
    # Two documents in one window, kept apart: the second one's logits are those of the second one alone.
    border = tokens.shape[-1] // 2
    segments = (torch.arange(tokens.shape[-1]) >= border).long().expand_as(tokens[0])
    both = logits(folder, recipe, runtime, [dataclasses.replace(token_batch(tokens[0]), segments=segments)])
    if both:
        found["isolated"] = float((both[0][:, border:] - reference["second_half"]).abs().max())
    return found


def models(folder: Path, parallel: Parallel) -> list[Path]:
    """The stored references whose layers this layout can split."""
    even = parallel.last_stage_layers is None
    files = sorted(folder.glob("*.pt"))
    return [
        file
        for file in files
        if not even or read_shape(file.with_suffix("") / "config.json").layers % parallel.pipeline == 0
    ]


def distillation() -> dict[str, float]:
    """Distance of the loss and its gradient over vocabulary shards from plain torch in float64."""
    group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    torch.manual_seed(3)
    student, teacher, weight = 3 * torch.randn(2, 5, 96), 3 * torch.randn(2, 5, 96), torch.rand(2, 5)
    found = {}
    for temperature in (1.0, 2.0):
        whole = student.double().requires_grad_()
        log_s, log_t = ((x.double() / temperature).log_softmax(-1) for x in (whole, teacher))
        expected = temperature**2 * torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        (expected * weight).sum().backward()
        size = student.shape[-1] // dist.get_world_size(group)
        mine = slice(rank * size, (rank + 1) * size)
        shard = student[..., mine].clone().requires_grad_()
        loss = losses.distillation(shard, teacher[..., mine], group, temperature)
        (loss * weight).sum().backward()
        found[f"value_{temperature:g}"] = float(((loss - expected) / expected).abs().max())
        found[f"gradient_{temperature:g}"] = float((shard.grad - whole.grad[..., mine]).abs().max())
    return found


def divergences() -> dict[str, float]:
    """Every divergence, full and top-k, and the label cross-entropy, in float64: vocabulary shards against the whole.

    A process alone computes both sides with the same functions; tests/test_divergences.py holds those against torch.
    """
    group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    generator = torch.Generator().manual_seed(4)
    student, teacher = (3 * torch.randn(2, 5, 96, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(96, (2, 5), generator=generator)
    half = slice(rank * 48, (rank + 1) * 48)
    found = {}
    for loss in Divergence:
        for k in (None, 1, 7, 60, 96):

            def value(x: torch.Tensor, t: torch.Tensor, shards, loss=loss, k=k) -> torch.Tensor:
                if k is None:
                    return losses.distillation(x, t, shards, 1.5, loss, 0.3)
                return topk.top_k_distillation(x, topk.top_k(t, k, 1.5, shards), shards, 1.5, loss, 0.3)

            found[f"{loss.value}_{k}"] = distance(value, student, teacher, half, group)
    found["label_cross_entropy"] = distance(
        lambda x, t, shards: topk.label_cross_entropy(x, labels, shards), student, teacher, half, group
    )
    return found


def distance(value, student: torch.Tensor, teacher: torch.Tensor, mine: slice, group) -> float:
    """Largest difference of values and gradients between this rank's shard under `group` and the whole without one."""
    whole, shard = student.clone().requires_grad_(), student[..., mine].clone().requires_grad_()
    expected, loss = value(whole, teacher, None), value(shard, teacher[..., mine], group)
    expected.sum().backward()
    loss.sum().backward()
    assert whole.grad is not None
    assert shard.grad is not None
    return max(float((loss - expected).abs().max()), float((shard.grad - whole.grad[..., mine]).abs().max()))


def main(folder: Path, out: Path) -> None:
    """Measure every layout of this world size on every model."""
    layouts = LAYOUTS[environment.coordinates()[1]]
    runtime = None
    found: dict[str, dict] = {}
    for layout, parallel in layouts.items():
        recipe = Recipe(parallel=parallel, train=Train(dtype="float32"))
        if runtime is None:
            runtime = open_runtime(recipe)
        else:  # other groups of the same processes
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        mine = {path.stem: parity(path.with_suffix(""), recipe, runtime) for path in models(folder, parallel)}
        if parallel.tensor > 1:
            mine["distillation"] = distillation()
            mine["divergences"] = divergences()
        found[layout] = worst(mine, runtime)
    if runtime.first:
        write_json(out, found)
    close_runtime()


def worst(mine: dict[str, dict[str, float]], runtime: Runtime) -> dict[str, dict[str, float]]:
    """The largest of every rank's measurements."""
    parts: list[dict[str, dict[str, float]]] = [{}] * runtime.world
    dist.all_gather_object(parts, mine)
    keys = {(name, key) for part in parts for name, values in part.items() for key in values}
    found: dict[str, dict[str, float]] = {name: {} for name in mine}
    for name, key in keys:
        found[name][key] = max(part[name][key] for part in parts if key in part[name])
    return found


if __name__ == "__main__":
    environment.set_process_environment()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
