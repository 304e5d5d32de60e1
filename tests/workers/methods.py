"""Losses of a few training steps under several layouts, one recipe after another, in float64.

Usage: methods.py MODEL OUT.json under torchrun with two processes. MODEL is a Hugging Face directory. Judges
nothing: rank 0 writes {layout: {variant: [loss of every step]}}.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from halfbyte.training import environment, model, quantize
from halfbyte.training.config import Format, Method, Parallel, Quantize, Recipe, Train
from halfbyte.training.config_distill import Distill, Divergence
from halfbyte.training.corpus import PackedDataset
from halfbyte.training.data import calibration_windows, plain_batches, rank_micro_batches
from halfbyte.training.files import write_json
from halfbyte.training.module import Training
from halfbyte.training.packing import PackingReport
from halfbyte.training.runtime import Runtime, close_runtime, on_first_rank, open_runtime
from halfbyte.training.schedule import collect
from halfbyte.training.shape import read_shape
from halfbyte.training.teacher_files import TeacherFiles, ask, begin, fingerprint, needed_windows, write_file

LAYOUTS = {
    "pp2": Parallel(pipeline=2),
    "tp2_sp": Parallel(tensor=2, sequence=True),
    "dp2": Parallel(data=2),
}
EVERYTHING = Distill(loss=Divergence.jensen_shannon, beta=0.3, temperature=2.0, top_k=8, cross_entropy=0.5, hidden=2.0)
VARIANTS = {
    "forward_kl": (Method.qad, {}, {}, Distill()),
    "everything": (Method.qad, {}, {}, EVERYTHING),
    "top_k": (Method.qad, {}, {}, Distill(top_k=8)),
    "files": (Method.qad, {}, {}, Distill(top_k=8, teacher="what halfbyte teacher would write")),
}
"""Name -> method, changes of `train`, changes of `quantize`, `distill`."""
STEPS, WINDOWS, LENGTH = 2, 8, 16


def recipe_of(variant: str, parallel: Parallel) -> Recipe:
    """The recipe of one variant; every step sees four windows in micro-batches of one."""
    method, train, quantize_, distill = VARIANTS[variant]
    optimization = Train(
        **({"steps": STEPS, "global_batch": 4, "sequence_length": LENGTH, "learning_rate": 1e-3} | train),
        dtype="float64",
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
    made_from = fingerprint(recipe, data)
    if not on_first_rank(runtime, place.exists):
        said = ask(teacher, recipe, data, windows, runtime.device)
        on_first_rank(runtime, lambda: begin(place, made_from, windows))
        if said is not None:  # the last stage of the pipeline that is the first layout
            write_file(place, 0, said)
        torch.distributed.barrier()
    return TeacherFiles(place, made_from, windows)


def losses(folder: Path, recipe: Recipe, runtime: Runtime, place: Path) -> list[float]:
    """Mean loss per token of every step."""
    shape = read_shape(folder / "config.json")

    def load():
        gpt = model.build(shape, recipe, runtime)
        model.import_hf(gpt, folder, shape, runtime)
        return gpt

    data = corpus(shape.vocab)
    student, teacher = load(), load().requires_grad_(False)
    windows = plain_batches(calibration_windows(data, WINDOWS, 0), 4, runtime.device)
    quantize.quantize(student, recipe, runtime, lambda stage: collect(stage, windows, None))
    if recipe.distill.teacher is not None:
        teacher = files_of(place, folder, teacher, data, recipe, runtime)
    module = Training(student, teacher=teacher, recipe=recipe, runtime=runtime, data=data)
    module.optimizers = lambda: module.optimizer  # what Lightning's trainer would give it
    module.log_dict = lambda *_, **__: None
    for step in range(STEPS):
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
    return module.progress.losses


def main(folder: Path, out: Path) -> None:
    """Train every variant under every layout."""
    found: dict[str, dict[str, list[float]]] = {}
    runtime = None
    for layout, parallel in LAYOUTS.items():
        recipes = {name: recipe_of(name, copy.deepcopy(parallel)) for name in VARIANTS}
        if runtime is None:
            runtime = open_runtime(recipes["forward_kl"])
        else:  # other groups of the same processes
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        found[layout] = {
            name: losses(folder, recipe, runtime, out.parent / "files") for name, recipe in recipes.items()
        }
        torch.distributed.barrier()
    assert runtime is not None
    if runtime.first:
        write_json(out, found)
    close_runtime()


if __name__ == "__main__":
    environment.set_process_environment()
    environment.quiet_libraries()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
