"""How well the frozen scales still fit: per layer the error of rounding, the drift of the maximum, what is clipped.

One forward pass of one micro-batch through ModelOpt's own path, in which every quantizer shows its input and output;
training itself goes another way (fast_path.py) and is not touched. Under tensor parallelism shards add up; inputs that
all ranks hold are counted by each, which changes no share.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from halfbyte.training import companions
from halfbyte.training.config import Quantize
from halfbyte.training.data import MicroBatch
from halfbyte.training.quantize import SIDES, enabled_quantizers, gather_layers, plan
from halfbyte.training.schedule import collect

CHUNK = 1 << 24
"""Elements of one FP32 temporary (64 MiB)."""
CLIPPED = 1e-3
"""Share of a linear's input beyond the calibrated range from which on a run says so."""


@dataclass(frozen=True)
class Seen:
    """What one quantizer did with a tensor x, on the tensor's device.

    Attributes:
        sums: FP64 [4]: of (Q(x) - x)^2, of x^2, of |x| beyond what the scale (a learned one: of its block) represents
            (a count), of elements.
        amax: FP32 []: largest |x|.
        calibrated: FP32 []: the calibrated maximum; NaN where the format needs none.
    """

    sums: torch.Tensor
    amax: torch.Tensor
    calibrated: torch.Tensor


def see(x: torch.Tensor, rounded: torch.Tensor, limit: torch.Tensor | None, calibrated: torch.Tensor | None) -> Seen:
    """Compare a tensor with its rounded value, piece by piece, without waiting for the GPU.

    Args:
        x: Any shape and float dtype.
        rounded: Q(x), the same shape and dtype.
        limit: FP32 [] or x's shape: magnitude that is represented at most; None clips nothing.
        calibrated: [] calibrated maximum; None where there is none.
    """
    sums, amax = torch.zeros(4, dtype=torch.float64, device=x.device), torch.zeros((), device=x.device)
    values, fakes = x.flatten().split(CHUNK), rounded.flatten().split(CHUNK)
    limit = torch.full((), torch.inf, device=x.device) if limit is None else limit
    ends = limit.flatten().split(CHUNK) if limit.dim() else [limit] * len(values)
    for part, fake, end in zip(values, fakes, ends, strict=True):
        part = part.float()
        magnitude = part.abs()
        clipped = (magnitude > end).sum()
        error = (fake.float() - part).square().sum()
        sums += torch.stack([error, part.square().sum(), clipped, torch.full_like(error, part.numel())]).double()
        amax = torch.maximum(amax, magnitude.max())
    return Seen(sums, amax, torch.full_like(amax, torch.nan) if calibrated is None else calibrated.float())


def measure(model: torch.nn.Module, batch: MicroBatch, quantize: Quantize) -> dict[str, dict[str, dict[str, float]]]:
    """Statistics of every quantized linear; collective over all ranks.

    Args:
        model: This rank's GPTModel, calibrated, not wrapped.
        batch: What it reads; of data-parallel ranks each reads its own, and one of them is reported.
        quantize: The recipe's section.

    Returns:
        Layer key -> side (weight, input; only what is quantized) -> error (relative RMS ||Q(x) - x|| / ||x||), drift
        (largest magnitude over the calibrated one), clipped (share beyond what the scale represents); without drift
        and with nothing clipped where the format needs no calibration. In layer order, equal on every rank.
    """
    seen: dict[str, Seen] = {}
    with ExitStack() as hooks:
        for name, quantizer in enabled_quantizers(model):

            def look(module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor, name: str = name) -> None:
                rule = module._quantizer_cache
                calibrated = None if rule.scale is None else module.amax
                seen[name] = see(args[0].detach(), out.detach(), rule.represented(), calibrated)

            hooks.callback(quantizer.register_forward_hook(look).remove)
            linear, _, side = name.removesuffix("_quantizer").rpartition(".")
            if side == "weight":  # with its adapter, if it has one

                def whole(module: Any, args: Any, linear: str = linear) -> tuple[torch.Tensor]:
                    return (companions.weight_of(model, linear).to(args[0].dtype),)

                hooks.callback(quantizer.register_forward_pre_hook(whole).remove)
        collect(model, [batch], None)
    numbers = dict(zip(seen, _reduced(list(seen.values())), strict=True))
    mine = {}
    for layer in plan(model, quantize):
        quantizers = {side: f"{layer.module}.{side}_quantizer" for side in SIDES}
        mine[layer.key] = {side: numbers[name] for side, name in quantizers.items() if name in numbers}
    return gather_layers(mine)


def _reduced(seen: Sequence[Seen]) -> list[dict[str, float]]:
    """Of all tensor-parallel ranks together, with one copy to the host."""
    if not seen:
        return []
    group = parallel_state.get_tensor_model_parallel_group()
    sums = torch.stack([one.sums for one in seen])
    amax = torch.stack([torch.stack([one.amax, one.calibrated]) for one in seen])
    dist.all_reduce(sums, group=group)
    dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    rows = zip(sums.tolist(), amax.double().tolist(), strict=True)
    return [_shares(total, maxima) for total, maxima in rows]


def _shares(sums: list[float], maxima: list[float]) -> dict[str, float]:
    """Of Seen's sums, and of (largest magnitude, calibrated maximum)."""
    error, square, clipped, count = sums
    now, calibrated = maxima
    found = {"error": (error / max(square, 1e-30)) ** 0.5, "clipped": clipped / count}
    return found | ({"drift": now / calibrated} if calibrated > 0 else {})


def summary(layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Side -> mean error, largest error, largest drift and largest clipped share over all layers."""
    found = {}
    for side in SIDES:
        those = [layer[side] for layer in layers.values() if side in layer]
        if those:
            drifts = [one["drift"] for one in those if "drift" in one]
            found[side] = {
                "mean_error": sum(one["error"] for one in those) / len(those),
                "largest_error": max(one["error"] for one in those),
                "largest_clipped": max(one["clipped"] for one in those),
            } | ({"largest_drift": max(drifts)} if drifts else {})
    return found


def lines(layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A line about linears whose input has left its calibrated range, naming the worst; none while all is well."""
    inputs = {key: layer["input"] for key, layer in layers.items() if "input" in layer}
    beyond = {key: one for key, one in inputs.items() if one["clipped"] > CLIPPED}
    if not beyond:
        return []
    worst = max(beyond, key=lambda key: beyond[key]["clipped"])
    more = f" (and {len(beyond) - 1} more layers)" if len(beyond) > 1 else ""
    return [
        f"the input of {worst} reaches {beyond[worst]['drift']:.2f} x its calibrated maximum, "
        f"{beyond[worst]['clipped']:.2%} of it is clipped{more}"
    ]
