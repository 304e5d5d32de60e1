"""Whether a recipe's micro-batches can run side by side (training/side_by_side.py). Torch-free; a line per problem."""

from collections.abc import Iterator

from halfbyte.training.config import Recipe
from halfbyte.training.graph_rules import captures

MOST = 8
"""Micro-batches at once: each takes two of the 32 queues of a GPU, and gives less than the one before."""


def side_by_side_problems(recipe: Recipe) -> Iterator[str]:
    """What train.micro_batches_at_once asks of the other keys."""
    train, layout = recipe.train, recipe.parallel
    if train.micro_batches_at_once == 1:
        return
    key = f"train.micro_batches_at_once = {train.micro_batches_at_once}"
    if not 1 <= train.micro_batches_at_once <= MOST:
        yield f"{key}: give 1 to {MOST}"
        return
    if layout.tensor == 1 or layout.pipeline > 1 or not layout.sequence:
        yield (
            f"{key}: hides what tensor-parallel ranks exchange under sequence parallelism, without a pipeline; set it "
            "to 1, or parallel.tensor to 2 or more, parallel.sequence=true and parallel.pipeline=1"
        )
    if not captures(recipe):
        remedy = "set train.cuda_graphs=always, train.recompute=false and distill.teacher=null"
        yield f"{key}: runs inside a CUDA graph, and this recipe captures none; {remedy}"
    if recipe.distill.hidden:
        yield f"{key}: does not go with distill.hidden; set that to 0, or one micro-batch at a time"
    own = train.global_batch // max(1, train.micro_batch * layout.data)
    if own % train.micro_batches_at_once:
        yield (
            f"{key}: a rank has {own} micro-batches of train.micro_batch = {train.micro_batch} in a step, which "
            f"{train.micro_batches_at_once} does not divide; change it, train.global_batch or train.micro_batch"
        )
