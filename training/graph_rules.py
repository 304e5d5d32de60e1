"""Where the passes of a micro-batch are replayed from CUDA graphs: for training and for the plan. Torch-free."""

from typing import Protocol

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Recipe


def captures(recipe: Recipe) -> bool:
    """Whether a recipe's passes are captured on GPUs, under its own layout (graphs.py, stage_graphs.py)."""
    return captures_under(recipe, recipe.parallel, recompute=recipe.train.recompute)


class Spread(Protocol):
    """A layout: ranks of each kind of parallelism."""

    tensor: int
    pipeline: int
    data: int


def captures_under(recipe: Recipe, layout: Spread, *, recompute: bool) -> bool:
    """The same under another layout.

    `auto` leaves data-parallel ranks their hooks, which sum gradients beside the last backward pass
    (module.reduces_early; a replay runs none), where that sum goes over a network: on one host it is a small part of a
    step, and what Python takes need not be. Recomputation asks for the generator's state. Without a pipeline the
    teacher is part of the graph, so it cannot be read from files in between; with one the loss stands outside and
    cannot see hidden states inside.

    Args:
        recipe: What is trained, and how many GPUs a host has (launch.gpus_per_node).
        layout: How it is spread.
        recompute: Whether layers are recomputed.
    """
    choice, distill = recipe.train.cuda_graphs, recipe.distill
    one_host = layout.tensor * layout.pipeline * layout.data <= recipe.launch.gpus_per_node
    asked = choice is CudaGraphs.always or (choice is CudaGraphs.auto and (layout.data == 1 or one_host))
    possible = not distill.hidden if layout.pipeline > 1 else distill.teacher is None
    return asked and possible and not recompute
