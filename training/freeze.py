"""Parameters that training leaves as they are (train.freeze), by the names of their Hugging Face modules."""

import torch
from megatron.core.models.gpt import GPTModel

from halfbyte.training import companions, typed
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import FUSED
from halfbyte.training.shape import NORMS, excluded

OUTSIDE = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
}
"""Megatron's modules outside of the layers -> the Hugging Face modules that each holds."""
TIED = ("model.embed_tokens", "lm_head")


def freeze(model: GPTModel, patterns: list[str], *, recompute: bool) -> int:
    """Take the parameters that a pattern names out of training: no gradient, no optimizer state, no weight decay.

    Their linears are still fake-quantized, and gradients pass through them to what lies before.

    Args:
        model: This rank's GPTModel, not yet wrapped in DDP; changed in place.
        patterns: fnmatch patterns on Hugging Face module names.
        recompute: Whether layers are recomputed in the backward pass.

    Returns:
        How many elements of this rank are frozen.

    Raises:
        UserError: a pattern splits a fused linear or tied embeddings, or nothing is left to train here.
    """
    frozen = 0
    for name, parameter in model.named_parameters():
        if companions.owns(name):
            continue
        modules = hf_modules(model, name)
        out = {excluded(module, patterns) for module in modules}
        if len(out) > 1:
            raise UserError(f"train.freeze splits {', '.join(modules)}: they are one parameter; freeze all or none")
        if out == {True}:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("train.freeze leaves a pipeline stage nothing to train; shorten it, or use fewer stages")
    if recompute and model.pre_process and not model.embedding.word_embeddings.weight.requires_grad:
        model.embedding.register_forward_hook(_start_graph)
    return frozen


def _start_graph(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
    """A recomputed layer gets gradients only if its input wants one, which that of a frozen embedding does not."""
    if torch.is_grad_enabled():
        out.requires_grad_()


def hf_modules(model: GPTModel, name: str) -> tuple[str, ...]:
    """The Hugging Face modules whose parameters one of Megatron's holds.

    Args:
        model: This rank's GPTModel.
        name: Name of a parameter; layers count from this pipeline stage.
    """
    module = name.rpartition(".")[0]
    if module in OUTSIDE:
        found = OUTSIDE[module]
        return TIED if model.share_embeddings_and_output_weights and found[0] in TIED else found
    _, _, local, inside = module.split(".", 3)
    number = typed.layers(model)[int(local)].layer_number - 1
    parts = FUSED[inside] if inside in FUSED else (NORMS[inside],)
    return tuple(f"model.layers.{number}.{part}" for part in parts)
