"""Losses of a few training steps under several layouts, one recipe after another, in float64.

Usage: methods.py MODEL OUT.json in two or four ranks. MODEL is a Hugging Face directory. Judges
nothing: rank 0 writes {layout: {variant: [loss of every step]}}. What is trained beside the weights adds a number made
of all of it; "<variant>, resumed" is the same from the first layout's checkpoint after one step on, and "<variant>,
float32" and "<variant>, float32, resumed" are what they say, in FP32 with Megatron's distributed optimizer, whose
checkpoint is saved a second time as Megatron gathers it ("<variant>.<layout>.float32.gathered" beside OUT.json).
"<variant>, stages" and "<variant>, stages again" of a pipeline end with the norm of the last gradient; in the second
every stage is called through the pairs of stage_graphs.py, with functions in the place of CUDA graphs. "<variant>,
turns", "<variant>, turns again" and "<variant>, turns of four" are the same of micro-batches one after the other, two
and four side by side.
"""

import copy
import dataclasses
import hashlib
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import host_lanes
import numpy as np
import torch
from again import Again
from megatron.core import parallel_state

from halfbyte.training import checkpoint, companions, environment, model, optimizer_state, quantize, side_by_side
from halfbyte.training.config import Format, Method, Parallel, Quantize, Recipe, Train
from halfbyte.training.config_distill import Distill, Divergence
from halfbyte.training.config_train import Lora
from halfbyte.training.corpus import PackedDataset
from halfbyte.training.data import calibration_windows, plain_batches, rank_micro_batches
from halfbyte.training.files import write_json
from halfbyte.training.graphs import Replay
from halfbyte.training.module import Progress, Training
from halfbyte.training.packing import PackingReport
from halfbyte.training.runtime import Runtime, close_runtime, on_first_rank, open_runtime
from halfbyte.training.schedule import collect
from halfbyte.training.shape import read_shape
from halfbyte.training.stage_graphs import StageReplay
from halfbyte.training.teacher_files import TeacherFiles, ask, begin, fingerprint, needed_windows, write_file

LAYOUTS = {
    2: {"pp2": Parallel(pipeline=2), "tp2_sp": Parallel(tensor=2, sequence=True), "dp2": Parallel(data=2)},
    4: {
        "tp2_pp2_sp": Parallel(tensor=2, pipeline=2, sequence=True),
        "tp2_dp2_sp": Parallel(tensor=2, data=2, sequence=True),
        "pp4": Parallel(pipeline=4),
        "pp2_dp2": Parallel(pipeline=2, data=2),
        "dp4": Parallel(data=4),
    },
}
"""By the number of processes."""
EVERYTHING = Distill(loss=Divergence.jensen_shannon, beta=0.3, temperature=2.0, top_k=8, cross_entropy=0.5, hidden=2.0)
VARIANTS = {
    "forward_kl": (Method.qad, {}, {}, Distill()),
    "everything": (Method.qad, {}, {}, EVERYTHING),
    "top_k": (Method.qad, {}, {}, Distill(top_k=8)),
    "files": (Method.qad, {}, {}, Distill(top_k=8, teacher="what halfbyte teacher would write")),
    "inner": (Method.qad, {}, {}, Distill(hidden=2.0, hidden_layers=[0, 2])),
    "lsq": (Method.qat, {"block_scale_lr_mult": 20.0}, {}, Distill()),
    "lora": (Method.qad, {"block_scale_lr_mult": 20.0, "lora": Lora(rank=4, targets=["*.[02].*"])}, {}, Distill()),
}
"""Name -> method, changes of `train`, changes of `quantize`, `distill`."""
STEPS, WINDOWS, LENGTH = 2, 8, 16


BESIDE = ("lsq", "lora")
"""Variants with parameters beside the weights."""
SHARDED = (*(("dp2", name) for name in BESIDE), ("tp2_dp2_sp", "lsq"))
"""What is tried with the distributed optimizer."""
STAGES = ("forward_kl", "files", "lsq")
"""What is tried with recorded stages."""
TURNS = (("forward_kl", "float32"), ("lsq", "float32"), ("lora", "float64"))
"""What is tried with micro-batches side by side; in FP32 gradients are added in place."""
AMONG_FOUR = ("forward_kl", *BESIDE)
"""Variants of four processes."""


def recipe_of(variant: str, parallel: Parallel, dtype: str = "float64") -> Recipe:
    """The recipe of one variant; every step sees four windows in micro-batches of one."""
    method, train, quantize_, distill = VARIANTS[variant]
    optimization = Train(
        **({"steps": STEPS, "global_batch": 4, "sequence_length": LENGTH, "learning_rate": 1e-3} | train),
        dtype=dtype,
    )
    numbers = Quantize(**({"format": Format.nvfp4} | quantize_))
    return Recipe(method=method, parallel=parallel, train=optimization, quantize=numbers, distill=distill)


def corpus(vocab: int) -> PackedDataset:
    """Random windows with a random loss mask."""
    random = np.random.default_rng(5)
    tokens = random.integers(0, vocab, (WINDOWS, LENGTH + 1), dtype=np.int32)
    mask = (random.random((WINDOWS, LENGTH)) < 0.7).astype(np.uint8)
    report = PackingReport(documents=1)
    return PackedDataset(tokens, mask, np.zeros((WINDOWS, LENGTH), np.int32), False, report, Path("random"))


def files_of(place: Path, folder: Path, teacher, data: PackedDataset, recipe: Recipe, runtime: Runtime) -> TeacherFiles:
    """The teacher's files: written under the first layout, read under all."""
    recipe.model.path = str(folder)
    windows = needed_windows(recipe, data)
    made_from = fingerprint(recipe, data, runtime.dtype)
    if not on_first_rank(runtime, place.exists):
        said = ask(teacher, recipe, data, windows, runtime.device)
        on_first_rank(runtime, lambda: begin(place, made_from, windows))
        if said is not None:  # the last stage of the pipeline that is the first layout
            write_file(place, 0, said)
        torch.distributed.barrier()
    return TeacherFiles(place, made_from, windows)


def losses(
    folder: Path,
    recipe: Recipe,
    runtime: Runtime,
    place: Path,
    save: Path | None = None,
    load_from: Path | None = None,
    stages: StageReplay | None = None,
    at_once: int = 0,
) -> list[float]:
    """Mean loss per token of every step and, with parameters beside the weights, a number made of them.

    Saves after the first step, or starts from there. With `stages`, or `at_once` micro-batches in a replay, the norm of
    the last gradient comes after them; with `at_once` a digest of it, too.
    """
    shape = read_shape(folder / "config.json")

    def load():
        gpt = model.build(shape, recipe, runtime)
        model.import_hf(gpt, folder, shape, runtime)
        return gpt

    data = corpus(shape.vocab)
    student, teacher = load(), load().requires_grad_(False)
    windows = plain_batches(calibration_windows(data, WINDOWS, 0).tokens, 4, runtime.device)
    quantize.quantize(student, recipe, lambda stage: collect(stage, windows, None))
    if recipe.distill.teacher is not None:
        teacher = files_of(place, folder, teacher, data, recipe, runtime)
    module = Training(student, teacher=teacher, recipe=recipe, runtime=runtime, data=data)
    module.optimizers = lambda: module.optimizer  # what Lightning's trainer would give it
    module.log_dict = lambda *_, **__: None
    if stages is not None:
        module._stage, module._rounded = stages, {}
    if at_once:
        lanes = side_by_side.open_lanes(recipe, runtime)
        assert len(lanes) == (at_once if at_once > 1 else 0)
        module._replay, module._rounded = Replay(lanes, module._distillation, Again), {}
    if load_from is not None:
        checkpoint.load(checkpoint.Trainable(student, module.optimizer.megatron), load_from)
        quantize.refresh_scales(student, recipe.quantize)
        module.progress = Progress([math.nan], [1])
    for step in range(len(module.progress.losses), STEPS):
        parts = rank_micro_batches(
            data,
            step,
            global_batch=4,
            micro_batch=1,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=recipe.parallel.data,
            seed=0,
        )
        module.training_step(parts, step)
        if save is not None and step == 0:
            trained = checkpoint.Trainable(student, module.optimizer.megatron)
            checkpoint.save(trained, {}, save)
            if recipe.train.dtype == "float32":
                with mock.patch.object(optimizer_state, "ungathered", return_value=nullcontext()):
                    checkpoint.save(trained, {}, save.with_name(f"{save.name}.gathered"))
    found = module.progress.losses[0 if load_from is None else 1 :] + beside_weights(student)
    if at_once > 1:
        assert all(lane.exchange.count > 0 for lane in lanes)
        module.on_train_end()
    if at_once:
        found += [digest(module.ddp)]
    return [*found, module.optimizer.gradient_norm] if stages is not None or at_once else found


def digest(ddp: torch.nn.Module) -> float:
    """A number that is another one if a bit of this rank's gradients is."""
    bytes_of = b"".join(buffer.grad_data.numpy().tobytes() for buffer in ddp.buffers)
    return float(int.from_bytes(hashlib.sha256(bytes_of).digest()[:6], "big"))


def two_ways(folder: Path, recipe: Recipe, runtime: Runtime, place: Path) -> tuple[list[float], list[float]]:
    """A pipeline's numbers, its stages called as ever and through their pairs."""
    plain, pairs = StageReplay(Again), StageReplay(Again)
    plain.call = lambda *_, **__: None
    # On GPUs, where stages are captured, gradients are summed after the passes.
    with mock.patch("halfbyte.training.module.reduces_early", return_value=False):
        found = [losses(folder, recipe, runtime, place, stages=way) for way in (plain, pairs)]
    in_flight = recipe.parallel.pipeline - parallel_state.get_pipeline_model_parallel_rank()
    assert pairs.recorded == in_flight, (pairs.recorded, in_flight)
    return found[0], found[1]


def turns(folder: Path, variant: str, dtype: str, parallel: Parallel, runtime: Runtime) -> dict[str, list[float]]:
    """A tensor-parallel layout's numbers, micro-batches one after the other, two and four at a time."""
    single = dataclasses.replace(runtime, dtype=getattr(torch, dtype))
    found = {}
    for at_once, name in ((1, "turns"), (2, "turns again"), (4, "turns of four")):
        recipe = recipe_of(variant, copy.deepcopy(parallel), dtype)
        recipe.train.micro_batches_at_once = at_once
        with host_lanes.on_host():
            found[f"{variant}, {name}"] = losses(folder, recipe, single, folder, at_once=at_once)
    return found


def beside_weights(gpt: torch.nn.Module) -> list[float]:
    """A number that every element beside the weights enters, the same under every layout; nothing without any."""
    beside = companions.of(gpt)
    if beside is None:
        return []
    total = torch.zeros((), dtype=torch.float64)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for _, companion in beside.each():
        for name, parameter in companion.named_parameters():
            if first or companion.axes[name] is not None:
                total += parameter.detach().double().sin().sum()
    torch.distributed.all_reduce(total)
    return [float(total) / parallel_state.get_data_parallel_world_size()]


def variants_of(parallel: Parallel, ranks: int) -> list[str]:
    """What a layout is tried with; LoRA trains two of four layers, and every stage needs something to train."""
    if parallel.pipeline == parallel.data == 2:
        return ["forward_kl"]  # for its stages
    names = list(VARIANTS if ranks == 2 else AMONG_FOUR)
    if parallel.pipeline > 1 and "inner" in names:
        names.remove("inner")
    if parallel.pipeline == 4:
        names.remove("lora")
    return names


def main(folder: Path, out: Path) -> None:
    """Train every variant under every layout of so many processes."""
    found: dict[str, dict[str, list[float]]] = {}
    runtime = None
    checkpoint.tolerate_plain_adam()
    ranks = environment.coordinates()[1]
    for layout, parallel in LAYOUTS[ranks].items():
        names = variants_of(parallel, ranks)
        recipes = {name: recipe_of(name, copy.deepcopy(parallel)) for name in names}
        if runtime is None:
            runtime = open_runtime(recipes["forward_kl"])
        else:  # other groups of the same processes
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        found[layout] = {
            name: losses(folder, recipe, runtime, out.parent / "files") for name, recipe in recipes.items()
        }
        for name in (name for name in STAGES if name in names and parallel.pipeline > 1):
            ways = two_ways(folder, recipes[name], runtime, out.parent / "files")
            found[layout] |= zip((f"{name}, stages", f"{name}, stages again"), ways, strict=True)
        for name, dtype in TURNS if layout == "tp2_sp" else ():
            found[layout] |= turns(folder, name, dtype, parallel, runtime)
        for name in (name for name in BESIDE if name in names):
            place = out.parent / name
            if not on_first_rank(runtime, place.exists):
                losses(folder, recipes[name], runtime, out.parent, save=place)
            again = losses(folder, recipes[name], runtime, out.parent, load_from=place)
            found[layout][f"{name}, resumed"] = again
            if (layout, name) in SHARDED:
                single = recipe_of(name, copy.deepcopy(parallel), "float32")
                place = out.parent / f"{name}.{layout}.float32"
                fp32 = dataclasses.replace(runtime, dtype=torch.float32)
                found[layout][f"{name}, float32"] = losses(folder, single, fp32, out.parent, save=place)
                again = losses(folder, single, fp32, out.parent, load_from=place)
                found[layout][f"{name}, float32, resumed"] = again
        torch.distributed.barrier()
    assert runtime is not None
    if runtime.first:
        write_json(out, found)
    close_runtime()


if __name__ == "__main__":
    environment.set_process_environment()
    environment.quiet_libraries()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
