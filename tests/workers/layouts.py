"""Calibrate, train two steps and save a checkpoint under several layouts, in float64, for several models and formats.

Usage: start.py layouts.py FOLDER, alone or under torchrun with two processes. FOLDER/cases.json is
{case: {"model": Hugging Face directory, "quantize": {key: value}, "layouts": names}}. Leaves FOLDER/<case>.<layout>/
with checkpoints/, quantize.json and losses.json: the losses of two steps and of a third batch in the trained model and,
in a pipeline, in one that was loaded from the checkpoint.
"""

import json
from pathlib import Path

import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from halfbyte.training import checkpoint, environment, losses, model, quantize, retention
from halfbyte.training.config import Model, Parallel, Quantize, Recipe, Train
from halfbyte.training.data import MicroBatch
from halfbyte.training.fast_path import weights_once
from halfbyte.training.files import write_json
from halfbyte.training.module import wrap
from halfbyte.training.optimizer import MegatronOptimizer
from halfbyte.training.runtime import Runtime, close_runtime, on_first_rank, open_runtime
from halfbyte.training.schedule import collect, token_batch, train_batch
from halfbyte.training.shape import read_shape

LAYOUTS = {
    1: {"one": Parallel()},
    2: {"tp2": Parallel(tensor=2), "tp2_sp": Parallel(tensor=2, sequence=True), "pp2": Parallel(pipeline=2)},
}
STEPS = 2


def batches(vocab: int) -> list[list[MicroBatch]]:
    """The micro-batches of every step, the same in every process: [2, 48] tokens each, two a step."""
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(0, vocab, (2, 49), generator=generator) for _ in range(2 * (STEPS + 1))]
    made = [MicroBatch(row[:, :-1], row[:, 1:], torch.ones(2, 48), None) for row in rows]
    return [made[2 * i : 2 * i + 2] for i in range(STEPS + 1)]


def train(recipe: Recipe, runtime: Runtime, out: Path) -> None:
    """One case under one layout."""
    folder = Path(recipe.model.path)
    shape = read_shape(folder / "config.json")
    steps = batches(shape.vocab)
    gpt = model.build(shape, recipe, runtime)
    model.import_hf(gpt, folder, shape, runtime)
    windows = [token_batch(batch.tokens) for batch in steps[0]]
    report = quantize.quantize(gpt, recipe, lambda stage: collect(stage, windows, None) and None)
    on_first_rank(runtime, lambda: write_json(out / "quantize.json", report))
    ddp = wrap(gpt, recipe)
    optimizer = MegatronOptimizer(ddp, recipe, runtime.dtype)
    found = []
    for number, step in enumerate(steps[:STEPS]):
        optimizer.zero_grad()
        with weights_once(gpt):
            found.append(train_batch(ddp, step, losses.cross_entropy, needs_logits=False).mean)
        optimizer.set_learning_rate(number)
        optimizer.step()
    path = out / "checkpoints" / retention.folder_name(STEPS)
    checkpoint.save(checkpoint.Trainable(gpt), {}, path)
    found.append(_loss(gpt, recipe, steps[STEPS]))
    if recipe.parallel.pipeline > 1:
        found.append(_loss(_restarted(recipe, runtime, out, path), recipe, steps[STEPS]))
    on_first_rank(runtime, lambda: write_json(out / "losses.json", found))


def _restarted(recipe: Recipe, runtime: Runtime, out: Path, path: Path) -> torch.nn.Module:
    """The trained model as a second start of the run makes it."""
    folder = Path(recipe.model.path)
    shape = read_shape(folder / "config.json")
    gpt = model.build(shape, recipe, runtime)
    model.import_hf(gpt, folder, shape, runtime)
    quantize.restore(gpt, recipe, out / "quantize.json")
    checkpoint.load(checkpoint.Trainable(gpt), path)
    quantize.refresh_scales(gpt, recipe.quantize)
    return gpt


def _loss(gpt: torch.nn.Module, recipe: Recipe, step: list[MicroBatch]) -> float:
    ddp = wrap(gpt, recipe)
    with weights_once(gpt):
        return train_batch(ddp, step, losses.cross_entropy, needs_logits=False).mean


def main(folder: Path) -> None:
    """Every case under every layout of this world size."""
    cases = json.loads((folder / "cases.json").read_text())
    runtime = None
    for layout, parallel in LAYOUTS[environment.coordinates()[1]].items():
        for name, case in cases.items():
            if layout not in case["layouts"]:
                continue
            settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Quantize), case["quantize"]))
            recipe = Recipe(
                model=Model(path=case["model"]),
                quantize=settings,  # type: ignore[arg-type]
                parallel=parallel,
                train=Train(dtype="float64", steps=STEPS, learning_rate=1e-3),  # type: ignore[arg-type]
            )
            if runtime is None:
                runtime = open_runtime(recipe)
            else:  # other groups of the same processes
                parallel_state.destroy_model_parallel()
                parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
            train(recipe, runtime, folder / f"{name}.{layout}")
    close_runtime()
