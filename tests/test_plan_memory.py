"""Planned memory and products against what calibration and training hold and compute."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.bench import plan as bench
from halfbyte.bench import plan_check
from halfbyte.launch import plan_search
from halfbyte.launch.plan_memory import SAMPLED, memory_per_rank
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.launch.plan_search import judge
from halfbyte.launch.plan_time import step_time
from halfbyte.training.choices import CudaGraphs, Dtype
from halfbyte.training.config import Method, Quantize, Recipe, Smoothing, Train, Weights
from halfbyte.training.config_train import Lora
from halfbyte.training.hardware import GIB, GPUS, RESERVE_GIB, Reached

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
SIZE = bench.Size(micro_batches=32)
"""Eight layers of Llama-3-8B's shape."""


def held(module) -> dict[str, int]:
    """Bytes of a module's matrices after a step: weights, gradients, and what the optimizer keeps of each."""
    matrices = [parameter for parameter in module.gpt.parameters() if parameter.dim() == 2]
    sizes = {parameter.numel() for parameter in matrices}
    states = [slot for part in module.optimizer.megatron.chained_optimizers for slot in part.optimizer.state.values()]
    moments = [tensor for slot in states for tensor in slot.values() if tensor.numel() in sizes]
    return {
        "weights": sum(parameter.nbytes for parameter in matrices),
        "gradients": sum(parameter.main_grad.nbytes for parameter in matrices),
        "optimizer": sum(tensor.nbytes for tensor in moments),
    }


@pytest.mark.slow  # imports Megatron-Core
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.float64])
def test_state_of_training_is_counted_in_the_recipe_s_type(dtype):
    train = Train(steps=2, global_batch=4, micro_batch=2, sequence_length=12, dtype=dtype, distributed_optimizer=False)
    recipe = Recipe(train=train, quantize=Quantize(calibration_samples=1))
    recipe.evaluate.tokens_per_batch = 12  # calibration of so small a model may take more than its training
    with WORLD["world_of_one"]() as opened:
        module = WORLD["training"](replace(opened, dtype=getattr(torch, dtype)), recipe)
        module.training_step(WORLD["batches"](), 0)
        found = held(module)
    planned = memory_per_rank(recipe, Architecture.dense("", WORLD["SHAPE"]), Layout.of(recipe))
    assert {part: planned[part] for part in found} == found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_what_calibration_keeps_of_every_input(kind):
    from halfbyte.training import gptq, quantize, smoothing
    from halfbyte.training.observe import observe

    chosen = {"weights": Weights.gptq} if kind == "gptq" else {"smoothing": Smoothing.awq_duo}
    train, shape = Train(dtype=Dtype.float32, sequence_length=12), WORLD["SHAPE"]
    recipe = Recipe(method=Method.ptq, quantize=Quantize(**chosen), train=train)
    recipe.evaluate.tokens_per_batch = 300
    with WORLD["world_of_one"]() as opened:
        gpt = WORLD["random_model"](opened, recipe)
        taker = gptq.Hessians(gpt) if kind == "gptq" else smoothing.Watch(gpt, smoothing.SAMPLE_TOKENS)
        tokens = torch.zeros(25, 12, dtype=torch.int64)  # 300 tokens, twice

        def run(stage):
            for _ in range(3):
                stage(tokens, torch.arange(12).expand_as(tokens), None)

        observe(gpt, quantize.plan(gpt, recipe.quantize), run, [taker.take])
    planned = memory_per_rank(recipe, Architecture.dense("", shape), Layout.of(recipe))
    if kind == "gptq":
        work = 8 * (4 * shape.ffn**2 + 2 * shape.hidden * shape.ffn)
        assert planned["Hessians"] - work == sum(hessian.nbytes for hessian in taker.sums.values())
    else:
        assert planned["inputs"] == sum(piece.nbytes for seen in taker.channels.values() for piece in seen.sample)
        assert SAMPLED == smoothing.SAMPLE_TOKENS


def kept_for_backward(gpt, tokens) -> int:
    """Bytes that autograd keeps of a forward pass over [B, S] tokens, parameters not counted."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.slow
def test_masks_of_a_clipped_gradient_are_counted():
    from halfbyte.training.fast_path import weights_once

    planned, found, shape = [], [], WORLD["SHAPE"]
    with WORLD["world_of_one"]() as opened:
        for clips in (False, True):
            train = Train(dtype=Dtype.float32, sequence_length=12, micro_batch=2, global_batch=2)
            recipe = Recipe(train=train, quantize=Quantize(clip_gradient=clips))
            recipe.evaluate.tokens_per_batch = 12
            gpt = WORLD["training"](opened, recipe).gpt
            with weights_once(gpt):
                found.append(kept_for_backward(gpt, WORLD["batches"]()[0].tokens))
            planned.append(memory_per_rank(recipe, Architecture.dense("", shape), Layout.of(recipe))["activations"])
    assert planned[1] - planned[0] == found[1] - found[0] > 0


def products_of_a_step(opened, recipe) -> int:
    """FLOPs of all matrix products of a step but attention's, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode, mm_flop

    def into_place(_, a_shape, b_shape, **__):
        return mm_flop(a_shape, b_shape)

    module, addmm_ = WORLD["training"](opened, recipe), torch.ops.aten.addmm_
    with FlopCounterMode(display=False, custom_mapping={addmm_: into_place}) as counter:
        module.training_step(WORLD["batches"](), 0)
    counted = counter.get_flop_counts()["Global"]
    return sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm, addmm_))


@pytest.mark.slow
def test_products_of_a_step_with_adapters():
    """A linear with one has the gradient of its weight computed, others pass that of their input on only."""
    shape, gpu = WORLD["SHAPE"], replace(GPUS["H200"], bf16=1.0, memory=math.inf)
    rank, planned, found = 4, [], []
    down = 2 * shape.layers * shape.ffn * shape.hidden  # FLOPs of all down projections per token
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    before = 2 * shape.hidden * (q + 2 * kv + q + 2 * shape.ffn)  # in the first layer, ahead of the first adapter
    with WORLD["world_of_one"]() as opened:
        for lora in (Lora(), Lora(rank=rank, targets=["*.down_proj"])):
            train = Train(steps=2, global_batch=4, micro_batch=2, sequence_length=12, dtype=Dtype.float32, lora=lora)
            recipe = Recipe(train=train, quantize=Quantize(calibration_samples=1))
            model, only_products = Architecture.dense("", shape), Reached(gemm=1.0, attention=math.inf)
            planned.append(step_time(recipe, model, Layout.of(recipe), gpu, only_products).compute)
            found.append(products_of_a_step(opened, recipe))
    assert planned[0] == found[0]
    # Not in the plan: the factors' two products once per batch; and that nothing before the first adapter goes back.
    assert planned[1] == found[1] - 2 * rank * down + 4 * 12 * before
    assert planned[0] - planned[1] == 4 * 12 * (planned[0] / (4 * 12) / 3 - down)


STAGES = json.loads((Path(__file__).parent.parent / "docs/evidence/four-gpus-stages.json").read_text())
PIPELINES = [(layout, arm) for layout in ("tp2pp2", "pp4") for arm in STAGES["steps"][layout]]


@pytest.mark.parametrize(("layout", "arm"), PIPELINES)
def test_pipelines_of_four_gpus_take_what_was_measured(layout, arm):
    found = {"size": STAGES["size"], "steps": {layout: {arm: STAGES["steps"][layout][arm]}}}
    (row,) = plan_check.of_steps(found, GPUS["H200"])
    # The graphs measured here kept a tensor of every weight's size, which captured passes no longer make.
    assert abs(row.memory_error) <= plan_check.MEMORY or arm in ("bf16_graphs", "nvfp4_graphs")
    assert abs(row.seconds_error) <= plan_check.SECONDS or arm == "nvfp4"  # waits for Python at TP2 x PP2


def test_two_gpus_take_what_was_measured_with_graphs_and_micro_batches_at_once():
    path = Path(__file__).parent.parent / "docs/evidence/two-gpus-side-by-side.json"
    rows = list(plan_check.of_steps(json.loads(path.read_text()), GPUS["H200"]))
    assert len(rows) == 10
    assert all(abs(row.memory_error) <= plan_check.MEMORY for row in rows)
    assert all(abs(row.seconds_error) <= plan_check.SECONDS for row in rows)


def pools(size=None, layout="pp4", **changes) -> float:
    """What graphs take on the fullest rank."""
    size = size or SIZE
    recipe = bench.recipe(size, bench.LAYOUTS[layout], bench.ARMS["bf16"])
    for name, value in changes.items():
        setattr(recipe.train, name, value)
    return memory_per_rank(recipe, Architecture.dense("", bench.shape_of(size)), Layout.of(recipe)).get(
        "CUDA graphs", 0
    )


def test_what_graphs_take_of_a_pipeline():
    """Four pairs on the first stage, each with an output and its gradient; the embedding's gradient is made once."""
    end, table = (2 * n for n in (SIZE.sequence * SIZE.hidden, SIZE.vocab * SIZE.hidden))
    assert pools() == 4 * 2 * end + table
    assert pools(replace(SIZE, sequence=128)) == 4 * 2 * end / 32 + table
    assert pools(cuda_graphs=CudaGraphs.never) == pools(recompute=True) == 0
    assert pools(layout="tp4") == 0  # one graph: its pool holds what the plain path would
    # Steps in BF16 ahead of quantized ones have graphs of their own, which stay.
    assert pools(fake_quant_after_steps=5) > 2 * pools()
    assert pools(layout="tp4", fake_quant_after_steps=5) > 0
    assert pools(fake_quant_after_steps=1000) == pools()


def test_a_pipeline_too_large_for_its_graphs_is_told_so():
    recipe = bench.recipe(SIZE, bench.LAYOUTS["pp4"], bench.ARMS["nvfp4"])
    model, layout = Architecture.dense("", bench.shape_of(SIZE)), Layout.of(recipe)
    parts = memory_per_rank(recipe, model, layout)
    total, graphs = sum(parts.values()), parts["CUDA graphs"]

    def said(usable: float) -> str:
        gpu = replace(GPUS["H200"], memory_gib=usable / GIB + RESERVE_GIB)
        return judge(recipe, model, layout, gpu).problem or ""

    assert said(total / 2).startswith("needs 16 GiB per GPU of")
    assert said(total / 2).endswith(" GiB)")  # nor would it fit without them
    assert said(total - graphs / 2).endswith("; train.cuda_graphs=never needs 16 GiB")
    assert said(total + graphs) == ""


def test_a_search_works_out_the_remedy_of_what_it_prints_only(monkeypatch):
    """Of TP x PP the smallest layout is named; memory without graphs, a second recipe's, is asked of no other."""
    seen = []

    def counted(recipe, model, layout):
        seen.append((layout, recipe.train.cuda_graphs))
        return memory_per_rank(recipe, model, layout)

    monkeypatch.setattr(plan_search, "memory_per_rank", counted)
    recipe = bench.recipe(SIZE, bench.LAYOUTS["pp4"], bench.ARMS["nvfp4"])
    tiny = replace(GPUS["H200"], memory_gib=RESERVE_GIB + 1)
    found, refused = plan_search.best(recipe, Architecture.dense("", bench.shape_of(SIZE)), tiny, 4)
    named = [name for name, reason in refused.items() if reason.startswith(plan_search.NEEDS)]
    again = [layout for layout, graphs in seen if graphs is CudaGraphs.never]
    assert found is None
    assert [f"TP{layout.tensor} PP{layout.pipeline}" for layout in again] == named
    assert len(seen) - len(again) > 3 * len(again) > 0


def test_what_runs_in_graphs_only_is_not_told_to_do_without():
    recipe = bench.recipe(SIZE, bench.LAYOUTS["tp2"], bench.ARMS["nvfp4"])
    recipe.train.micro_batches_at_once = 2
    model, layout = Architecture.dense("", bench.shape_of(SIZE)), Layout.of(recipe)
    total = sum(memory_per_rank(recipe, model, layout).values())
    alone = sum(memory_per_rank(bench.recipe(SIZE, bench.LAYOUTS["tp2"], bench.ARMS["nvfp4"]), model, layout).values())
    between = replace(GPUS["H200"], memory_gib=(total + alone) / 2 / GIB + RESERVE_GIB)
    assert alone < between.usable < total
    assert (judge(recipe, model, layout, between).problem or "").endswith(" GiB)")
