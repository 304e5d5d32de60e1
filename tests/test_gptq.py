"""GPTQ of one weight against a dense reference with explicit inverses, and its laws."""

import pytest
import torch

from halfbyte.training import numerics
from halfbyte.training.config import BlockScale, Format, Quantize, SecondScale
from halfbyte.training.formats import GRIDS

pytestmark = pytest.mark.slow  # imports Megatron-Core and ModelOpt
RULES = [
    (Format.nvfp4, BlockScale.amax, SecondScale.pow2),
    (Format.nvfp4, BlockScale.four_over_six, SecondScale.amax),
    (Format.nvfp4, BlockScale.mse, SecondScale.pow2),
    (Format.mxfp4, BlockScale.amax, SecondScale.pow2),
    (Format.mxfp4, BlockScale.mse, SecondScale.pow2),
]


def rule_of(w: torch.Tensor, number_format: Format, block_scale: BlockScale, mode: SecondScale):
    from halfbyte.training.arithmetic import Arithmetic

    section = Quantize(format=number_format, block_scale=block_scale, scale_2=mode)
    return Arithmetic.of("weight", number_format, w.abs().amax(), section)


def problem(seed: int, rows: int = 24, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, X^T X) with correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(512, columns, generator=generator) @ mix * torch.linspace(0.1, 3, columns)
    return torch.randn(rows, columns, generator=generator), x.T @ x


def eliminate(w: torch.Tensor, h: torch.Tensor, start: int, choose) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fix a block's columns one after the other to choose(column number, its weights), by the inverse of what is left.

    Optimal Brain Surgeon (arXiv 2208.11580, equations 2 and 3): (weights, values of the block, error per row).
    """
    w, values, loss = w.clone(), [], torch.zeros(len(w), dtype=torch.float64)
    for j in range(start, start + choose.width):
        inverse = torch.linalg.inv(h[j:, j:])
        value = choose(j - start, w[:, j])
        error = (w[:, j] - value) / inverse[0, 0]
        loss += (w[:, j] - value) ** 2 / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        values.append(value)
    return w, torch.stack(values, 1), loss


class Fixed:
    def __init__(self, values: torch.Tensor):
        self.values, self.width = values, values.shape[1]

    def __call__(self, j: int, column: torch.Tensor) -> torch.Tensor:
        return self.values[:, j]


class Nearest:
    def __init__(self, step: torch.Tensor, width: int):
        self.step, self.width = step[:, 0].double(), width
        self.grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)

    def __call__(self, j: int, column: torch.Tensor) -> torch.Tensor:
        index = ((column / self.step).abs()[:, None] - self.grid).abs().argmin(1)
        return self.grid[index] * column.sign() * self.step


def reference(w: torch.Tensor, h: torch.Tensor, rule) -> torch.Tensor:
    h = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(len(h))
    w, block, out = w.double(), GRIDS[rule.rounding].block, []
    for start in range(0, w.shape[1], block):
        here = w[:, start : start + block]
        step = numerics.element_scale(here.float(), rule.rounding, rule.scale, rule.block_scale)
        aware = rule.fake(eliminate(w, h, start, Nearest(step, block))[1].float()).double()
        plain = rule.fake(here.float()).double()
        one, two = eliminate(w, h, start, Fixed(aware)), eliminate(w, h, start, Fixed(plain))
        better = (one[2] < two[2])[:, None]
        w = torch.where(better, one[0], two[0])
        out.append(torch.where(better, aware, plain))
    return torch.cat(out, 1)


@pytest.mark.parametrize("case", RULES)
def test_it_equals_the_dense_reference(case):
    from halfbyte.training.gptq import compensate

    w, h = problem(1)
    rule = rule_of(w, *case)
    assert torch.equal(compensate(w.double(), h, rule), reference(w, h, rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", RULES)
def test_fake_quantization_leaves_it_alone_and_the_output_is_closer(case, dtype):
    from halfbyte.training.gptq import compensate

    for seed in range(3):
        w, h = problem(seed, 128, 256)
        w = w.to(dtype)
        rule = rule_of(w, *case)
        y = compensate(w, h, rule)
        if dtype is torch.float32 or case[2] is SecondScale.pow2:
            assert torch.equal(rule.fake(y), y)
        else:  # a BF16 weight holds such values rounded; packing them again finds the same codes
            assert torch.equal(rule.fake(y.float()).bfloat16(), y)
        plain, aware = (
            ((v.double() - w.double()) @ h.double() * (v.double() - w.double())).sum() for v in (rule.fake(w), y)
        )
        assert aware < 0.9 * plain


@pytest.mark.parametrize("case", RULES)
def test_independent_inputs_leave_nothing_to_compensate(case):
    from halfbyte.training.gptq import compensate

    w, _ = problem(4)
    rule = rule_of(w, *case)
    y = compensate(w, torch.diag(torch.linspace(0, 5, w.shape[1])), rule)
    assert torch.equal(y, rule.fake(w))
