"""Weight gradients straight into Megatron's FP32 `main_grad`, and Adam in one pass, without Apex or TransformerEngine.

Megatron-Core fuses the accumulation into the weight-gradient GEMM only where Apex's extension is installed. torch can
do the same since 2.11: addmm with BF16 operands and an FP32 accumulator (pytorch#167931). It saves a BF16 rounding of
every micro-batch's gradient and one pass over the gradients (10 bytes per parameter and micro-batch).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers


def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T @ total_input.

    Args:
        total_input: [T, K] input of the linear, BF16 or FP32.
        grad_output: [T, N] gradient of its output, the same dtype.
        main_grad: FP32 [N, K], changed in place.
    """
    if total_input.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), total_input)
    elif main_grad.is_cuda:
        torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), total_input.to(main_grad.dtype))


def fuse(model: torch.nn.Module) -> None:
    """From now on the parallel linears of `model` accumulate their weight gradients in place.

    Args:
        model: Wrapped in Megatron's DDP already: every trained parameter has an FP32 `main_grad`.
    """
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    for module in model.modules():
        if isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            module.gradient_accumulation_fusion = True


class Leaves:
    """Trained parameters as leaves of a pass's own: Megatron's hooks, which a graph cannot replay, see none of them.

    So that a hook runs, a fused linear (`fuse`) hands autograd a tensor of the weight's size that nobody reads; a
    captured pass would keep every one. A leaf has no hook, and gets none where a linear has added the gradient already.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        """Made inside of fast_path.weights_once, and valid as long as the parameters keep their addresses.

        Args:
            modules: All of a model's, wrapped in Megatron's DDP already.
        """
        self._own: list[tuple[dict[str, Any], str, torch.nn.Parameter, torch.Tensor]] = []
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad:
                    continue
                own = parameter.detach().requires_grad_()
                if hasattr(parameter, "main_grad"):
                    own.main_grad = parameter.main_grad  # type: ignore[attr-defined] - Megatron's linears add to it
                self._own.append((vars(module), name, parameter, own))

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, forward passes read the leaves where fast_path.weights_once shows the parameters."""
        for names, name, parameter, own in self._own:
            assert names[name] is parameter
            names[name] = own
        try:
            yield
        finally:
            for names, name, parameter, _ in self._own:
                names[name] = parameter

    def add_gradients(self) -> None:
        """After a backward pass: what no linear added to `main_grad` itself goes where Megatron's hooks put it."""
        for _, _, parameter, own in self._own:
            if own.grad is not None:
                place = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
                place.add_(own.grad)  # type: ignore[union-attr]
                own.grad = None


def fuse_adam(adam: torch.optim.Optimizer) -> None:
    """Update all parameters in one kernel on the GPU: 28 bytes of traffic a parameter instead of about 80.

    Megatron builds torch's AdamW with its default, a dozen passes over all parameters. To be called again after a
    state was loaded, which brings its own groups.

    Args:
        adam: torch.optim.AdamW; on the CPU nothing changes.
    """
    for group in adam.param_groups:
        if all(parameter.is_cuda for parameter in group["params"]):
            group["fused"], group["foreach"] = True, False


def fuse_clipping() -> None:
    """From now on Megatron's gradient norm and clipping take all tensors at once.

    Without Apex it reads the norm of every tensor back to the host by itself (hundreds of synchronizations a step) and
    scales them one by one through a copy.
    """
    clip_grads.l2_norm_impl = _norm
    clip_grads.multi_tensor_scale_impl = _scale


def _norm(chunk: int, flag: Any, lists: Sequence[Sequence[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    """FP32 [1] L2 norm of all tensors of one list, from their own norms; called as Apex's kernel is."""
    (tensors,) = lists
    return torch.stack(torch._foreach_norm(list(tensors))).norm().float().view(1), None


def _scale(chunk: int, flag: Any, lists: Sequence[Sequence[torch.Tensor]], factor: float) -> None:
    """Second list = first list * factor; Megatron gives it the same list twice."""
    sources, places = (list(tensors) for tensors in lists)
    if any(source is not place for source, place in zip(sources, places, strict=True)):
        torch._foreach_copy_(places, sources)
    torch._foreach_mul_(places, factor)


def clip(optimizer: Any, norm: float) -> None:
    """Scale an optimizer's gradients to its config.clip_grad at most, by their norm over all ranks; 0: no clipping."""
    for part in parts(optimizer):
        if part.config.clip_grad > 0:
            clip_grads.clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)


def parts(optimizer: Any) -> list[Any]:
    """The optimizers of a Megatron optimizer: one, or a chain."""
    return optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]
