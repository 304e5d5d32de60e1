"""A model with random weights that are the same under every layout, so that losses of two layouts can be compared."""

import re
import zlib

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from halfbyte.training import model, typed
from halfbyte.training.config import Recipe
from halfbyte.training.runtime import Runtime
from halfbyte.training.shape import ModelShape

STD = 0.02
"""Standard deviation of the matrices."""
GATED = "mlp.linear_fc1.weight"
"""A rank holds its part of the gate over its part of the up projection, not a part of the two stacked."""


def random_model(shape: ModelShape, plan: Recipe, runtime: Runtime) -> GPTModel:
    """This rank's part of a model with random matrices and norms of one.

    A matrix is drawn whole from a generator seeded by its name in the whole model, and this rank keeps its part. CPU
    and GPU draw different numbers.
    """
    gpt = model.build(shape, plan, runtime)
    before = typed.layers(gpt)[0].layer_number - 1  # in earlier stages
    with torch.no_grad():
        for local, parameter in gpt.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            name = re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + before), local)
            generator = torch.Generator(runtime.device).manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(_own_part(name, parameter, generator))
    return gpt


def _own_part(name: str, parameter: torch.nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """[n, k] this rank's part of the matrix [N, K], of which Megatron splits one axis."""
    axis, parts = parameter.partition_dim, parallel_state.get_tensor_model_parallel_world_size()
    size = list(parameter.shape)
    size[axis] *= parts
    whole = torch.empty(size, dtype=parameter.dtype, device=parameter.device).normal_(0.0, STD, generator=generator)
    rank = parallel_state.get_tensor_model_parallel_rank()
    if name.endswith(GATED):
        return whole.unflatten(0, (2, -1)).chunk(parts, 1)[rank].flatten(0, 1)
    return whole.chunk(parts, axis)[rank]
