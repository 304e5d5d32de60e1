"""CUDA graphs: where they are used, what keeps its address for them, and that a replayed step is the plain one."""

import contextlib
import itertools
import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import BlockScale, Recipe
from halfbyte.training.formats import Rounding
from halfbyte.training.hardware import GPUS, REACHED
from halfbyte.training.numerics import fake_quantize, fake_quantize_into
from halfbyte.training.shape import ModelShape

WORKERS = Path(__file__).with_name("workers")
SMALL = ModelShape(
    layers=4,
    hidden=128,
    ffn=256,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=256,
    tied=True,
    max_positions=512,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    norm_eps=1e-5,
)


@pytest.mark.parametrize("rounding", [Rounding.nvfp4, Rounding.mxfp4, Rounding.fp8])
def test_rounding_into_a_tensor_is_rounding(rounding):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = None if rounding is Rounding.mxfp4 else torch.tensor(0.01)
    out = torch.empty_like(x)
    assert fake_quantize_into(x, out, rounding, scale, BlockScale.amax) is out
    assert torch.equal(out, fake_quantize(x, rounding, scale))


@contextlib.contextmanager
def quantized():
    """A tiny GPTModel calibrated on [1, 32] tokens, and these."""
    from halfbyte.training import quantize

    helpers = runpy.run_path(str(WORKERS / "world.py"))
    with helpers["world_of_one"]() as runtime:
        recipe = Recipe()
        gpt = helpers["random_model"](runtime, recipe)
        tokens = torch.arange(32).view(1, 32)
        quantize.quantize(gpt, recipe, lambda stage: stage(tokens, tokens, None))
        yield gpt, tokens


@pytest.mark.slow
def test_kept_weights_keep_their_place_and_are_never_stale():
    from halfbyte.training.fast_path import weights_once

    with quantized() as (gpt, _):
        linear = gpt.decoder.layers[0].mlp.linear_fc1
        rule = linear.weight_quantizer._quantizer_cache
        kept: dict[str, torch.Tensor] = {}
        with weights_once(gpt, kept):
            place = linear.weight.data_ptr()
            assert torch.equal(linear.weight, rule.fake(kept["decoder.layers.0.mlp.linear_fc1"]))  # on its grid
        with torch.no_grad():
            linear.weight.mul_(0.5)
        with weights_once(gpt, kept):
            assert linear.weight.data_ptr() == place
            inside = linear.weight.detach().clone()
        assert torch.equal(inside, rule.fake(linear.weight).detach())
        assert linear.weight.data_ptr() != place


@pytest.mark.slow
def test_no_micro_batch_pays_for_modelopts_lookup(monkeypatch):
    from modelopt.torch.opt.dynamic import DynamicModule

    from halfbyte.training.fast_path import weights_once

    with quantized() as (gpt, tokens):
        linear = gpt.decoder.layers[0].mlp.linear_fc1
        asked = []
        plain = DynamicModule.__getattr__
        monkeypatch.setattr(DynamicModule, "__getattr__", lambda self, name: asked.append(name) or plain(self, name))
        with weights_once(gpt):
            asked.clear()
            gpt(tokens, tokens, None).sum().backward()
            assert asked == []
            assert "weight" in linear.__dict__
        assert "weight" not in linear.__dict__
        assert isinstance(gpt.decoder.layers[0].mlp, DynamicModule)  # else there was nothing to save


def recipe_with(**keys) -> Recipe:
    """The defaults with section__key=value changed."""
    recipe = Recipe()
    for name, value in keys.items():
        section, key = name.split("__")
        setattr(getattr(recipe, section), key, value)
    return recipe


def on(device: str):
    """A process beside such a device."""
    from halfbyte.training.runtime import Runtime

    return Runtime(rank=0, world=1, local_rank=0, local_world=1, dtype=torch.bfloat16, device=torch.device(device))


def test_where_graphs_are_used():
    from halfbyte.training import graphs

    def wanted(device="cuda", **keys):
        return graphs.wanted(recipe_with(**keys), on(device))

    assert wanted()
    assert not wanted(device="cpu")
    assert not wanted(train__cuda_graphs=CudaGraphs.never)
    assert wanted(parallel__tensor=2)
    assert wanted(parallel__data=4, parallel__tensor=2)
    assert not wanted(parallel__data=8, parallel__tensor=2)  # two hosts
    assert not wanted(parallel__data=4, launch__gpus_per_node=2)
    assert wanted(parallel__data=16, train__cuda_graphs=CudaGraphs.always)
    assert not wanted(parallel__pipeline=2)
    assert not wanted(parallel__pipeline=2, train__cuda_graphs=CudaGraphs.always)
    assert not wanted(train__recompute=True)
    assert not wanted(distill__teacher="folder")  # it is read between two replays
    assert wanted(distill__hidden=0.5)


def test_where_stages_are_recorded():
    from halfbyte.training import stage_graphs

    def wanted(device="cuda", **keys):
        return stage_graphs.wanted(recipe_with(**({"parallel__pipeline": 2} | keys)), on(device))

    assert wanted()
    assert not wanted(device="cpu")
    assert wanted(parallel__tensor=2)
    assert not wanted(parallel__pipeline=1)
    assert not wanted(train__cuda_graphs=CudaGraphs.never)
    assert wanted(parallel__data=4)
    assert not wanted(parallel__data=8)  # two hosts
    assert wanted(parallel__data=8, train__cuda_graphs=CudaGraphs.always)
    assert not wanted(train__recompute=True)
    assert not wanted(distill__hidden=0.5)  # the loss would read activations inside a graph
    assert wanted(distill__teacher="folder")  # read before the schedule begins


GRID = list(itertools.product([1, 2, 4], [1, 2], CudaGraphs, [False, True], [0.0, 0.5], [None, "folder"]))
"""Pipeline stages, data-parallel ranks, train.cuda_graphs, train.recompute, distill.hidden, distill.teacher."""


@pytest.mark.parametrize("companion", [False, True])
def test_hooks_that_no_replay_runs_and_replays_exclude_each_other(companion):
    """Over all settings: one kind of graph at most, and with one no early sum; and the plan knows which it is."""
    from halfbyte.launch.plan_model import Architecture, Layout
    from halfbyte.launch.plan_time import step_time
    from halfbyte.training import companions, graphs, module, stage_graphs

    model, planned = torch.nn.Module(), Architecture.dense("", SMALL)
    if companion:
        model.add_module(companions.NAME, companions.Companions())
    captured = 0
    for pipeline, data, choice, recompute, hidden, teacher in GRID:
        recipe = recipe_with(
            parallel__pipeline=pipeline,
            parallel__data=data,
            train__cuda_graphs=choice,
            train__recompute=recompute,
            distill__hidden=hidden,
            distill__teacher=teacher,
            launch__gpus_per_node=4,
        )
        kinds = [kind.wanted(recipe, on("cuda")) for kind in (graphs, stage_graphs)]
        assert sum(kinds) <= 1
        assert not any(kind.wanted(recipe, on("cpu")) for kind in (graphs, stage_graphs))
        for device, replayed in (("cuda", any(kinds)), ("cpu", False)):
            early = module.reduces_early(model, recipe, torch.device(device))
            assert early == (data > 1 and not companion and not replayed)
        slow_python = replace(REACHED, layer=1e6)
        waits = step_time(recipe, planned, Layout.of(recipe), GPUS["H200"], slow_python).waiting > 0
        assert waits != any(kinds)
        captured += any(kinds)
    # Half of the teachers or of the hidden losses, no recomputation: `always`; `auto` but in eight ranks.
    assert captured == (3 * 2 + 3 + 2) * 2


@pytest.mark.slow
def test_no_generator_is_switched_during_a_capture():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from halfbyte.training.graphs import without_generator

    tracker = get_cuda_rng_tracker()
    with without_generator(), tracker.fork("a state that nobody added"):
        pass
    with pytest.raises(Exception, match="not added"), tracker.fork("a state that nobody added"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2)])
def test_a_replayed_step_is_the_plain_one(layout, environment, tmp_path):
    """Layout: tensor, pipeline, data."""
    _, pipeline, _ = layout
    gpus = math.prod(layout)
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    out = tmp_path / "out.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(WORKERS / "graphs.py")]
    subprocess.run([*launcher, str(out), *map(str, layout)], check=True, env=environment)
    for name, ways in json.loads(out.read_text()).items():
        plain, graphs, again = ways["plain"], ways["graphs"], ways["again"]
        if pipeline > 1 and name == "qad_topk":
            assert graphs["captured"] == 0  # its loss reads hidden states
        else:
            kinds = 2 if name == "qat_later" else 1  # one more for its BF16 phase
            assert graphs["captured"] == kinds * pipeline, name  # the first stage has as many in flight as stages
        spread = max(abs(a - b) for a, b in zip(plain["losses"], again["losses"], strict=True))
        apart = max(abs(a - b) for a, b in zip(plain["losses"], graphs["losses"], strict=True))
        assert apart <= max(2 * spread, 1e-6), name
        assert abs(plain["weights"] - graphs["weights"]) <= 1e-6 * plain["weights"], name
        for beside in (ways[key] for key in ("two", "four") if key in ways):
            untied = ways["untied"]
            assert beside["captured"] == graphs["captured"], name
            apart = max(abs(a - b) for a, b in zip(untied["losses"], beside["losses"], strict=True))
            assert apart <= max(2 * spread, 1e-6), name
            assert abs(untied["weights"] - beside["weights"]) <= 1e-6 * untied["weights"], name
