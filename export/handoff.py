"""HANDOFF.md: what the person who serves the checkpoint needs to know, beside the checkpoint."""

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.export import serving
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.kv_format import KVCache

_FORMAT = {
    Format.nvfp4: "NVFP4, W4A4: weights and activations in FP4 (E2M1, blocks of 16 with an E4M3 scale)",
    Format.w4a16_nvfp4: "NVFP4, W4A16: weights in FP4 (E2M1, blocks of 16 with an E4M3 scale), activations in BF16",
    Format.w4a8_nvfp4_fp8: "NVFP4 with FP8 activations, W4A8: weights in FP4 (E2M1, blocks of 32 with an E4M3 scale),"
    " activations in FP8 (E4M3, one static scale per tensor)",
    Format.w4a16_mxfp4: "MXFP4, W4A16: weights in FP4 (E2M1, blocks of 32 with a power-of-two scale), activations in"
    " BF16",
    Format.mxfp4: "MXFP4, W4A4: weights and activations in FP4 (E2M1, blocks of 32 with a power-of-two scale)",
    Format.fp8: "FP8, W8A8: weights and activations in FP8 (E4M3, one static scale per tensor)",
}

_HARDWARE = {
    Format.nvfp4: """\
- Blackwell (SM100, SM103, SM120): FP4 tensor cores, the arithmetic that was trained and evaluated.
- Hopper and older: no FP4 tensor cores. vLLM and SGLang run the checkpoint weight-only (Marlin kernels, BF16
  activations), so results differ from the ones evaluated here. TensorRT-LLM has no W4A4 kernel there.""",
    Format.w4a16_nvfp4: """\
- vLLM: Marlin kernels, Turing (SM75) and newer, Hopper included.
- SGLang: compute capability 8.0 and newer.
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
- Older GPUs: vLLM asks for SM89; only FP8 layers of a mixed checkpoint run there, weight-only (Marlin kernels, BF16
  activations), so results differ from the ones evaluated here.""",
}

_CACHE = {
    KVCache.none: "The KV cache is not quantized.",
    KVCache.fp8: "The KV cache is FP8 (E4M3, `k_scale` and `v_scale` beside k_proj and v_proj): keys and values were"
    " rounded to it in training and evaluation. vLLM and SGLang want `--kv-cache-dtype fp8_e4m3`, TensorRT-LLM reads it"
    " from `hf_quant_config.json`.",
    KVCache.nvfp4: "The KV cache is NVFP4 (blocks of 16 along a head; `k_scale`, `v_scale` beside k_proj and v_proj):"
    " keys and values were rounded to it in training and evaluation. TensorRT-LLM reads it from `hf_quant_config.json`"
    " and needs Blackwell; a server without it keeps the cache in BF16, or in FP8 with the same scales.",
}

_MIXED = """\
- The formats of the layers are in `quantized_layers` of `hf_quant_config.json` and of `config.json` (quant_algo
  MIXED_PRECISION). TensorRT-LLM needs a release that reads them there; older ones ask for a `quant_cfg.json`.
- SGLang is not listed: it has read MIXED_PRECISION for other architectures only.
- A GPU must run every format that is used; what each needs follows."""


def write_handoff(
    out: Path,
    recipe: Recipe,
    formats: Iterable[Format],
    verdict: dict[str, Any] | None,
    sizes: dict[str, Any],
    versions: dict[str, str],
) -> Path:
    """Write HANDOFF.md into the folder that holds the checkpoint.

    Args:
        out: The exported directory; the commands name it.
        recipe: The recipe of the run.
        formats: Of the quantized linears, one entry each; none for a BF16 checkpoint.
        verdict: Content of gate.json; None if no gate ran.
        sizes: What export.hf.write returned.
        versions: Package -> version.

    Returns:
        Path of the file.
    """
    count = Counter(formats)
    used = sorted(count)
    sections = [
        f"# Serving {recipe.run.name}\n",
        what_it_is(count),
        f"Trained with method `{recipe.method.value}` from `{recipe.model.path}`. {size_line(sizes)}\n",
        "## Accuracy gate\n",
        _gate_text(verdict),
        "## Commands\n",
        _commands(out, used, recipe),
        "None of these commands was run where this file was written: the servers are not part of halfbyte. What was"
        " checked is listed below.\n",
        "## Hardware\n",
        _hardware(used),
        "## What was checked, and how to check it again\n",
        _checks(out, recipe),
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
        return f"{_FORMAT[next(iter(count))]}."
    lines = [f"- {count[number_format]} of the linears: {_FORMAT[number_format]}" for number_format in sorted(count)]
    return "\n".join(["A mix of formats:\n", *lines, ""])


def _hardware(used: list[Format]) -> str:
    if not used:
        return "Any GPU that the server supports.\n"
    if len(used) == 1:
        return f"{_HARDWARE[used[0]]}\n"
    parts = [f"\n{number_format.value}:\n\n{_HARDWARE[number_format]}" for number_format in used]
    return "\n".join([_MIXED, *parts]) + "\n"


def size_line(sizes: dict[str, Any]) -> str:
    """What export.hf.write returned, as a sentence."""
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    return (
        f"{before / 1e6:.1f} MB in BF16, {after / 1e6:.1f} MB here ({before / after:.2f} times smaller): "
        f"{sizes['quantized']} linears quantized, {sizes['tensors']} tensors in {sizes['files']} file(s)."
    )


def _gate_text(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "No gate was run on this model: its accuracy is unknown.\n"
    lines = [f"Verdict: **{verdict['verdict']}**. The full report is in `halfbyte.json` under `gate`."]
    lines += [f"- {reason}" for reason in verdict.get("reasons", [])]
    return "\n".join(lines) + "\n"


def _commands(out: Path, used: list[Format], recipe: Recipe) -> str:
    load = serving.Load(ranks=recipe.export.tensor_parallel)
    cache = recipe.quantize.kv_cache if used else KVCache.none
    return "```bash\n" + "\n".join(serving.commands(out, used, cache, load, None).values()) + "\n```\n"


def _checks(out: Path, recipe: Recipe) -> str:
    lines = [
        "`halfbyte verify` reads the files back with a reader of its own and compares every tensor with the trained"
        " model, bit for bit; its result is `verify.json` in the run folder.",
        "",
        "```bash",
        f"halfbyte verify {shlex.quote(str(out.resolve().parent.parent))}",
        "```",
        "",
        f"`{out.name}/halfbyte.json` lists the SHA-256 of every file: compare after copying the directory.",
    ]
    if recipe.method is not Method.bf16:
        lines.append(
            f"{_CACHE[recipe.quantize.kv_cache]} A server's kernels may add in another order than the evaluation did,"
            " so single tokens can differ."
        )
    return "\n".join(lines) + "\n"
