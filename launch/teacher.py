"""`halfbyte teacher`: the BF16 model reads the training windows once, and its likeliest tokens go to disk.

A run with distill.teacher=FOLDER then distils from the files and loads no teacher. Replicas (data-parallel ranks) take
the files in turn; files that are there are left alone, so a stopped command goes on where it was.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.launch.console import Console
from halfbyte.training.config import Method, Recipe
from halfbyte.training.errors import RecipeError
from halfbyte.training.interrupt import Stop

if TYPE_CHECKING:
    from halfbyte.launch.stages import Work

STAGE = "teacher"


def prepare(recipe: Recipe, folder: Path) -> Recipe:
    """The command's own recipe: the plain model, nothing to score, `folder` as its run.dir. Torch-free.

    Raises:
        RecipeError: the recipe does not distil over top-k, or has such files already.
    """
    found = []
    if recipe.method != Method.qad:
        found.append(f"method = {recipe.method}: has no teacher; set method=qad")
    if recipe.distill.top_k is None:
        found.append("distill.top_k = null: whole vocabularies do not go to disk; give a number such as 64")
    if recipe.distill.teacher is not None:
        found.append(f"distill.teacher = {recipe.distill.teacher}: there are files already; set null to write new ones")
    if found:
        raise RecipeError(found)
    run, evaluate = replace(recipe.run, dir=str(folder)), replace(recipe.evaluate, tasks=[])
    return replace(recipe, method=Method.bf16, run=run, evaluate=evaluate)


def write(recipe: Recipe, stop: Stop) -> None:
    """Write all files of the folder run.dir. Collective: in all processes of the layout.

    Args:
        recipe: What `prepare` returned; run.dir exists.
        stop: Installed signal handling.

    Raises:
        UserError: see Work.open and training/teacher_files.py.
    """
    from halfbyte.training.runtime import close_runtime, on_first_rank, open_runtime

    started = time.perf_counter()
    runtime = open_runtime(recipe)
    from halfbyte.launch.stages import Work
    from halfbyte.training import teacher_files

    console, folder = Console(runtime.first), Path(recipe.run.dir)
    work = Work.open(recipe, runtime, stop, console, resume=False, started=started)
    work.gpt.eval()
    with console.stage("teacher") as notes:
        packed = work.packed(Path(recipe.data.train or ""), recipe.train.sequence_length)

        def begin() -> tuple[list[list[int]], list[int]]:
            made_from = teacher_files.fingerprint(recipe, packed, runtime.dtype)
            groups = teacher_files.begin(folder, made_from, teacher_files.needed_windows(recipe, packed))
            return groups, [n for n in range(len(groups)) if not (folder / teacher_files.file_name(n)).exists()]

        groups, missing = on_first_rank(runtime, begin)
        _write_files(work, packed, groups, missing, show=runtime.first)
        size = on_first_rank(runtime, lambda: sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        windows = sum(map(len, groups))
        notes.append(f"{windows:,} windows, top {recipe.distill.top_k}, {size / 1e6:,.1f} MB in {len(groups)} files")
    console.say(f"  use it: distill.teacher={folder}")
    close_runtime()


def _write_files(work: "Work", packed: Any, groups: list[list[int]], missing: list[int], *, show: bool) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from tqdm import tqdm

    from halfbyte.training import teacher_files

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    writes = parallel_state.get_tensor_model_parallel_rank() == 0
    for number in tqdm(missing[rank::ranks], desc="  teacher", unit="file", disable=not show, leave=False):
        said = teacher_files.ask(work.gpt, work.recipe, packed, groups[number], work.runtime.device)
        if said is not None and writes:  # the last pipeline stage has it, the same on every tensor-parallel rank
            teacher_files.write_file(Path(work.recipe.run.dir), number, said)
    dist.barrier()
