"""Calibrate one model in every layout of this world size and write scales and logits: what test_ptq_layouts compares.

Usage: ptq.py MODEL_DIR OUT.json, alone or under torchrun with two processes; float64 on gloo. Judges nothing.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region as gather

from halfbyte.training import environment, model, ptq
from halfbyte.training.config import (
    Activations,
    BlockScale,
    Format,
    Parallel,
    Quantize,
    Recipe,
    Smoothing,
    Train,
    Weights,
)
from halfbyte.training.fast_path import weights_once
from halfbyte.training.files import write_json
from halfbyte.training.runtime import Runtime, close_runtime, open_runtime
from halfbyte.training.schedule import collect, token_batch
from halfbyte.training.shape import read_shape

LAYOUTS = {
    1: {"one": Parallel()},
    2: {
        "tp2_sp": Parallel(tensor=2, sequence=True),
        "pp2": Parallel(pipeline=2),
    },
}
VARIANTS = {
    "clipped": Quantize(
        activations=Activations.percentile, percentile=99.5, smoothing=Smoothing.smoothquant, format=Format.nvfp4
    ),
    "searched": Quantize(
        smoothing=Smoothing.awq_lite,
        activations=Activations.percentile,
        percentile=99.5,
        block_scale=BlockScale.mse,
        weights=Weights.gptq,
    ),
    "duo": Quantize(smoothing=Smoothing.awq_duo, format=Format.mxfp4),
}


def calibrated(folder: Path, recipe: Recipe, runtime: Runtime) -> dict:
    """quantize.json and the quantized model's logits on the last stage."""
    shape = read_shape(folder / "config.json")
    gpt = model.build(shape, recipe, runtime)
    model.import_hf(gpt, folder, shape, runtime)
    with torch.no_grad():  # outlier channels, as trained models have them
        for layer in gpt.decoder.layers:
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                norm.weight[[3, 17, 40]] *= torch.tensor([20.0, 6.0, 11.0], dtype=torch.float64)
    tokens = torch.arange(4 * 2 * 32).reshape(4, 2, 32) * 7 % shape.vocab
    batches = [token_batch(part) for part in tokens]
    report = ptq.calibrate(gpt, recipe, lambda stage: collect(stage, batches, None))
    with weights_once(gpt):
        logits = collect(gpt, batches[:1], lambda out, index: gather(out))
    parts: list = [None] * runtime.world
    dist.all_gather_object(parts, logits[0][0, ::8].tolist() if logits else None)
    return {"layers": report["layers"], "logits": next(part for part in parts if part is not None)}


def main(folder: Path, out: Path) -> None:
    """Every variant in every layout."""
    layouts = LAYOUTS[environment.coordinates()[1]]
    runtime = None
    found: dict[str, dict] = {}
    for layout, parallel in layouts.items():
        base = Recipe(parallel=parallel, train=Train(dtype="float64"))
        if runtime is None:
            runtime = open_runtime(base)
        else:  # other groups of the same processes
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        found[layout] = {}
        for name, section in VARIANTS.items():
            recipe = Recipe(parallel=parallel, train=base.train, quantize=section)
            found[layout][name] = calibrated(folder, recipe, runtime)
    if runtime.first:
        write_json(out, found)
    close_runtime()


if __name__ == "__main__":
    environment.set_process_environment()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
