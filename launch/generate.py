"""`halfbyte generate`: training text sampled from the BF16 model, under the recipe's layout.

It works in <run.dir>/generate, so that it neither needs nor disturbs a run there, and writes OUT beside OUT.json, which
says what made it. A stopped command goes on when it is given again.
"""

import time
from dataclasses import replace
from pathlib import Path

from halfbyte.launch.console import Console
from halfbyte.training.config import Method, Recipe
from halfbyte.training.errors import RecipeError
from halfbyte.training.files import at_home
from halfbyte.training.interrupt import Interrupted, Stop

STAGE = "generate"


def prepare(recipe: Recipe, prompts: str, out: str) -> Recipe:
    """The command's own recipe: nothing is quantized, trained or scored. Torch-free.

    Args:
        recipe: Resolved.
        prompts: JSONL to read.
        out: JSONL to write.

    Raises:
        RecipeError: there are no prompts, or the output would take their place.
    """
    source, target = at_home(prompts).absolute(), at_home(out).absolute()
    if not source.is_file():
        raise RecipeError([f"generate.prompts = {prompts}: no such file; give a JSONL or JSONL.gz file"])
    if source == target:
        raise RecipeError([f"generate.out = {out}: is the file of the prompts; choose another"])
    if target.suffix == ".gz":
        raise RecipeError([f"generate.out = {out}: lines are appended as they come, uncompressed; drop the .gz"])
    return replace(
        recipe,
        method=Method.bf16,
        run=replace(recipe.run, dir=str(Path(recipe.run.dir) / STAGE)),
        evaluate=replace(recipe.evaluate, tasks=[]),
        generate=replace(recipe.generate, prompts=str(source), out=str(target)),
    )


def generate(recipe: Recipe, stop: Stop) -> None:
    """Continue all prompts. Collective: in all processes of the layout.

    Args:
        recipe: What `prepare` returned; run.dir exists.
        stop: Installed signal handling.

    Raises:
        UserError: see Work.open, sampling.load_requests and Blocks.
    """
    from halfbyte.training.runtime import close_runtime, on_first_rank, open_runtime

    started = time.perf_counter()
    runtime = open_runtime(recipe)
    from tqdm import tqdm

    from halfbyte.launch.stages import Work
    from halfbyte.training import model_identity, sampling
    from halfbyte.training.blocks import Blocks

    on_first_rank(runtime, lambda: model_identity.check(recipe, Path(recipe.run.dir).parent))
    console = Console(runtime.first)
    work = Work.open(recipe, runtime, stop, console, resume=False, started=started)
    work.gpt.eval()
    requests = sampling.load_requests(work.tokenizer, recipe, work.exam.max_length, work.shape.vocab)
    blocks = Blocks(Path(recipe.generate.out or ""), sampling.BLOCK)
    there = done = on_first_rank(runtime, lambda: blocks.open(sampling.identity(recipe)))
    tokens = 0
    with console.stage(STAGE) as notes:
        bar = tqdm(
            total=len(requests), initial=done, desc=f"  {STAGE}", unit="prompt", disable=not runtime.first, leave=False
        )
        try:
            with bar:
                for lines in sampling.sample(requests[done:], work.exam.passes(work.gpt).generate, recipe.data):
                    on_first_rank(runtime, lambda lines=lines: blocks.add(lines))
                    bar.update(len(lines))
                    done += len(lines)
                    tokens += sum(line["generated_tokens"] for line in lines)
        except Interrupted as error:
            raise Interrupted(
                f"stopped by {stop.requested}: {done} of {len(requests)} prompts are in {blocks.partial}; the same "
                "command goes on from there"
            ) from error
        on_first_rank(runtime, blocks.finish)
        notes.append(f"{len(requests)} prompts" + (f" ({there} of them from an earlier start)" if there else ""))
        notes += [f"{tokens:,} tokens", str(blocks.out)]
    close_runtime()
