"""A world of one inside the test process, left as it was found; test files load this with runpy."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from halfbyte.training import environment, model, runtime
from halfbyte.training.config import Recipe
from halfbyte.training.data import MicroBatch
from halfbyte.training.runtime import Runtime
from halfbyte.training.shape import ModelShape

SHAPE = ModelShape(
    layers=2,
    hidden=64,
    ffn=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=64,
    tied=False,
    max_positions=32,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    norm_eps=1e-5,
)
CUDA = (
    *("current_device", "synchronize", "empty_cache", "manual_seed", "get_rng_state", "set_rng_state"),
    *("current_stream", "Stream", "stream"),
)
"""What runtime.py answers in CUDA's place on a machine without it."""


@contextlib.contextmanager
def world_of_one() -> Iterator[Runtime]:
    """An open runtime in FP32 on the CPU, also where a GPU is; afterwards torch and the environment are restored."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        before = dict(os.environ)
        environment.set_process_environment()
        for name in CUDA:  # noted by the patch, which puts the old value back
            patch.setattr(torch.cuda, name, getattr(torch.cuda, name))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cpu.Stream, "wait_stream", getattr(torch.cpu.Stream, "wait_stream", None), raising=False)
        host = runtime._HostDevice()
        patch.setattr(runtime, "_HostDevice", lambda: host)
        opened = runtime.open_runtime(Recipe())
        try:
            yield opened
        finally:
            runtime.close_runtime()
            host.__exit__(None, None, None)
            for name in set(os.environ) - set(before):
                del os.environ[name]


def batches(seed: int = 3) -> list[MicroBatch]:
    """Two micro-batches of two random rows of twelve tokens, all with loss."""
    windows = torch.randint(0, 64, (2, 2, 13), generator=torch.Generator().manual_seed(seed))
    return [MicroBatch(w[:, :-1], w[:, 1:], torch.ones(2, 12), None) for w in windows]


def training(opened: Runtime, recipe: Recipe, *, shape: ModelShape = SHAPE) -> Any:
    """A Training module of a random model, calibrated on one micro-batch, with what Lightning's trainer would give."""
    from halfbyte.training import quantize
    from halfbyte.training.module import Training

    gpt = random_model(opened, recipe, shape=shape)
    run = batches()[0].tokens
    quantize.quantize(gpt, recipe, lambda stage: stage(run, torch.arange(12).expand_as(run), None))
    module = Training(gpt, teacher=None, recipe=recipe, runtime=opened, data=None)
    module.optimizers, module.log_dict = lambda: module.optimizer, lambda values, **_: None
    return module


def random_model(opened: Runtime, recipe: Recipe, *, seed: int = 0, shape: ModelShape = SHAPE) -> torch.nn.Module:
    """A GPTModel with random weights."""
    gpt = model.build(shape, recipe, opened)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(gpt.named_parameters()):
            center, std = (0.0, 0.1) if parameter.dim() == 2 else (1.0, 0.1)
            parameter.normal_(center, std, generator=generator)
    return gpt
