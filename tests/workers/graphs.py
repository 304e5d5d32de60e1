"""Trains a small random model on GPUs with and without CUDA graphs, in every way that matters to a capture.

Run under torchrun with OUT.json, a tensor-parallel size, stages and data-parallel ranks; rank 0 writes {case: {plain,
graphs, again}}, each the losses of a few steps, a sum over the final weights ("again": the plain path once more, the
run-to-run spread) and how many graphs (pairs of them, in a pipeline) it captured. Under tensor parallelism alone also
{untied, two, four}: an untied model with its micro-batches one after the other, two and four at a time.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from halfbyte.training import environment, model, module, quantize
from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Format, Method, Model, Parallel, Quantize, Recipe, Run, Train
from halfbyte.training.config_distill import Distill
from halfbyte.training.config_train import Lora
from halfbyte.training.data import MicroBatch
from halfbyte.training.runtime import Runtime, close_runtime, open_runtime
from halfbyte.training.schedule import collect
from halfbyte.training.shape import ModelShape

SHAPE = ModelShape(
    layers=2,
    hidden=256,
    ffn=384,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=512,
    tied=True,
    max_positions=128,
    rope_theta=10000.0,
    rope_scaling_factor=None,
    norm_eps=1e-5,
)
STEPS = 5
CASES = {
    "bf16": {"method": Method.bf16},
    "qat_nvfp4": {"method": Method.qat},
    "qat_mxfp4": {"method": Method.qat, "quantize": Quantize(format=Format.mxfp4)},
    "qat_later": {"method": Method.qat, "after": 2},
    "qat_frozen": {"method": Method.qat, "freeze": ["*norm*", "model.embed_tokens", "lm_head"]},
    "qad": {"method": Method.qad},
    "qad_topk": {"method": Method.qad, "distill": Distill(top_k=8, hidden=0.1)},
    "qat_lsq": {"method": Method.qat, "scales": 30.0},
    "qad_lora": {"method": Method.qad, "lora": Lora(rank=4), "scales": 30.0},
    "qad_mixed": {"method": Method.qad, "distill": Distill(cross_entropy=0.5)},
}


def recipe(case: dict, layout: Parallel, *, graphs: bool, at_once: int = 1) -> Recipe:
    return Recipe(
        run=Run(name="graphs", dir="graphs"),
        method=case["method"],
        model=Model(path="none"),
        quantize=case.get("quantize", Quantize()),
        parallel=layout,
        distill=case.get("distill", Distill()),
        train=Train(
            steps=STEPS,
            global_batch=8,
            micro_batch=2,
            sequence_length=64,
            learning_rate=1e-3,
            micro_batches_at_once=at_once,
            cuda_graphs=CudaGraphs.always if graphs else CudaGraphs.never,
            fake_quant_after_steps=case.get("after", 0),
            block_scale_lr_mult=case.get("scales", 0.0),
            lora=case.get("lora", Lora()),
            freeze=case.get("freeze", []),
        ),
    )


def random_model(plan: Recipe, runtime: Runtime, seed: int, *, tied: bool) -> torch.nn.Module:
    gpt = model.build(dataclasses.replace(SHAPE, tied=tied), plan, runtime)
    generator = torch.Generator(runtime.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, 0.05, generator=generator) if parameter.dim() == 2 else parameter.fill_(1.0)
    return gpt


def batches(step: int, runtime: Runtime) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(step)
    windows = torch.randint(SHAPE.vocab, (4, 2, 65), generator=generator)
    mask = (torch.rand(4, 2, 64, generator=generator) > 0.2).float()
    found = zip(windows, mask, strict=True)
    return [MicroBatch(w[:, :-1].contiguous(), w[:, 1:].contiguous(), m, None).to(runtime.device) for w, m in found]


def captured(trained: module.Training) -> int:
    if trained._stage is not None:
        return trained._stage.recorded
    return 0 if trained._replay is None else sum(x is not None for x in trained._replay._captured.values())


def train(case: dict, layout: Parallel, runtime: Runtime, *, graphs: bool, tied: bool = True, at_once: int = 1) -> dict:
    plan = recipe(case, layout, graphs=graphs, at_once=at_once)
    gpt, teacher = random_model(plan, runtime, 1, tied=tied), None
    if plan.method is Method.qad:
        teacher = random_model(plan, runtime, 2, tied=tied).requires_grad_(False)
    if plan.method is not Method.bf16:
        quantize.quantize(gpt, plan, lambda stage: collect(stage, batches(99, runtime)[:1], None))
    trained = module.Training(gpt, teacher=teacher, recipe=plan, runtime=runtime, data=None)
    trained.optimizers = lambda: trained.optimizer
    trained.log_dict = lambda *_, **__: None
    for step in range(STEPS):
        own = batches(step, runtime)[parallel_state.get_data_parallel_rank() :: layout.data]
        trained.training_step(own, step)
    weights = torch.stack([parameter.double().square().sum() for parameter in gpt.parameters()]).sum()
    torch.distributed.all_reduce(weights)
    found = {"losses": trained.progress.losses, "weights": float(weights), "captured": captured(trained)}
    trained.on_train_end()
    return found


def main(out: str, tensor: int, pipeline: int, data: int) -> None:
    environment.set_process_environment()
    environment.quiet_libraries()
    layout = Parallel(tensor=tensor, pipeline=pipeline, data=data, sequence=tensor > 1)
    runtime = open_runtime(recipe(CASES["bf16"], layout, graphs=False))
    found = {}
    for name, case in CASES.items():
        ways = {"plain": False, "graphs": True, "again": False}
        found[name] = {way: train(case, layout, runtime, graphs=graphs) for way, graphs in ways.items()}
        if tensor > 1 and pipeline == data == 1 and name != "qad_topk":  # that one compares hidden states
            found[name]["untied"] = train(case, layout, runtime, graphs=False, tied=False)
            found[name]["two"] = train(case, layout, runtime, graphs=True, tied=False, at_once=2)
            found[name]["four"] = train(case, layout, runtime, graphs=True, tied=False, at_once=4)
    if runtime.first:
        Path(out).write_text(json.dumps(found, indent=1))
    close_runtime()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
