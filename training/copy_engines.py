"""Gathers and scatters over NVLink by the GPUs' copy engines, which leave every SM to the GEMMs beside them.

NCCL's kernels move data with SMs: a GEMM that runs meanwhile has fewer of them, and a collective that becomes ready
during a GEMM waits until that leaves some. Here a rank writes to and reads from its neighbours' memory (torch's
symmetric memory; one host, every pair of GPUs linked), and SMs only signal and add up. A CUDA graph can hold all of it.

Shapes: n ranks, [S, ...] a whole tensor, [S/n, ...] a rank's part of it.
"""

# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.distributed import _symmetric_memory as symmetric_memory

BLOCK = 2048
"""Elements of a kernel's program."""


@triton.jit
def _add_up(pieces_ptr, own_ptr, out_ptr, SIZE, OWN: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of RANKS pieces of SIZE elements in FP32, in the order of ranks; the piece of rank OWN is at own_ptr."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(RANKS):
        place = own_ptr + at if rank == OWN else pieces_ptr + tl.full((), rank, tl.int64) * SIZE + at
        total += tl.load(place, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < SIZE)


def add_up(pieces: torch.Tensor, own: torch.Tensor, rank: int, out: torch.Tensor) -> None:
    """Fill `out` with the sum of all ranks' pieces, in FP32 and in the order of ranks, rounded once.

    torch.sum over the first dimension takes three times as long, on SMs that GEMMs wait for.

    Args:
        pieces: [n, P], of every rank but this one; what is at its own place is not read.
        own: [P], this rank's.
        rank: This rank.
        out: [P].
    """
    if not out.is_cuda:
        parts = [own if other == rank else piece for other, piece in enumerate(pieces)]
        torch.sum(torch.stack(parts), 0, out=out)
        return
    size = out.numel()
    _add_up[(triton.cdiv(size, BLOCK),)](pieces, own, out, size, OWN=rank, RANKS=len(pieces), BLOCK=BLOCK)


class Exchange:
    """One stream of collectives over a group, for tensors of one size; made by every rank at the same place.

    Two buffers take turns, so that a rank may write one while a neighbour still reads the other: the signal of each
    collective says that the one before is done with.

    Args:
        group: The ranks; all on this host.
        whole: A whole tensor, for its size and type.
    """

    def __init__(self, group: dist.ProcessGroup, whole: torch.Tensor):
        self.numel, self.dtype = whole.numel(), whole.dtype
        self.rank, self.ranks = group.rank(), group.size()
        self.stream = torch.cuda.Stream(whole.device, priority=-2)
        sizes = self.numel // self.ranks, self.numel
        # torch puts each buffer's addresses into memory of the current stream without waiting for it: a kernel that had
        # that memory before and has not run yet would write over them.
        torch.cuda.current_stream(whole.device).synchronize()
        self._places = [[self._shared(group, size, whole) for _ in range(2)] for size in sizes]
        self._turn = [0, 0]

    def _shared(self, group: dist.ProcessGroup, size: int, like: torch.Tensor) -> tuple[torch.Tensor, Any]:
        memory = symmetric_memory.empty(size, dtype=like.dtype, device=like.device)
        return memory, symmetric_memory.rendezvous(memory, group)

    def _next(self, kind: int) -> tuple[torch.Tensor, Any]:
        self._turn[kind] ^= 1
        return self._places[kind][self._turn[kind]]

    def serves(self, whole: torch.Tensor) -> bool:
        """Whether a tensor [S, ...] has the size and type that this was made for."""
        return whole.numel() == self.numel and whole.dtype == self.dtype

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Fill `whole` [S, ...] with every rank's `part` [S/n, ...], both contiguous; on the current stream."""
        own, shared = self._next(0)
        own.copy_(part.view(-1))
        shared.barrier()
        places = whole.view(self.ranks, -1)
        for step in range(self.ranks):
            source = (self.rank + step) % self.ranks
            places[source].copy_(shared.get_buffer(source, own.shape, self.dtype))

    def scatter(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Fill `part` [S/n, ...] with this rank's part of the sum of all `whole` [S, ...]; on the current stream.

        Added up in FP32 and rounded once.
        """
        own, shared = self._next(1)
        size, pieces = self.numel // self.ranks, whole.view(self.ranks, -1)
        for step in range(1, self.ranks):
            target = (self.rank + step) % self.ranks
            shared.get_buffer(target, (size,), self.dtype, self.rank * size).copy_(pieces[target])
        shared.barrier()
        add_up(own.view(self.ranks, size), pieces[self.rank], self.rank, part.view(-1))

    def settle(self) -> None:
        """Wait until every rank is done with every buffer; on the current stream, after all collectives."""
        self._places[0][0][1].barrier()
