"""The fastest layout that fits: all of TP x PP x DP x micro-batch x recomputation, tried on paper. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

from halfbyte.launch.plan_memory import evaluated, memory_per_rank
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.launch.plan_time import Step, step_time
from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Recipe
from halfbyte.training.hardware import GIB, Gpu
from halfbyte.training.model_rules import model_problems
from halfbyte.training.shape import ModelShape
from halfbyte.training.side_by_side_rules import side_by_side_problems

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SPARE = 0.05
"""Share of a GPU's memory that the search leaves: the plan has been up to 3 % short of tensors, and 9 % of what torch's
allocator held, some of which it gives back (docs/evidence/plan.md)."""
NEEDS = "needs "
"""How a layout's problem begins where memory is too small."""


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs.

    Attributes:
        layout: The layout.
        memory: Part -> bytes of the fullest rank.
        step: Its time.
        problem: Why it cannot run; None if it can.
    """

    layout: Layout
    memory: dict[str, float]
    step: Step
    problem: str | None

    def spare(self, gpu: Gpu) -> float:
        """Share of a GPU's memory for tensors that is left over."""
        return 1 - sum(self.memory.values()) / gpu.usable


def judge(recipe: Recipe, model: Architecture, layout: Layout, gpu: Gpu) -> Candidate:
    """A layout that divides the model, with memory and time, and why it does not fit, with what to do, if so."""
    return _with_remedy(recipe, model, _tried(recipe, model, layout, gpu), gpu)


def _tried(recipe: Recipe, model: Architecture, layout: Layout, gpu: Gpu) -> Candidate:
    """The same without the remedy that needs the memory of a second recipe."""
    memory = memory_per_rank(recipe, model, layout)
    total, problem = sum(memory.values()), None
    scored = evaluated(recipe, model, layout)
    if total > gpu.usable:
        largest = max(memory, key=lambda part: memory[part])
        problem = (
            f"{NEEDS}{total / GIB:.0f} GiB per GPU of {gpu.usable / GIB:.0f}, most of it {largest} "
            f"({memory[largest] / GIB:.0f} GiB)"
        )
    elif scored > gpu.usable:
        problem = (
            f"{NEEDS}{scored / GIB:.0f} GiB per GPU of {gpu.usable / GIB:.0f} while it evaluates; lower "
            f"evaluate.tokens_per_batch = {recipe.evaluate.tokens_per_batch}"
        )
    return Candidate(layout, memory, step_time(recipe, model, layout, gpu), problem)


def _with_remedy(recipe: Recipe, model: Architecture, tried: Candidate, gpu: Gpu) -> Candidate:
    """Where a layout trains in too much memory with CUDA graphs and fits without, its problem says so as well."""
    if tried.spare(gpu) >= 0 or tried.layout.at_once(recipe) > 1:  # the latter run in graphs only
        return tried
    plain = replace(recipe, train=replace(recipe.train, cuda_graphs=CudaGraphs.never))
    total = max(sum(memory_per_rank(plain, model, tried.layout).values()), evaluated(plain, model, tried.layout))
    if total > gpu.usable:
        return tried
    return replace(tried, problem=f"{tried.problem}; train.cuda_graphs=never needs {total / GIB:.0f} GiB")


def best(recipe: Recipe, model: Architecture, gpu: Gpu, gpus: int) -> tuple[Candidate | None, dict[str, str]]:
    """The fastest layout on a number of GPUs that leaves SPARE of their memory, or else of those that fit at all.

    Args:
        recipe: Method, formats, batch; its own layout plays no part.
        model: A dense model.
        gpu: The hardware.
        gpus: How many of them.

    Returns:
        The candidate, None if nothing fits; and why others were given up, "TP16 PP1" -> reason.
    """
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            name, sequence = f"TP{tensor} PP{pipeline}", tensor > 1 and recipe.train.sequence_length % tensor == 0
            plain = Layout(tensor, pipeline, gpus // (tensor * pipeline), 1, False, sequence)
            problem = layout_problem(recipe, model.sizes, gpu, plain) or _idle(recipe, plain)
            if problem is not None:
                refused[name] = problem
                continue
            odd = {
                layout: next(side_by_side_problems(layout.written_into(recipe)), "")
                for layout in _choices(recipe, plain)
            }
            tried = [_tried(recipe, model, layout, gpu) for layout, problem in odd.items() if not problem]
            fitting = [candidate for candidate in tried if candidate.problem is None]
            if not tried:
                refused[name] = next(iter(odd.values()))
            elif not fitting:
                smallest = min(tried, key=lambda candidate: sum(candidate.memory.values()))
                refused[name] = _with_remedy(recipe, model, smallest, gpu).problem or ""
            found += fitting
    roomy = [candidate for candidate in found if candidate.spare(gpu) >= SPARE]
    return min(roomy or found, key=lambda candidate: candidate.step.seconds, default=None), refused


def layout_problem(recipe: Recipe, shape: ModelShape, gpu: Gpu, layout: Layout) -> str | None:
    """Why a layout cannot run, memory aside: NVLink, the batch, and all that model_rules.py asks of a recipe."""
    if layout.tensor > gpu.domain:
        return f"tensor parallelism needs NVLink, which joins {gpu.domain} {gpu.name}"
    if recipe.train.global_batch % (layout.micro_batch * layout.data):
        batch = f"train.global_batch = {recipe.train.global_batch}"
        return f"{batch} does not divide over {layout.data} data-parallel ranks"
    return next(iter(model_problems(layout.written_into(recipe), shape)), None)


def _idle(recipe: Recipe, layout: Layout) -> str | None:
    """Why a search leaves out a pipeline that its micro-batches cannot fill; such a layout does run."""
    share = layout.micro_batches(recipe)
    if share >= layout.pipeline:
        return None
    return (
        f"train.global_batch gives a rank {share} micro-batches at most, too few for {layout.pipeline} pipeline stages"
    )


def _choices(recipe: Recipe, plain: Layout) -> Iterator[Layout]:
    """The layout with every micro-batch that divides a rank's share and fills the pipeline, recomputing or not."""
    share = plain.micro_batches(recipe)
    for micro_batch in MICRO_BATCHES:
        if share % micro_batch == 0 and share // micro_batch >= plain.pipeline:
            for recompute in (False, True):
                yield replace(plain, micro_batch=micro_batch, recompute=recompute)


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
