"""Smoothing: outliers move from a linear's inputs into its weight; the model's function stays as it is.

Each input channel k of a linear is divided by s_k and the weight's column k multiplied by it. The division is folded
into what makes the channel, so that nothing is left to do at run time and the checkpoint looks like any other:

    linear                      the channel's maker                       s
    qkv, gate and up            the weight of the RMSNorm before it       per channel of the hidden size
    output projection           the value projection's rows and bias      per channel of a key/value head, which the
                                                                          query heads of its group share
    down projection             the up projection's rows                  per channel of the intermediate size

* smoothquant (arXiv 2211.10438, equation 4): s_k = max|x_k|^alpha / max|w_k|^(1 - alpha), to the nearest power of two.
* awq_lite (arXiv 2306.00978, section 3.2): s_k = mean|x_k|^alpha, alpha in 0, 0.1, ... 1 by the smallest squared error
  of the layer's output on calibration inputs, here with weight and input rounded as the recipe says; to the nearest
  power of two.
* awq_duo: s_k = mean|x_k|^alpha / rms(w_k)^beta, both exponents by the same search, alpha in 0, 0.2, ... 1, beta in 0,
  0.25, 0.5, 0.75; to the nearest eighth of a power of two. (AutoAWQ's duo scaling is the case beta = 1 - alpha.)

Where s_k is a power of two every product is the same number times a power of two, so norm, values, activations and
logits of the smoothed BF16 model are those of the original one, bit for bit. Eighths follow the outliers more closely;
the smoothed weights are then rounded to BF16 once more. Both grids make s the same in every layout, whose sums differ
in their last bits.

Shapes: T tokens, N output channels, K input channels, both of this tensor-parallel rank unless said otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from halfbyte.training import typed
from halfbyte.training.arithmetic import Arithmetic
from halfbyte.training.config import Activations, Quantize, Smoothing
from halfbyte.training.errors import UserError
from halfbyte.training.formats import GRIDS, SPECS
from halfbyte.training.observe import Percentiles, is_row_parallel, observe, whole_input
from halfbyte.training.quantize import Planned, gather_layers

SAMPLE_TOKENS = 512
"""Tokens on which awq_lite compares outputs: the first of the calibration data."""
EXPONENTS = {
    Smoothing.awq_lite: [(i / 10, 0.0) for i in range(11)],
    Smoothing.awq_duo: [(i / 5, j / 4) for i in range(6) for j in range(4)],
}
"""Pairs (alpha, beta) that are compared; of equally good ones the first is taken."""
STEPS = {Smoothing.smoothquant: 1, Smoothing.awq_lite: 1, Smoothing.awq_duo: 8}
"""Values of s per power of two."""
LARGEST = 2.0**20
"""Bound of s and 1/s: far from both ends of BF16's range."""


@dataclass
class Channels:
    """What smoothing needs to know about the inputs of one linear.

    Attributes:
        amax: FP64 [K] largest magnitude per channel.
        total: FP64 [K] sum of magnitudes per channel.
        tokens: How many.
        sample: Pieces [T, K] of the first tokens, of all ranks' tokens; empty unless asked for.
        sampled: Tokens in them.
    """

    amax: torch.Tensor
    total: torch.Tensor
    tokens: int = 0
    sample: list[torch.Tensor] = field(default_factory=list)
    sampled: int = 0


class Watch:
    """Collects Channels of every linear that it is shown."""

    def __init__(self, model: torch.nn.Module, sample_tokens: int):
        self.model, self.sample_tokens = model, sample_tokens
        self.channels: dict[str, Channels] = {}

    def take(self, layer: Planned, x: torch.Tensor) -> None:
        """Add one micro-batch [S, B, K]."""
        x_TK = x.flatten(0, 1)
        if layer.key not in self.channels:
            zero = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
            self.channels[layer.key] = Channels(zero, zero.clone())
        known = self.channels[layer.key]
        magnitude_TK = x_TK.abs()
        known.amax = torch.maximum(known.amax, magnitude_TK.amax(0).double())
        known.total += magnitude_TK.double().sum(0)
        known.tokens += len(x_TK)
        if known.sampled < self.sample_tokens:
            linear = self.model.get_submodule(layer.module)
            piece = x_TK if is_row_parallel(linear) else whole_input(linear, x)
            known.sample.append(piece.clone())
            known.sampled += len(piece)


def smooth(
    model: torch.nn.Module, planned: Sequence[Planned], section: Quantize, run: Callable[[torch.nn.Module], None]
) -> dict[str, dict[str, Any]]:
    """Smooth the planned linears in place, where the recipe asks for it; collective.

    Args:
        model: This rank's GPTModel, without quantizers.
        planned: The linears that will be quantized; their partners are scaled, too.
        section: The recipe's section.
        run: Runs the calibration windows through the model it is given.

    Returns:
        Layer key -> {"alpha": the inputs' exponent, "beta": the weight's (awq_duo only), "least", "most": the smallest
        and largest s}, of all pipeline stages; empty without smoothing.

    Raises:
        UserError: an input is not finite.
    """
    if section.smoothing is Smoothing.none:
        return {}
    watch = Watch(model, 0 if section.smoothing is Smoothing.smoothquant else SAMPLE_TOKENS)
    observe(model, planned, run, [watch.take])
    chosen: dict[str, tuple[dict[str, float], torch.Tensor]] = {}
    with torch.no_grad():
        for layer in planned:  # all from the original weights, before any is changed
            site = _Site.of(model, layer, watch.channels[layer.key])
            if section.smoothing is Smoothing.smoothquant:
                alpha = section.smoothing_alpha
                chosen[layer.key] = {"alpha": alpha}, site.smoothquant(alpha)
            else:
                chosen[layer.key] = site.search(layer, section)
        for layer in planned:
            _fold(model, layer, chosen[layer.key][1])
    return gather_layers({key: exponents | _ends(s_K) for key, (exponents, s_K) in chosen.items()})


def _ends(s_K: torch.Tensor) -> dict[str, float]:
    ends = torch.stack([s_K.amax(), (1 / s_K).amax()])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return {"least": float(1 / ends[1]), "most": float(ends[0])}


@dataclass
class _Site:
    """One linear with the statistics of its input, reduced over the tensor-parallel ranks.

    Attributes:
        weight: [N, K].
        row_parallel: Whether K is split over the ranks; else N is.
        x_amax, x_mean, w_amax, w_rms: FP64 [K]; where channels must share one s, equal among them.
        sample: [T, K] inputs, or None.
    """

    weight: torch.Tensor
    row_parallel: bool
    x_amax: torch.Tensor
    x_mean: torch.Tensor
    w_amax: torch.Tensor
    w_rms: torch.Tensor
    sample: torch.Tensor | None

    @classmethod
    def of(cls, model: torch.nn.Module, layer: Planned, seen: Channels) -> "_Site":
        linear = typed.linear(model, layer.module)
        weight, row_parallel = linear.weight, is_row_parallel(linear)
        amax, total, w_amax = seen.amax, seen.total, weight.abs().amax(0).double()
        squares, rows, tokens = weight.double().square().sum(0), _number(len(weight), amax), _number(seen.tokens, amax)
        if not row_parallel:
            # Ranks hold parts of the tokens (sequence parallelism) or all of them; sums over sums serve both.
            group = parallel_state.get_tensor_model_parallel_group()
            for value in (amax, w_amax):
                dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
            for value in (total, tokens, squares, rows):
                dist.all_reduce(value, group=group)
        if not amax.isfinite().all():
            raise UserError(
                f"quantize.smoothing: the inputs of {layer.key} are not finite on the calibration data; check it and "
                "the weights"
            )
        values = amax, total / tokens, w_amax, (squares / rows).sqrt()
        if layer.module.endswith("linear_proj"):
            config: Any = model.config
            heads_per_group = config.num_attention_heads // config.num_query_groups
            values = tuple(_shared(value, heads_per_group, config.kv_channels) for value in values)
        return cls(weight, row_parallel, *values, sample=torch.cat(seen.sample) if seen.sample else None)

    def smoothquant(self, alpha: float) -> torch.Tensor:
        """SmoothQuant's s: FP64 [K]; 1 for channels that are never used."""
        used = self.x_amax * self.w_amax > 0
        return _on_grid(self.x_amax**alpha / self.w_amax ** (1 - alpha), used, STEPS[Smoothing.smoothquant])

    def search(self, layer: Planned, section: Quantize) -> tuple[dict[str, float], torch.Tensor]:
        """AWQ's exponents and s: FP64 [K]. Collective over tensor parallelism."""
        assert self.sample is not None
        duo = section.smoothing is Smoothing.awq_duo
        used = (self.x_mean > 0) & (self.w_rms > 0) if duo else self.x_mean > 0
        x_K, w_K = self._centred(self.x_mean, used), self._centred(self.w_rms, used)
        x_TK = self.sample.to(torch.promote_types(self.sample.dtype, torch.float32))
        w_NK = self.weight.to(x_TK.dtype)
        right_TN = self._output(x_TK, w_NK)
        best: tuple[float, dict[str, float], torch.Tensor] | None = None
        for alpha, beta in EXPONENTS[section.smoothing]:
            s_K = _on_grid(x_K**alpha / w_K**beta, used, STEPS[section.smoothing])
            error = self._error(x_TK, w_NK, right_TN, s_K, layer, section)
            if best is None or error < best[0]:
                best = error, {"alpha": alpha} | ({"beta": beta} if duo else {}), s_K
        assert best is not None
        return best[1], best[2]

    def _centred(self, value_K: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """[K] over the geometric middle of its largest and smallest used value, so that s is about 1; else 1."""
        value_K = torch.where(used, value_K, 1.0)
        ends = torch.stack([value_K[used].amax(), (1 / value_K[used]).amax()]) if used.any() else value_K.new_zeros(2)
        self._reduce(ends, dist.ReduceOp.MAX)
        middle = (ends[0] / ends[1].clamp(min=1e-300)).clamp(min=1e-300).sqrt()
        return torch.where(used, value_K / middle, 1.0)

    def _error(
        self,
        x_TK: torch.Tensor,
        w_NK: torch.Tensor,
        right_TN: torch.Tensor,
        s_K: torch.Tensor,
        layer: Planned,
        section: Quantize,
    ) -> float:
        """Squared error of the output with s: both sides scaled, inputs clipped as by recipe, and rounded."""
        w_amax, x_amax = (w_NK * s_K).abs().amax().float(), (self.x_amax / s_K).amax().float()
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(w_amax, dist.ReduceOp.MAX, group=group)
        self._reduce(x_amax, dist.ReduceOp.MAX)
        w_NK = Arithmetic.of("weight", SPECS[layer.format].weights, w_amax, section).fake((w_NK * s_K).to(w_NK.dtype))
        x_TK = (x_TK / s_K).to(x_TK.dtype)
        inputs = SPECS[layer.format].inputs
        if inputs is not None:
            if section.activations is Activations.percentile and GRIDS[inputs].per_tensor:
                seen = Percentiles()
                seen.take(layer, x_TK)
                x_amax = torch.minimum(x_amax, seen.amax(section.percentile)[layer.key])
            x_TK = Arithmetic.of("input", inputs, x_amax, section).fake(x_TK)
        error = (self._output(x_TK, w_NK) - right_TN).square().sum().double()
        if not self.row_parallel:
            dist.all_reduce(error, group=group)
        return float(error)

    def _output(self, x_TK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        out_TN = x_TK @ w_NK.T
        self._reduce(out_TN, dist.ReduceOp.SUM)
        return out_TN

    def _reduce(self, value: torch.Tensor, op: Any) -> None:
        """Over the parts of K, where it is split."""
        if self.row_parallel:
            dist.all_reduce(value, op, group=parallel_state.get_tensor_model_parallel_group())


def _on_grid(s_K: torch.Tensor, used: torch.Tensor, steps: int) -> torch.Tensor:
    """FP64 [K], each to the nearest of `steps` values per power of two, by ratio; 1 where a channel is not used."""
    s_K = torch.where(used, s_K, 1.0).clamp(1 / LARGEST, LARGEST)
    return torch.exp2((s_K.log2() * steps).round() / steps)


def _number(value: int, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=like.device)


def _shared(value_K: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """The maximum over the query heads of each key/value group, for every one of them: [K] -> [K]."""
    grouped = value_K.view(-1, heads, head_dim)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)


def _fold(model: torch.nn.Module, layer: Planned, s_K: torch.Tensor) -> None:
    """Multiply the linear's columns by s, and divide what makes its input channels, biases included."""
    prefix, _, name = layer.module.rpartition(".")
    block: Any = model.get_submodule(prefix.rpartition(".")[0])
    typed.linear(model, layer.module).weight.mul_(s_K)
    if name == "linear_qkv":
        block.input_layernorm.weight.div_(s_K)
    elif name == "linear_fc1":
        block.pre_mlp_layernorm.weight.div_(s_K)
    elif name == "linear_fc2":
        block.mlp.linear_fc1.weight.chunk(2)[1].div_(s_K.unsqueeze(-1))
    else:
        config: Any = model.config
        per_group = config.num_attention_heads // config.num_query_groups
        qkv = block.self_attention.linear_qkv
        made_by = [qkv.weight] if qkv.bias is None else [qkv.weight, qkv.bias.unsqueeze(-1)]
        for rows in made_by:  # by key/value head: its query heads, its keys, its values
            values = rows.view(-1, per_group + 2, config.kv_channels, rows.shape[-1])[:, -1]
            values.div_(s_K.view(-1, per_group, config.kv_channels)[:, 0].unsqueeze(-1))
