"""How a Llama-family model's tensors are named and fused: Hugging Face on one side, Megatron-Core on the other."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HFWeight:
    """One tensor of the trained model in Hugging Face naming, complete (not a shard).

    Attributes:
        name: Tensor name, e.g. `model.layers.0.mlp.up_proj.weight`.
        tensor: The training-time parameter, any float dtype; [N, K] for a linear (N = out, K = in).
        quantized: Whether the training-time model fake-quantizes it.
        weight_amax: FP32 [] calibrated absolute maximum of the (fused) weight; None where the format needs none.
        input_amax: FP32 [] calibrated absolute maximum of the input; None for weight-only formats and MXFP4.
    """

    name: str
    tensor: torch.Tensor
    quantized: bool = False
    weight_amax: torch.Tensor | None = None
    input_amax: torch.Tensor | None = None
