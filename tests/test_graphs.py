"""CUDA graphs: where they are used, what keeps its address for them, and that a replayed step is the plain one."""

import contextlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import BlockScale, Recipe
from halfbyte.training.formats import Rounding
from halfbyte.training.numerics import fake_quantize, fake_quantize_into

WORKERS = Path(__file__).with_name("workers")


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


def test_where_graphs_are_used():
    from halfbyte.training import graphs
    from halfbyte.training.runtime import Runtime

    def wanted(world=1, device="cuda", **keys):
        recipe = Recipe()
        for name, value in keys.items():
            section, key = name.split("__")
            setattr(getattr(recipe, section), key, value)
        layout = {"rank": 0, "world": world, "local_rank": 0, "local_world": world, "dtype": torch.bfloat16}
        return graphs.wanted(recipe, Runtime(device=torch.device(device), **layout))

    assert wanted()
    assert not wanted(device="cpu")
    assert not wanted(train__cuda_graphs=CudaGraphs.never)
    assert wanted(world=2, parallel__tensor=2)
    assert not wanted(world=2, parallel__data=2)
    assert wanted(world=2, parallel__data=2, train__cuda_graphs=CudaGraphs.always)
    assert not wanted(world=2, parallel__pipeline=2)
    assert not wanted(world=2, parallel__pipeline=2, train__cuda_graphs=CudaGraphs.always)
    assert not wanted(train__recompute=True)
    assert not wanted(distill__teacher="folder")


def test_where_stages_are_recorded():
    from halfbyte.training import stage_graphs
    from halfbyte.training.runtime import Runtime

    runtime = Runtime(rank=0, world=2, local_rank=0, local_world=2, dtype=torch.bfloat16, device=torch.device("cuda"))
    recipe = Recipe()
    recipe.parallel.pipeline = 2
    assert not stage_graphs.wanted(recipe, runtime)  # auto: never run on a GPU
    recipe.train.cuda_graphs = CudaGraphs.always
    assert stage_graphs.wanted(recipe, runtime)
    recipe.distill.hidden = 0.5
    assert not stage_graphs.wanted(recipe, runtime)


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
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_replayed_step_is_the_plain_one(tensor, pipeline, environment, tmp_path):
    gpus = tensor * pipeline
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    out = tmp_path / "out.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(WORKERS / "graphs.py")]
    subprocess.run([*launcher, str(out), str(tensor), str(pipeline)], check=True, env=environment)
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
