"""One process of layout_export: calibrate, save, export; load the checkpoint of one GPU, save, export."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench import worker
from halfbyte.bench.plan import ARMS, LAYOUTS, Layout, Size, recipe, shape_of
from halfbyte.export import hf
from halfbyte.export.record import RECORD
from halfbyte.export.team import team_of
from halfbyte.training import checkpoint, quantize
from halfbyte.training.choices import Dtype
from halfbyte.training.config import Recipe
from halfbyte.training.files import write_json
from halfbyte.training.runtime import Runtime, close_runtime, on_first_rank, open_runtime
from halfbyte.training.saved_weights import read_weights
from halfbyte.training.shape import ModelShape, planned_linears

FILES = 4
"""safetensors files of an export, whatever the layout, so that up to four processes write."""


def plan_of(size: Size, layout: Layout, dtype: Dtype) -> Recipe:
    """NVFP4 QAT, exported to FILES files."""
    plan = recipe(size, layout, ARMS["nvfp4"])
    plan.export.files, plan.train.dtype = FILES, dtype
    return plan


def exported(size: Size, layout: Layout, runtime: Runtime, folder: Path, steps: int) -> dict[str, Any]:
    """Calibrate under this layout and export; carry the checkpoint of one GPU over, or make it, and export; collective.

    Args:
        size: The model.
        layout: Of the open groups; that of one process makes the checkpoint.
        runtime: This process.
        folder: `start/` in it has the checkpoint of one GPU; `<layout>/` gets what this layout makes.
        steps: Trained by one GPU before its checkpoint.

    Returns:
        "calibrated" and "carried" -> name of an exported file -> {"sha256", "bytes"}.
    """
    dtype = Dtype.float64 if runtime.dtype is torch.float64 else Dtype.auto
    plan, shape, start, mine = plan_of(size, layout, dtype), shape_of(size), folder / "start", folder / layout.name
    parts = worker.batches(size.vocab, size.sequence, 1, size.micro_batches, runtime)
    source = on_first_rank(runtime, lambda: _model_folder(shape, mine / "model"))
    with worker.training(plan, shape, ARMS["nvfp4"], runtime, parts) as trained:
        state = checkpoint.Trainable(trained.gpt)
        calibrated = _export(state, plan, shape, source, mine / "calibrated", runtime)
        if layout.gpus == 1:
            worker.time_steps(trained, parts, steps, runtime)
            checkpoint.save(state, {}, start)
        checkpoint.load(state, start)
        quantize.refresh_scales(trained.gpt, plan.quantize)
        return {"calibrated": calibrated, "carried": _export(state, plan, shape, source, mine / "carried", runtime)}


def _export(
    state: checkpoint.Trainable, plan: Recipe, shape: ModelShape, source: Path, place: Path, runtime: Runtime
) -> dict[str, Any]:
    """Save the weights under this layout, export them with all processes; what the record says of the files."""
    saved, out, team = place / "checkpoint", place / "hf", team_of(runtime)
    checkpoint.save(state, {}, saved)
    weights = read_weights(saved, shape, planned_linears(shape, plan), hf.own_weights(plan, source, team))
    hf.write(weights, plan, model_dir=source, out=out, checkpoint=saved.name, versions={}, team=team)
    on_first_rank(runtime, lambda: shutil.rmtree(saved))  # gigabytes, for every layout again
    return on_first_rank(runtime, lambda: json.loads((out / RECORD).read_text())["files"])


def _model_folder(shape: ModelShape, folder: Path) -> Path:
    """What an export takes from the source model, without weights."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
    }
    write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def inside(layout: str, folder: str, steps: str) -> None:
    """One process of one layout; rank 0 leaves FOLDER/<layout>/files.json."""
    size = Size(**json.loads((Path(folder) / "size.json").read_text()))
    dtype = Dtype.auto if torch.cuda.is_available() else Dtype.float64
    runtime = open_runtime(plan_of(size, LAYOUTS[layout], dtype))
    found = exported(size, LAYOUTS[layout], runtime, Path(folder), int(steps))
    on_first_rank(runtime, lambda: write_json(Path(folder) / layout / "files.json", found))
    close_runtime()
