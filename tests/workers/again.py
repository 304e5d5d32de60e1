"""In the place of CUDA graphs on a machine without a GPU; workers import it, test files load it with runpy."""

import itertools
import math
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """All tensors that operators make: views and what is written in place are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storage(tensor):
            return tensor.untyped_storage().data_ptr()

        out = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.tensors += [x.data for x in results if storage(x) not in given]
        return out


class Again:
    """In the place of graphs.Capture: computes on the same tensors again.

    As in memory that graphs share, a computation overwrites what it and later ones of the same recorder made before.
    """

    opened: ClassVar[list["Again"]] = []
    """Those that are not closed."""

    def __init__(self) -> None:
        Again.opened.append(self)
        self.made: list[list[torch.Tensor]] = []
        """By every computation."""

    def record(self, compute):
        """A capture computes nothing, but there is an output from then on."""
        number = len(self.made)
        self.made.append([])

        @torch.enable_grad()  # replayed inside a Function, whose forward computes no graph
        def again():
            for tensor in itertools.chain(*self.made[number:]):
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)
            with Made() as made:
                compute()
            self.made[number] = made.tensors

        if compute.__name__ == "_forward":
            again()
        return again

    def close(self) -> None:
        """Nothing to free."""
        Again.opened.remove(self)
