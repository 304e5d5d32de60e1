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

SERVERS: tuple[str, ...] = ("TensorRT-LLM", "vLLM", "SGLang")
READERS = {
    Format.nvfp4: SERVERS,
    Format.w4a16_nvfp4: SERVERS,
    Format.w4a8_nvfp4_fp8: ("TensorRT-LLM",),
    Format.mxfp4: ("vLLM",),
    Format.w4a16_mxfp4: ("vLLM",),
    Format.fp8: SERVERS,
}
"""Which servers have a reader for a format; what each needs is told in handoff.py."""
SGLANG_NAME = {Format.nvfp4: "modelopt_fp4", Format.w4a16_nvfp4: "modelopt_fp4", Format.fp8: "modelopt_fp8"}
TOKENS_PER_PAGE = 32
VLLM_CACHE = {KVCache.fp8: "fp8_e4m3", KVCache.nvfp4: "nvfp4"}
"""What vLLM is told of the cache; its nvfp4 needs SM100."""
UNSCALED_IN_SGLANG = {"Qwen2ForCausalLM"}
"""Models whose cache SGLang leaves without its scales (sgl-project/sglang#39942, open in September 2026)."""


@dataclass(frozen=True)
class Served:
    """A checkpoint as the person who serves it sees it.

    Attributes:
        folder: Path of the directory, as the commands name it.
        formats: Of the quantized linears; none for BF16.
        cache: Format of the key/value cache.
        architecture: `architectures[0]` of its config.json.
    """

    folder: str
    formats: frozenset[Format]
    cache: KVCache
    architecture: str


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


def commands(served: Served, load: Load, config: Path | None = None) -> dict[str, str]:
    """Server -> shell command, for every server that reads these formats.

    Args:
        served: The checkpoint. TensorRT-LLM reads the format of the cache from hf_quant_config.json and `config`.
        load: Sizes.
        config: Settings for trtllm-serve (cache_settings), if they were written.
    """
    trtllm = ["trtllm-serve", served.folder, *_options(load, "--tp_size", "--max_batch_size", "--max_seq_len")]
    trtllm += ["--config", str(config.resolve())] if config is not None else []
    vllm = ["vllm", "serve", served.folder]
    vllm += _options(load, "--tensor-parallel-size", "--max-num-seqs", "--max-model-len")
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", served.folder]
    sglang += _options(load, "--tp", "--max-running-requests", "--context-length")
    # a mix, and what has no name of its own, is recognized by config.json
    name = SGLANG_NAME.get(next(iter(served.formats))) if len(served.formats) == 1 else None
    sglang += ["--quantization", name] if name else []
    if served.cache is not KVCache.none:
        vllm += ["--kv-cache-dtype", VLLM_CACHE[served.cache]]
        sglang += ["--kv-cache-dtype", _sglang_cache(served)]
    all_of_them = dict(zip(SERVERS, (trtllm, vllm, sglang), strict=True))
    return {name: shlex.join(all_of_them[name]) for name in readers(served.formats)}


def _sglang_cache(served: Served) -> str:
    """FP8, also for NVFP4: it has no such cache, and its FlashInfer backend multiplies a BF16 one by the scales.

    An FP8 cache without its scales is another model than the one that was evaluated.
    """
    return "bfloat16" if served.architecture in UNSCALED_IN_SGLANG else "fp8_e4m3"


def readers(used: Collection[Format]) -> list[str]:
    """Servers that read a checkpoint of these formats; of BF16, all."""
    return [server for server in SERVERS if all(server in READERS[number_format] for number_format in used)]


def _options(load: Load, ranks: str, batch: str, length: str) -> list[str]:
    values = {ranks: None if load.ranks == 1 else load.ranks, batch: load.batch, length: load.length}
    return [word for name, value in values.items() if value is not None for word in (name, str(value))]


def cache_settings(cache: KVCache) -> dict[str, Any]:
    """Settings of trtllm-serve's --config for a paged key/value cache in the format that was trained."""
    dtype = "auto" if cache is KVCache.none else cache.value
    return {"kv_cache_config": {"dtype": dtype, "enable_block_reuse": True, "tokens_per_block": TOKENS_PER_PAGE}}
