"""Where the passes of a micro-batch are replayed from CUDA graphs: for training and for the plan. Torch-free."""

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Recipe


def captures(recipe: Recipe) -> bool:
    """Whether a recipe's passes are captured on GPUs, under its own layout (graphs.py, stage_graphs.py)."""
    parallel = recipe.parallel
    return captures_under(recipe, parallel.pipeline, parallel.data, recompute=recipe.train.recompute)


def captures_under(recipe: Recipe, pipeline: int, data: int, *, recompute: bool) -> bool:
    """The same under another layout.

    `auto` leaves data-parallel ranks their hooks, which sum gradients beside the last backward pass
    (module.reduces_early): a replay runs none. Recomputation asks for the generator's state. Without a pipeline the
    teacher is part of the graph, so it cannot be read from files in between; with one the loss stands outside and
    cannot see hidden states inside.

    Args:
        recipe: What is trained.
        pipeline: Stages.
        data: Data-parallel ranks.
        recompute: Whether layers are recomputed.
    """
    choice, distill = recipe.train.cuda_graphs, recipe.distill
    asked = choice is CudaGraphs.always or (choice is CudaGraphs.auto and data == 1)
    possible = not distill.hidden if pipeline > 1 else distill.teacher is None
    return asked and possible and not recompute
