"""A few training steps of every method on this machine's device, from the same weights and on the same tokens.

Usage: gpu_methods.py OUT.json DTYPE..., alone; on the GPU, or without one on the CPU. Judges nothing: it writes
{dtype: {case: {"losses": [...], "error": relative RMS error of all quantized weights, "seen": the same from the
statistics that training writes, "exact": whether what a checkpoint's reader makes of the trained tensors on the CPU is
what the device computed with, bit for bit}}}.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from halfbyte.export.pack import fake
from halfbyte.training import companions, environment, low_rank, module, quantization_stats, quantize
from halfbyte.training.choices import BlockScale
from halfbyte.training.config import Format, Method, Model, Quantize, Recipe, Train
from halfbyte.training.config_distill import Distill
from halfbyte.training.config_train import Lora
from halfbyte.training.data import MicroBatch
from halfbyte.training.fast_path import weights_once
from halfbyte.training.hf_map import FUSED, HFWeight
from halfbyte.training.kv_format import KVCache
from halfbyte.training.model import build
from halfbyte.training.runtime import DTYPES, Runtime, close_runtime, open_runtime
from halfbyte.training.schedule import collect
from halfbyte.training.shape import ModelShape

SHAPE = ModelShape(
    layers=2,
    hidden=128,
    ffn=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=256,
    tied=True,
    max_positions=64,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    norm_eps=1e-5,
)
STEPS = 4
WEIGHTS_ONLY = {"format": Format.w4a16_nvfp4}
CASES: dict[str, tuple[Method, dict, dict, Distill]] = {
    "ptq_four_over_six": (Method.qat, {"learning_rate": 1e-12}, {"block_scale": BlockScale.four_over_six}, Distill()),
    "ptq_mxfp4_mse": (
        Method.qat,
        {"learning_rate": 1e-12},
        {"format": Format.mxfp4, "block_scale": BlockScale.mse},
        Distill(),
    ),
    "w4a8": (Method.qat, {}, {"format": Format.w4a8_nvfp4_fp8}, Distill()),
    "kv_nvfp4": (Method.qat, {}, {"kv_cache": KVCache.nvfp4}, Distill()),
    "qad_top_k": (Method.qad, {}, WEIGHTS_ONLY, Distill(top_k=8, cross_entropy=0.5, hidden=0.1)),
    "lsq": (Method.qat, {"block_scale_lr_mult": 30.0}, WEIGHTS_ONLY, Distill()),
    "lsq_mxfp4": (
        Method.qat,
        {"block_scale_lr_mult": 300.0},
        {"format": Format.w4a16_mxfp4, "clip_gradient": True},
        Distill(),
    ),
    "lora": (Method.qad, {"lora": Lora(rank=4)}, WEIGHTS_ONLY, Distill()),
    "lora_lsq": (Method.qat, {"lora": Lora(rank=4), "block_scale_lr_mult": 30.0}, {}, Distill()),
}
"""Name -> method, changes of `train`, of `quantize`, `distill`. PTQ is a training that moves nothing."""


def recipe_of(case: str, dtype: str) -> Recipe:
    """Four micro-batches a step, as CUDA graphs where there is a GPU."""
    method, train, numbers, distill = CASES[case]
    settings = {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "sequence_length": 32, "learning_rate": 1e-3}
    optimization = Train(**(settings | train), dtype=dtype)  # type: ignore[arg-type]
    return Recipe(
        method=method, model=Model(path="none"), train=optimization, quantize=Quantize(**numbers), distill=distill
    )


def random_model(recipe: Recipe, runtime: Runtime, seed: int) -> torch.nn.Module:
    """Weights drawn on the CPU: the same on every device, up to the rounding of BF16."""
    gpt = build(SHAPE, recipe, runtime)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(gpt.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * values if parameter.dim() == 2 else 1 + 0.1 * values)
    return gpt


def batches(step: int, runtime: Runtime) -> list[MicroBatch]:
    """Four micro-batches of two windows, some tokens without loss."""
    generator = torch.Generator().manual_seed(step)
    windows = torch.randint(SHAPE.vocab, (4, 2, 33), generator=generator)
    masks = (torch.rand(4, 2, 32, generator=generator) > 0.2).float()
    pairs = zip(windows, masks, strict=True)
    return [MicroBatch(w[:, :-1].contiguous(), w[:, 1:].contiguous(), m, None).to(runtime.device) for w, m in pairs]


def train(case: str, dtype: str, runtime: Runtime) -> dict:
    """One case."""
    recipe = recipe_of(case, dtype)
    gpt, teacher = random_model(recipe, runtime, 1), None
    if recipe.method is Method.qad:
        teacher = random_model(recipe, runtime, 2).requires_grad_(False)
    quantize.quantize(gpt, recipe, lambda stage: collect(stage, batches(99, runtime)[:2], None))
    trained = module.Training(gpt, teacher=teacher, recipe=recipe, runtime=runtime, data=None)  # type: ignore[arg-type]
    trained.optimizers = lambda: trained.optimizer
    trained.log_dict = lambda *_, **__: None
    for step in range(STEPS):
        trained.training_step(batches(step, runtime), step)
    errors = quantize.weight_errors(gpt, recipe.quantize)
    seen = quantization_stats.measure(gpt, batches(99, runtime)[0], recipe.quantize)
    return {
        "losses": trained.progress.losses,
        "error": sum(errors.values()) / len(errors),
        "seen": quantization_stats.summary(seen)["weight"]["mean_error"],
        "exact": exact(gpt, recipe),
    }


def exact(gpt: torch.nn.Module, recipe: Recipe) -> bool:
    """Whether export's arithmetic on the CPU finds the weights that this device computes with."""
    planned = quantize.plan(gpt, recipe.quantize)
    with weights_once(gpt):
        used = {layer.module: gpt.get_submodule(layer.module).weight.detach().cpu() for layer in planned}
    beside = companions.of(gpt)
    for layer in planned:
        linear = gpt.get_submodule(layer.module)
        scales = None if beside is None else beside.of("scales", layer.module)
        adapter = None if beside is None else beside.of("adapters", layer.module)
        weight = linear.weight.detach().cpu()
        if adapter is not None:
            b, a = adapter.b.detach().flatten(0, 1).cpu(), adapter.a.detach().cpu()
            weight = low_rank.merge(weight, b, a, float(adapter.factor))
        amax = linear.weight_quantizer.amax
        log2 = None if scales is None else scales.log2.detach().flatten(0, 1).cpu()
        name = f"{layer.hf[0]}.weight"
        whole = HFWeight(name, weight, True, None if amax is None else amax.cpu(), log2_scale=log2)
        if not torch.equal(fake(whole, recipe.quantize).to(used[layer.module].dtype), used[layer.module]):
            return False
    return len(planned) == len(FUSED) * SHAPE.layers


def main(out: str, *dtypes: str) -> None:
    """Every case in every type."""
    environment.set_process_environment()
    environment.quiet_libraries()
    runtime = open_runtime(Recipe())
    found = {}
    for dtype in dtypes:
        typed = dataclasses.replace(runtime, dtype=DTYPES[dtype])  # type: ignore[index]
        found[dtype] = {case: train(case, dtype, typed) for case in CASES}
    Path(out).write_text(json.dumps(found, indent=1))
    close_runtime()


if __name__ == "__main__":
    main(*sys.argv[1:])
