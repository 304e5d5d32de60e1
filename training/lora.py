"""LoRA with fake quantization: train.lora. The base weights are frozen, and W + alpha/r B A is what is quantized.

Every forward pass computes with the rounded sum, so what is trained is what is merged, quantized and shipped.
low_rank.py has the arithmetic, companions.py says where the gradients of A and B come from: the weight's gradient is
collected in a buffer of its own, which no data-parallel rank sums and no optimizer knows.

Shapes: P matrices that a weight stacks (gate over up: 2, else 1), R rows of each, N = P R; K input channels, r rank.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from halfbyte.training import companions, low_rank
from halfbyte.training.companions import Companion, Companions
from halfbyte.training.config import Recipe
from halfbyte.training.observe import is_row_parallel
from halfbyte.training.quantize import plan
from halfbyte.training.shape import excluded


class Adapter(Companion):
    """A [r, K] and B [P, R, r] beside one weight, FP32 (FP64 in float64 runs), and `factor`, alpha / r.

    Tensor parallelism splits what belongs to the split side of the weight; the other factor is whole on every rank.
    """

    kind = companions.ADAPTERS

    def __init__(self, key: str, a_rK: torch.Tensor, b_Nr: torch.Tensor, factor: float, *, row_parallel: bool):
        super().__init__(key)
        self.row_parallel = row_parallel
        self.a = self.hold("a", a_rK, 1 if row_parallel else None)
        b_PRr = b_Nr.view(companions.parts_of(key), -1, b_Nr.shape[1])
        self.b = self.hold("b", b_PRr, None if row_parallel else 1)
        self.factor: torch.Tensor
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float64))  # for who reads the checkpoint
        self.axes["factor"] = None

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The frozen weight [N, K] and its change, in the factors' dtype."""
        return low_rank.merge(weight, self.b.flatten(0, 1), self.a, float(self.factor))

    def take_gradient(self, linear: Any, weight: Callable[[], torch.Tensor]) -> None:
        """See Companion; quantize.clip_gradient leaves out what lies outside of the format's range."""
        grad_NK, limit = companions.collected(linear).to(self.a.dtype), linear.weight_quantizer._quantizer_cache.end()
        if limit is not None:
            grad_NK = grad_NK.masked_fill(weight().abs() > limit, 0.0)
        grad_Nr, grad_rK = low_rank.gradients(grad_NK, self.b.flatten(0, 1), self.a, float(self.factor))
        # The factor that every rank holds whole has met only a part of the weight here.
        whole = grad_Nr if self.row_parallel else grad_rK
        dist.all_reduce(whole, group=parallel_state.get_tensor_model_parallel_group())
        self.a.main_grad.copy_(grad_rK)
        self.b.main_grad.copy_(grad_Nr.view_as(self.b))


def attach(model: torch.nn.Module, recipe: Recipe) -> None:
    """Give every quantized linear that train.lora names its adapter, which changes nothing yet: B is 0. Idempotent.

    A is uniform in +-1/sqrt(K) (Kaiming, as in the paper's code), drawn for the whole K from train.seed and the layer's
    name: the same under any layout.

    Args:
        model: This rank's GPTModel, calibrated, not yet wrapped in DDP; changed in place.
        recipe: Its train.lora.rank says whether, 0 for no.
    """
    settings = recipe.train.lora
    if not settings.rank:
        return
    beside = companions.of(model) or Companions()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for layer in plan(model, recipe.quantize):
        if not excluded(layer.hf[0], settings.targets) or beside.of(Adapter.kind, layer.module) is not None:
            continue
        linear: Any = model.get_submodule(layer.module)
        row_parallel, weight = is_row_parallel(linear), linear.weight
        size = parallel_state.get_tensor_model_parallel_world_size() if row_parallel else 1
        a_rK = _initial(settings.rank, weight.shape[1] * size, f"{recipe.train.seed} {layer.key}")
        place = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        a_rK = a_rK.chunk(size, dim=1)[rank if row_parallel else 0].to(**place).contiguous()
        b_Nr = torch.zeros(weight.shape[0], settings.rank, **place)
        factor = settings.alpha / settings.rank
        beside.put(layer.module, Adapter(layer.key, a_rK, b_Nr, factor, row_parallel=row_parallel))
    model.add_module(companions.NAME, beside)


def _initial(rank: int, channels: int, name: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(rank, channels, generator=generator) - 1) / channels**0.5


def collect_gradients(model: torch.nn.Module) -> None:
    """From now on the frozen weights with an adapter collect their gradients.

    Args:
        model: This rank's GPTModel, wrapped in DDP and given to the optimizer, which must both take these weights for
            frozen ones.
    """
    for linear in _adapted(model):
        linear.weight.requires_grad_(True)
        if linear.gradient_accumulation_fusion:
            linear.weight.main_grad = torch.zeros_like(linear.weight, dtype=torch.float32)
        else:
            linear.weight.grad = torch.zeros_like(linear.weight)


def zero_gradients(model: torch.nn.Module) -> None:
    """Before a global batch: what DDP does for the parameters that it knows."""
    for linear in _adapted(model):
        companions.collected(linear).zero_()


def _adapted(model: torch.nn.Module) -> list[Any]:
    """The linears that have an adapter."""
    beside = companions.of(model)
    each = () if beside is None else beside.each()
    return [model.get_submodule(module) for module, companion in each if isinstance(companion, Adapter)]
