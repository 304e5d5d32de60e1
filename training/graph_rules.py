"""Where the passes of a micro-batch are replayed from CUDA graphs: for training and for the plan. Torch-free."""

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Recipe


def captures(recipe: Recipe) -> bool:
    """Whether a recipe's passes are captured on GPUs (graphs.py, stage_graphs.py).

    `auto` leaves data-parallel ranks their hooks, which sum gradients beside the last backward pass
    (module.reduces_early; a replay runs none), where that sum goes over a network: on one host
    (launch.gpus_per_node) it is a small part of a step, and what Python takes need not be. Recomputation asks for the
    generator's state. Without a pipeline the teacher is part of the graph, so it cannot be read from files in between;
    with one the loss stands outside and cannot see hidden states inside.
    """
    choice, layout, distill = recipe.train.cuda_graphs, recipe.parallel, recipe.distill
    one_host = recipe.world_size <= recipe.launch.gpus_per_node
    asked = choice is CudaGraphs.always or (choice is CudaGraphs.auto and (layout.data == 1 or one_host))
    possible = not distill.hidden if layout.pipeline > 1 else distill.teacher is None
    return asked and possible and not recipe.train.recompute
