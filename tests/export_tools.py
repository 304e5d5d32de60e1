"""A random model, exported without training: what the tests of conversions, engines and damage start from."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import torch

from halfbyte.export import hf
from halfbyte.export.record import record_verdict
from halfbyte.export.team import Team
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.kv_format import KVCache
from halfbyte.training.shape import layer_format, read_shape

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED = LLAMA | {"tie_word_embeddings": False}
LLAMA3_SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary scaling as Llama 3.1 has it."""
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}


def recipe(number_format: Format = Format.nvfp4, cache: KVCache = KVCache.none) -> Recipe:
    result = Recipe()
    result.quantize.format, result.quantize.kv_cache = number_format, cache
    return result


def random_weights(source: Path, run: Recipe) -> list[HFWeight]:
    """Training-time weights of the model of source/config.json, as the recipe quantizes them."""
    generator, weights = torch.Generator().manual_seed(5), []
    for name, shape in expected_shapes(read_shape(source / "config.json")).items():
        tensor = torch.randn(*shape, generator=generator) * 0.1 + (len(shape) == 1)
        weight = HFWeight(name, tensor)
        planned = "_proj.weight" in name and run.method is not Method.bf16
        if planned and layer_format(name.removesuffix(".weight"), run.quantize) is not None:
            weight = replace(weight, quantized=True, weight_amax=torch.tensor(0.4), input_amax=torch.tensor(4.0))
        if run.quantize.kv_cache is not KVCache.none and name.endswith(("k_proj.weight", "v_proj.weight")):
            weight = replace(weight, cache_amax=torch.tensor(3.0 if "k_proj" in name else 0.25))
        weights.append(weight)
    return weights


def model_folder(source: Path, config: dict) -> Path:
    """What a Hugging Face directory has besides its weights."""
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("yours")
    return source


def export(folder: Path, config: dict, run: Recipe) -> Path:
    """A model with random weights, exported."""
    source = model_folder(folder / "source", config)
    out, weights = folder / "hf", random_weights(source, run)
    hf.write(weights, run, model_dir=source, out=out, checkpoint="step_00000001", versions={"torch": "2"})
    record_verdict(out, {"verdict": "pass"})
    return out


def team_of(size: int) -> list[Team]:
    """Threads in the place of processes: work on the first rank or on every one, and then all go on."""
    barrier, answers = threading.Barrier(size), {}

    def member(rank: int) -> Team:
        def on_every(work):
            try:
                answers[rank] = work()
            except UserError as error:
                answers["error"] = error
            barrier.wait()
            if "error" in answers:
                raise answers["error"]
            return [answers[place] for place in range(size)]

        def on_first(work):
            if rank == 0:
                answers["result"] = work()
            barrier.wait()
            result = answers["result"]
            barrier.wait()
            return result

        return Team(rank, size, on_first, on_every)

    return [member(rank) for rank in range(size)]
