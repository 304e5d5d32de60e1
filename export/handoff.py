"""HANDOFF.md: what the person who serves the checkpoint needs to know, beside the checkpoint."""

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.export import serving
from halfbyte.export.verdict_text import verdict_lines
from halfbyte.training.config import Format, Recipe
from halfbyte.training.kv_format import KVCache

FORMATS = {
    Format.nvfp4: "NVFP4, W4A4: weights and activations in FP4 (E2M1, blocks of 16 with an E4M3 scale)",
    Format.w4a16_nvfp4: "NVFP4, W4A16: weights in FP4 (E2M1, blocks of 16 with an E4M3 scale), activations in BF16",
    Format.w4a8_nvfp4_fp8: "NVFP4 with FP8 activations, W4A8: weights in FP4 (E2M1, blocks of 32 with an E4M3 scale),"
    " activations in FP8 (E4M3, one static scale per tensor)",
    Format.w4a16_mxfp4: "MXFP4, W4A16: weights in FP4 (E2M1, blocks of 32 with a power-of-two scale), activations in"
    " BF16",
    Format.mxfp4: "MXFP4, W4A4: weights and activations in FP4 (E2M1, blocks of 32 with a power-of-two scale)",
    Format.fp8: "FP8, W8A8: weights and activations in FP8 (E4M3, one static scale per tensor)",
}
"""What a format is, in words."""
HARDWARE = {
    Format.nvfp4: """\
- Blackwell (SM100, SM103, SM120): FP4 tensor cores, the arithmetic that was trained and evaluated.
- Hopper and older: no FP4 tensor cores. vLLM and SGLang run the checkpoint weight-only (Marlin kernels, BF16
  activations; where SGLang refuses, add `--fp4-gemm-backend marlin`), so results differ from the ones evaluated here.
  TensorRT-LLM has no W4A4 kernel there.""",
    Format.w4a16_nvfp4: """\
- vLLM: Marlin kernels, Turing (SM75) and newer, Hopper included; needs a release newer than May 2026.
- SGLang: compute capability 8.0 and newer; needs a release that knows W4A16_NVFP4 (its source does in September 2026,
  and did not in June).
- TensorRT-LLM: needs a release that knows W4A16_NVFP4, newer than 1.2.1.""",
    Format.w4a8_nvfp4_fp8: """\
- TensorRT-LLM on Blackwell only. By ModelOpt's account its kernel holds a weight's code times its block scale in FP8,
  which rounds that product once more: results may differ a little from the ones evaluated here.
- vLLM and SGLang have no reader for it.""",
    Format.w4a16_mxfp4: """\
- vLLM (its compressed-tensors MXFP4 schemes); a TensorRT-LLM that reads compressed-tensors maps it to W4A16_MXFP4.""",
    Format.mxfp4: """\
- vLLM only (its compressed-tensors W4A4 MXFP4 scheme). FP4 tensor cores need Blackwell; elsewhere the weights are
  unpacked and results may differ from the ones evaluated here.
- TensorRT-LLM and SGLang have no established reader for dense MXFP4 weights.""",
    Format.fp8: """\
- Ada (SM89), Hopper, Blackwell: FP8 tensor cores, the arithmetic that was trained and evaluated.
- Older GPUs: vLLM and SGLang ask for SM89, vLLM for a mix as well; SGLang runs a mix from SM80 on, its FP8 layers
  weight-only (Marlin kernels, BF16 activations), so results differ from the ones evaluated here.""",
}
"""What each server needs for a format: GPUs, and releases where not all know it."""

_SCALES_IN_TRTLLM = (
    " It takes the scales where q, k and v are NVFP4 (W4A4) or FP8; where they are BF16 or W4A8, its source does not"
    " load them and the cache has scale 1."
)
_CACHE = {
    KVCache.none: "The KV cache is not quantized.",
    KVCache.fp8: "The KV cache is FP8 (E4M3, `k_scale` and `v_scale` beside k_proj and v_proj): keys and values were"
    " rounded to it in training and evaluation. vLLM and SGLang are told by `--kv-cache-dtype`, TensorRT-LLM reads it"
    f" from `hf_quant_config.json`.{_SCALES_IN_TRTLLM}",
    KVCache.nvfp4: "The KV cache is NVFP4 (blocks of 16 along a head; `k_scale`, `v_scale` beside k_proj and v_proj):"
    " keys and values were rounded to it in training and evaluation. TensorRT-LLM reads it from `hf_quant_config.json`"
    f" and needs Blackwell.{_SCALES_IN_TRTLLM} vLLM's `nvfp4` cache needs SM100; elsewhere leave the option out, and"
    " the cache is BF16. SGLang has no such cache: its command takes FP8 with the same scales, because it would"
    " multiply a BF16 cache by them.",
}
_QWEN2_ON_SGLANG = (
    "SGLang drops the cache's scales of Qwen2 models (sgl-project/sglang#39942, open in September 2026): its command"
    " keeps the cache in BF16."
)

_MIXED = """\
- The formats of the layers are in `quantized_layers` of `hf_quant_config.json` and of `config.json` (quant_algo
  MIXED_PRECISION). TensorRT-LLM needs a release that reads them there; older ones ask for a `quant_cfg.json`.
- SGLang needs a release that recognizes the mix by itself (its source does in September 2026); older ones take
  MIXED_PRECISION for another format.
- A GPU must run every format that is used; what each needs follows."""


def write_handoff(
    out: Path,
    recipe: Recipe,
    formats: Iterable[Format],
    verdict: dict[str, Any],
    sizes: dict[str, Any],
    versions: dict[str, str],
    architecture: str,
) -> Path:
    """Write HANDOFF.md into the folder that holds the checkpoint.

    Args:
        out: The exported directory; the commands name it.
        recipe: The recipe of the run.
        formats: Of the quantized linears, one entry each; none for a BF16 checkpoint.
        verdict: Content of gate.json.
        sizes: What export.hf.write returned.
        versions: Package -> version.
        architecture: `architectures[0]` of config.json.

    Returns:
        Path of the file.
    """
    count = Counter(formats)
    served = served_as(str(out.resolve()), recipe, count, architecture)
    sections = [
        f"# Serving {recipe.run.name}\n",
        what_it_is(count),
        f"Trained with method `{recipe.method.value}` from `{recipe.model.path}`. {size_line(sizes)}\n",
        "## Accuracy gate\n",
        *verdict_lines(verdict),
        "\nThe full report is in `halfbyte.json` under `gate`.\n",
        "## Commands\n",
        commands_text(served, recipe),
        "None of these commands was run where this file was written: the servers are not part of halfbyte. What was"
        " checked is listed below.\n",
        "## Hardware\n",
        needs_text(served),
        "## What was checked, and how to check it again\n",
        _checks(out),
        "## Made with\n",
        "\n".join(f"- {name} {version}" for name, version in sorted(versions.items())),
    ]
    path = out.parent / "HANDOFF.md"
    path.write_text("\n".join(sections).rstrip() + "\n")
    return path


def what_it_is(count: Counter[Format]) -> str:
    """The formats of a checkpoint in words, from how many linears have each."""
    if not count:
        return "BF16, not quantized."
    if len(count) == 1:
        return f"{FORMATS[next(iter(count))]}."
    lines = [f"- {count[number_format]} of the linears: {FORMATS[number_format]}" for number_format in sorted(count)]
    return "\n".join(["A mix of formats:\n", *lines, ""])


def served_as(folder: str, recipe: Recipe, formats: Iterable[Format], architecture: str) -> serving.Served:
    """The checkpoint of a recipe for the commands, which name `folder`."""
    used = frozenset(formats)
    return serving.Served(folder, used, recipe.quantize.kv_cache if used else KVCache.none, architecture)


def needs_text(served: serving.Served) -> str:
    """What a server needs for it: hardware and releases per format, and what it has to be told of the cache."""
    used = sorted(served.formats)
    if not used:
        return "Any GPU that the server supports.\n"
    parts = [HARDWARE[used[0]]]
    if len(used) > 1:
        parts = [_MIXED, *(f"\n{number_format.value}:\n\n{HARDWARE[number_format]}" for number_format in used)]
    told = f"\n{_CACHE[served.cache]}"
    if served.cache is not KVCache.none and served.architecture in serving.UNSCALED_IN_SGLANG:
        told += f" {_QWEN2_ON_SGLANG}"
    return "\n".join([*parts, told]) + "\n"


def size_line(sizes: dict[str, Any]) -> str:
    """What export.hf.write returned, as a sentence."""
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    return (
        f"{before / 1e6:.1f} MB in BF16, {after / 1e6:.1f} MB here ({before / after:.2f} times smaller): "
        f"{sizes['quantized']} linears quantized, {sizes['tensors']} tensors in {sizes['files']} file(s)."
    )


def commands_text(served: serving.Served, recipe: Recipe) -> str:
    """The commands of every server that reads the checkpoint, in a block."""
    load = serving.Load(ranks=recipe.export.tensor_parallel)
    return "```bash\n" + "\n".join(serving.commands(served, load).values()) + "\n```\n"


def _checks(out: Path) -> str:
    lines = [
        "`halfbyte verify` reads the files back with a reader of its own and compares every tensor with the trained"
        " model, bit for bit; its result is `verify.json` in the run folder.",
        "",
        "```bash",
        f"halfbyte verify {shlex.quote(str(out.resolve().parent.parent))}",
        "```",
        "",
        f"`{out.name}/halfbyte.json` lists the SHA-256 of every file: compare after copying the directory.",
        "A server's kernels may add in another order than the evaluation did, so single tokens can differ.",
    ]
    return "\n".join(lines) + "\n"
