"""HANDOFF.md: what the person who serves the checkpoint needs to know, beside the checkpoint."""

import shlex
from pathlib import Path
from typing import Any

from halfbyte.training.config import Format, Method, Recipe

_FORMAT = {
    Format.nvfp4: "NVFP4, W4A4: weights and activations in FP4 (E2M1, blocks of 16 with an E4M3 scale)",
    Format.w4a16_nvfp4: "NVFP4, W4A16: weights in FP4 (E2M1, blocks of 16 with an E4M3 scale), activations in BF16",
    Format.mxfp4: "MXFP4, W4A4: weights and activations in FP4 (E2M1, blocks of 32 with a power-of-two scale)",
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
    Format.mxfp4: """\
- vLLM only (its compressed-tensors W4A4 MXFP4 scheme). FP4 tensor cores need Blackwell; elsewhere the weights are
  unpacked and results may differ from the ones evaluated here.
- TensorRT-LLM and SGLang have no established reader for dense MXFP4 weights.""",
}


def write_handoff(
    out: Path, recipe: Recipe, verdict: dict[str, Any] | None, sizes: dict[str, Any], versions: dict[str, str]
) -> Path:
    """Write HANDOFF.md into the folder that holds the checkpoint.

    Args:
        out: The exported directory; the commands name it.
        recipe: The recipe of the run.
        verdict: Content of gate.json; None if no gate ran.
        sizes: What export.hf.write returned.
        versions: Package -> version.

    Returns:
        Path of the file.
    """
    dense = recipe.method is Method.bf16
    sections = [
        f"# Serving {recipe.run.name}\n",
        "BF16, not quantized." if dense else f"{_FORMAT[recipe.quantize.format]}.",
        f"Trained with method `{recipe.method.value}` from `{recipe.model.path}`. {_size_line(sizes)}\n",
        "## Accuracy gate\n",
        _gate_text(verdict),
        "## Commands\n",
        _commands(out, recipe),
        "None of these commands was run where this file was written: the servers are not part of halfbyte. What was"
        " checked is listed below.\n",
        "## Hardware\n",
        ("Any GPU that the server supports." if dense else _HARDWARE[recipe.quantize.format]) + "\n",
        "## What was checked, and how to check it again\n",
        _checks(out, recipe),
        "## Made with\n",
        "\n".join(f"- {name} {version}" for name, version in sorted(versions.items())),
    ]
    path = out.parent / "HANDOFF.md"
    path.write_text("\n".join(sections).rstrip() + "\n")
    return path


def _size_line(sizes: dict[str, Any]) -> str:
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    return (
        f"{before / 1e6:.1f} MB in BF16, {after / 1e6:.1f} MB here ({before / after:.2f} times smaller): "
        f"{sizes['quantized']} linears in FP4, {sizes['tensors']} tensors in {sizes['files']} file(s)."
    )


def _gate_text(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "No gate was run on this model: its accuracy is unknown.\n"
    lines = [f"Verdict: **{verdict['verdict']}**. The full report is in `halfbyte.json` under `gate`."]
    lines += [f"- {reason}" for reason in verdict.get("reasons", [])]
    return "\n".join(lines) + "\n"


def _commands(out: Path, recipe: Recipe) -> str:
    folder = shlex.quote(str(out.resolve()))
    vllm, trtllm = f"vllm serve {folder}", f"trtllm-serve {folder}"
    sglang = f"python -m sglang.launch_server --model-path {folder}"
    if recipe.method is Method.bf16:
        commands = [trtllm, vllm, sglang]
    elif recipe.quantize.format is Format.mxfp4:
        commands = [vllm]
    else:
        commands = [trtllm, vllm, f"{sglang} --quantization modelopt_fp4"]
    return "```bash\n" + "\n".join(commands) + "\n```\n"


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
            "The KV cache is not quantized. A server's kernels may add in another order than the evaluation did, so"
            " single tokens can differ."
        )
    return "\n".join(lines) + "\n"
