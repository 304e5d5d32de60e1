"""What lm-eval's requests get from our model under several layouts; and decoding with a cache against none.

Usage: harness.py FOLDER OUT.json, alone or under torchrun with two processes. FOLDER/model is a Hugging Face directory,
FOLDER/requests.json holds the requests. Judges nothing: rank 0 writes what was measured.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region as gather

from halfbyte.training import environment, model
from halfbyte.training.config import Model, Parallel, Recipe, Train
from halfbyte.training.crew import Crew
from halfbyte.training.errors import UserError
from halfbyte.training.evaluate import Examination
from halfbyte.training.fetch import load_tokenizer
from halfbyte.training.files import write_json
from halfbyte.training.generate import Prompt
from halfbyte.training.harness import InPlace
from halfbyte.training.runtime import Runtime, close_runtime, open_runtime
from halfbyte.training.schedule import collect, token_batch
from halfbyte.training.shape import read_shape

LAYOUTS = {
    1: {"tp1": Parallel()},
    2: {
        "tp2_sp": Parallel(tensor=2, sequence=True),
        "pp2_uneven": Parallel(pipeline=2, last_stage_layers=1),
        "dp2": Parallel(data=2),
    },
}


def loaded(folder: Path, parallel: Parallel, runtime: Runtime):
    """The model under a layout, and the passes through it."""
    recipe = Recipe(parallel=parallel, model=Model(path=str(folder)), train=Train(dtype="float32"))
    shape = read_shape(folder / "config.json")
    gpt = model.build(shape, recipe, runtime).eval()
    model.import_hf(gpt, folder, shape, runtime)
    exam = Examination.load(recipe, runtime, folder, load_tokenizer(folder), shape.max_positions)
    return gpt, exam, exam.passes(gpt)


def asked(kind: str, arguments: list) -> list[Instance]:
    metadata = [(kind, i, 1) for i in range(len(arguments))]
    return [Instance(kind, {}, tuple(args), 0, metadata=m) for args, m in zip(arguments, metadata, strict=True)]


def answers(folder: Path, parallel: Parallel, runtime: Runtime) -> dict:
    """What our adapter says to every request of FOLDER/requests.json; empty on the other ranks."""
    _, exam, passes = loaded(folder / "model", parallel, runtime)
    wanted = json.loads((folder / "requests.json").read_text())
    jobs = {"score": lambda items: passes.score(items, reference=None, keep=False)[0], "generate": passes.generate}
    crew = Crew(runtime, jobs)

    def work() -> dict:
        lm = InPlace(crew, exam.tokenizer, exam.max_length)
        found = {kind: getattr(lm, kind)(asked(kind, requests)) for kind, requests in wanted.items()}
        return found | {"truncated": lm.truncated}

    return crew.lead(work) or {}


def decoded(folder: Path, parallel: Parallel, runtime: Runtime) -> dict:
    """Tokens with and without a cache, in float64, and whether all ranks have the same."""
    gpt, exam, _ = loaded(folder / "model", parallel, runtime)
    gpt.double()
    gpt.config.params_dtype = gpt.config.pipeline_dtype = torch.float64
    generator = torch.Generator().manual_seed(5)
    prompts = [
        Prompt(i, tuple(torch.randint(3, 512, (size,), generator=generator).tolist()), 6 + i)
        for i, size in enumerate((9, 1, 30, 4, 4))
    ]
    outputs = exam.passes(gpt).generate(prompts)
    plain = [_without_cache(gpt, prompt, exam.ends, parallel) for prompt in prompts]
    everyone: list = [None] * runtime.world
    dist.all_gather_object(everyone, outputs)
    return {
        "cached": [list(output.tokens) for output in outputs],
        "plain": plain,
        "same_everywhere": all(other == outputs for other in everyone),
    }


def _without_cache(gpt, prompt: Prompt, ends, parallel: Parallel) -> list[int]:
    tokens = list(prompt.tokens)
    for _ in range(prompt.limit):
        padded = tokens + [0] * (len(tokens) % 2 if parallel.sequence else 0)
        last = len(tokens) - 1
        take = lambda out, index: gather(out)[0, last].argmax()  # noqa: B023, E731
        found = collect(gpt, [token_batch(torch.tensor([padded]))], take)
        token = found[0] if found else torch.tensor(0)
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(token, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        tokens.append(int(token))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt.tokens) :]


def failures(runtime: Runtime) -> list[str]:
    """What every rank raises when rank 0's work fails: with an error of ours, and with one that nobody expects."""
    found = []
    for error in (UserError("the task file is wrong"), ZeroDivisionError("no items")):
        crew = Crew(runtime, {"noop": lambda: None})

        def work(crew: Crew = crew, error: Exception = error) -> None:
            crew.do("noop")
            raise error

        try:
            crew.lead(work)
        except (UserError, ZeroDivisionError) as seen:
            found.append(f"{type(seen).__name__}: {seen}")
    everyone: list = [None] * runtime.world
    dist.all_gather_object(everyone, found)
    return everyone


def main(folder: Path, out: Path) -> None:
    """Measure every layout of this world size."""
    found: dict = {}
    runtime = None
    for layout, parallel in LAYOUTS[environment.coordinates()[1]].items():
        if runtime is None:
            runtime = open_runtime(Recipe(parallel=parallel, train=Train(dtype="float32")))
            found["failures"] = failures(runtime)
        else:  # other groups of the same processes
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        found[layout] = answers(folder, parallel, runtime) | {"decoded": decoded(folder, parallel, runtime)}
    if runtime.first:
        write_json(out, found)
    close_runtime()


if __name__ == "__main__":
    environment.set_process_environment()
    environment.quiet_libraries()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
