"""The commands that serve a checkpoint, one per server that reads it. None of them is run here.

Which server reads which format, and on what hardware, is told by handoff.py.
"""

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.training.config import Format
from halfbyte.training.kv_format import KVCache

MXFP4 = {Format.mxfp4, Format.w4a16_mxfp4}
SGLANG_NAME = {Format.nvfp4: "modelopt_fp4", Format.w4a16_nvfp4: "modelopt_fp4", Format.fp8: "modelopt_fp8"}
TOKENS_PER_PAGE = 32


@dataclass(frozen=True)
class Load:
    """What a server has to hold.

    Attributes:
        ranks: GPUs that serve together (tensor parallelism).
        batch: Most sequences at a time; None leaves it to the server.
        length: Most tokens of a sequence, prompt and answer; None leaves it to the server.
    """

    ranks: int = 1
    batch: int | None = None
    length: int | None = None


def commands(out: Path, used: Collection[Format], cache: KVCache, load: Load, config: Path | None) -> dict[str, str]:
    """Server -> shell command, for every server that reads these formats.

    Args:
        out: The exported directory; the commands name its absolute path.
        used: Formats of the quantized linears; none for BF16.
        cache: Format of the key/value cache. TensorRT-LLM reads it from hf_quant_config.json and `config`; vLLM and
            SGLang know FP8 only.
        load: Sizes.
        config: Settings for trtllm-serve (cache_settings), if they were written.
    """
    folder, fp8 = str(out.resolve()), cache is KVCache.fp8
    trtllm = ["trtllm-serve", folder, *_options(load, "--tp_size", "--max_batch_size", "--max_seq_len")]
    trtllm += ["--config", str(config.resolve())] if config is not None else []
    vllm = ["vllm", "serve", folder, *_options(load, "--tensor-parallel-size", "--max-num-seqs", "--max-model-len")]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", folder]
    sglang += _options(load, "--tp", "--max-running-requests", "--context-length")
    names = [SGLANG_NAME[number_format] for number_format in set(used) if number_format in SGLANG_NAME]
    sglang += ["--quantization", names[0]] if names else []
    for command in (vllm, sglang) if fp8 else ():
        command += ["--kv-cache-dtype", "fp8_e4m3"]
    all_of_them = {"TensorRT-LLM": trtllm, "vLLM": vllm, "SGLang": sglang}
    return {name: shlex.join(all_of_them[name]) for name in readers(used)}


def readers(used: Collection[Format]) -> list[str]:
    """Servers that read a checkpoint of these formats."""
    distinct = set(used)
    if len(distinct) > 1:
        return ["TensorRT-LLM", "vLLM"]
    if distinct & MXFP4:
        return ["vLLM"]
    return ["TensorRT-LLM"] if Format.w4a8_nvfp4_fp8 in distinct else ["TensorRT-LLM", "vLLM", "SGLang"]


def _options(load: Load, ranks: str, batch: str, length: str) -> list[str]:
    values = {ranks: None if load.ranks == 1 else load.ranks, batch: load.batch, length: load.length}
    return [word for name, value in values.items() if value is not None for word in (name, str(value))]


def cache_settings(cache: KVCache) -> dict[str, Any]:
    """Settings of trtllm-serve's --config for a paged key/value cache in the format that was trained."""
    dtype = "auto" if cache is KVCache.none else cache.value
    return {"kv_cache_config": {"dtype": dtype, "enable_block_reuse": True, "tokens_per_block": TOKENS_PER_PAGE}}
