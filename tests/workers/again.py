"""In the place of CUDA graphs on a machine without a GPU; workers import it, test files load it with runpy."""

import torch


class Again:
    """In the place of graphs.Capture: computes on the same tensors again."""

    opened = 0
    """How many are not closed."""

    def __init__(self) -> None:
        Again.opened += 1

    def record(self, compute):
        """A capture computes nothing, but there is an output from then on."""
        again = torch.enable_grad()(compute)  # replayed inside a Function, whose forward computes no graph
        if compute.__name__ == "_forward":
            again()
        return again

    def close(self) -> None:
        """Nothing to free."""
        Again.opened -= 1
