"""A weight with a low-rank change added to it (LoRA, arXiv 2106.09685): W + alpha/r B A, the same bits on every device.

FP4 rounding is discontinuous, so one bit of the merged weight can be another code. A matrix product sums over the rank
in an order of its own. Here the products of FP32 factors are exact in FP64 and added one rank after the other: a CPU
and a GPU, a shard and the whole, agree to the bit, and an export can merge again what training computed with.

Shapes: N output channels, K input channels, r rank.
"""

import torch
from torch import Tensor

_ELEMENTS = 1 << 22
"""Of the weight, merged at a time: the FP64 sums of so many take 32 MiB."""


@torch.no_grad()
def merge(w_NK: Tensor, b_Nr: Tensor, a_rK: Tensor, factor: float) -> Tensor:
    """W + factor B A.

    Args:
        w_NK: [N, K] float.
        b_Nr: [N, r] FP32 (FP64 in float64 runs).
        a_rK: [r, K], b's dtype.
        factor: alpha / r.

    Returns:
        [N, K] in b's dtype, rounded once from FP64.
    """
    out_NK = torch.empty(w_NK.shape, dtype=b_Nr.dtype, device=w_NK.device)
    b_Nr, a_rK = b_Nr.double(), a_rK.double()
    step = max(1, _ELEMENTS // w_NK.shape[1])
    for start in range(0, len(w_NK), step):
        rows = slice(start, start + step)
        change = torch.zeros(w_NK[rows].shape, dtype=torch.float64, device=w_NK.device)
        for b_N, a_K in zip(b_Nr[rows].T, a_rK, strict=True):
            change.addcmul_(b_N[:, None], a_K)
        out_NK[rows] = change.mul_(factor).add_(w_NK[rows]).to(out_NK.dtype)
    return out_NK


def gradients(grad_NK: Tensor, b_Nr: Tensor, a_rK: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Of B and A, from the gradient of the merged weight: factor G A^T [N, r] and factor B^T G [r, K].

    Args:
        grad_NK: [N, K], the dtype of the factors.
        b_Nr: [N, r].
        a_rK: [r, K].
        factor: alpha / r.
    """
    return factor * (grad_NK @ a_rK.T), factor * (b_Nr.T @ grad_NK)
