"""GPTQ: weights rounded column by column, each column's error made good by those that are still to come.

arXiv 2210.17323, for block formats: the columns of one block (16 or 32) share a scale, which is chosen by the run's own
rule from the weights as they stand when their block is reached. The result is made of values that the run's fake
quantization leaves alone, so training, packing and verification need not know that there was a GPTQ.

The Hessian of a linear's output error is 2 X^T X. Its inputs X are those of the BF16 model (after smoothing), taken for
all layers in one pass; the whole K, also where tensor parallelism splits it: the result is the same under any layout.
Columns are taken in their natural order.

Shapes: T tokens, N output channels, K input channels, G columns of a block.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from halfbyte.training import numerics, typed
from halfbyte.training.arithmetic import Arithmetic
from halfbyte.training.errors import UserError
from halfbyte.training.formats import GRIDS, SPECS
from halfbyte.training.observe import is_row_parallel, whole_input
from halfbyte.training.quantize import Planned

DAMPING = 0.01
"""Added to the Hessian's diagonal, relative to its mean (section 3.3 of the paper)."""


class Hessians:
    """X^T X of every linear that it is shown: [K, K] in FP32 (FP64 for FP64 models), on every tensor-parallel rank."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.sums: dict[str, Tensor] = {}

    def take(self, layer: Planned, x: Tensor) -> None:
        """Add one micro-batch [S, B, K of this rank]; collective over tensor parallelism."""
        if not has_blocks(layer):
            return
        x_TK = whole_input(self.model.get_submodule(layer.module), x)
        x_TK = x_TK.to(torch.promote_types(x_TK.dtype, torch.float32))
        if layer.key not in self.sums:
            self.sums[layer.key] = torch.zeros(x_TK.shape[1], x_TK.shape[1], dtype=x_TK.dtype, device=x_TK.device)
        self.sums[layer.key].addmm_(x_TK.T, x_TK)


def has_blocks(layer: Planned) -> bool:
    """Whether GPTQ applies: FP8 layers, which lose little, are rounded."""
    return SPECS[layer.format].grid.block > 1


@torch.no_grad()
def compensate(w_NK: Tensor, hessian_KK: Tensor, rule: Arithmetic) -> Tensor:
    """GPTQ of one weight.

    With U the upper Cholesky factor of the inverse Hessian, rounding a block B to Y and making it good in the columns R
    to its right is E = (W_B - Y) U_BB^-1, W_R -= E U_BR, and adds ||E||^2 to the output's squared error, whatever Y is.
    So each row of a block may choose between its GPTQ values, put on fixed points of `rule` (compensation may have
    moved a block's maximum away from where its scale expects it), and plain rounding.

    Args:
        w_NK: [N, K] float; K a multiple of the format's block.
        hessian_KK: [K, K] sum of x x^T over inputs x.
        rule: Rounding of the weight, with its scale per tensor.

    Returns:
        [N, K] in w's dtype; rule.fake leaves it as it is (but see nvfp4_fake's exception).

    Raises:
        UserError: the Hessian is not finite.
    """
    block, work_NK = GRIDS[rule.rounding].block, w_NK.double().clone()
    upper_KK, out_NK = _inverse_factor(hessian_KK.double()), torch.empty_like(work_NK)
    for start in range(0, work_NK.shape[1], block):
        here, later = slice(start, start + block), slice(start + block, None)
        w_NG, upper_GG = work_NK[:, here], upper_KK[here, here]
        rounded = rule.fake(w_NG.float()).double()
        aware = rule.fake(_in_block(w_NG, upper_GG, rule).float()).double()
        errors = [torch.linalg.solve_triangular(upper_GG, w_NG - y, upper=True, left=False) for y in (rounded, aware)]
        better = (errors[1].square().sum(1) < errors[0].square().sum(1)).unsqueeze(1)
        out_NK[:, here] = torch.where(better, aware, rounded)
        work_NK[:, later] -= torch.where(better, errors[1], errors[0]) @ upper_KK[here, later]
    return out_NK.to(w_NK.dtype)


def _in_block(w_NG: Tensor, upper_GG: Tensor, rule: Arithmetic) -> Tensor:
    """Column by column with the scale of the block as it came: FP64 [N, G]."""
    step = numerics.element_scale(w_NG.float(), rule.rounding, rule.scale, rule.block_scale).double()
    current, out = w_NG.clone(), torch.empty_like(w_NG)
    for j in range(w_NG.shape[1]):
        column = current[:, j : j + 1]
        out[:, j : j + 1] = numerics.round_e2m1((column / step).float()).double() * step
        error = (column - out[:, j : j + 1]) / upper_GG[j, j]
        current[:, j + 1 :] -= error * upper_GG[j, j + 1 :]
    return out


def _inverse_factor(hessian_KK: Tensor) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped Hessian; FP64."""
    diagonal = hessian_KK.diagonal()
    damping = DAMPING * diagonal.mean()
    damped = hessian_KK + torch.diag(torch.full_like(diagonal, float(damping) if damping > 0 else 1.0))
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise UserError(
            "quantize.weights = gptq: a layer's inputs are not finite; check the calibration data"
        ) from error


@torch.no_grad()
def apply(model: torch.nn.Module, layer: Planned, hessian_KK: Tensor) -> dict[str, Any]:
    """Replace a quantized linear's weight by its GPTQ; collective over tensor parallelism.

    Args:
        model: This rank's GPTModel with calibrated quantizers.
        layer: One of its linears.
        hessian_KK: Of all of its input channels.

    Returns:
        For quantize.json: the weight's relative RMS error, and the output's on the calibration data, by rounding and by
        GPTQ, both with exact inputs.
    """
    linear = typed.linear(model, layer.module)
    rule, parameter = linear.weight_quantizer._quantizer_cache, linear.weight
    group = typed.tensor_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if is_row_parallel(linear):  # each rank takes some rows of the whole weight
        whole_NK = gather_from_tensor_model_parallel_region(parameter.detach())
        rows = torch.arange(len(whole_NK), device=whole_NK.device).tensor_split(size)[rank]
        w_NK = whole_NK[rows]
    else:
        w_NK = parameter.detach()
    y_NK = compensate(w_NK, hessian_KK, rule)
    facts = _facts(w_NK, y_NK, rule.fake(w_NK), hessian_KK)
    if is_row_parallel(linear):
        together = torch.zeros_like(whole_NK)
        together[rows] = y_NK
        dist.all_reduce(together, group=group)  # every row from one rank
        y_NK = together.chunk(size, dim=1)[rank]
    parameter.copy_(y_NK)
    return facts


def _facts(w_NK: Tensor, y_NK: Tensor, rounded_NK: Tensor, hessian_KK: Tensor) -> dict[str, Any]:
    h_KK = hessian_KK.double()

    def output(v: Tensor) -> Tensor:
        return ((v @ h_KK) * v).sum()

    w, y, rounded = w_NK.double(), y_NK.double(), rounded_NK.double()
    sums = torch.stack([(y - w).square().sum(), w.square().sum(), output(rounded - w), output(y - w), output(w)])
    dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    relative = (sums[[0, 2, 3]] / sums[[1, 4, 4]].clamp(min=1e-300)).sqrt().tolist()
    return {
        "weight_relative_rms_error": relative[0],
        "output_relative_rms_error": {"round": relative[1], "gptq": relative[2]},
    }
