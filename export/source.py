"""What an already quantized directory says about itself: the format of every linear, and of the key/value cache.

hf_quant_config.json decides where it is there, else `quantization_config` in config.json; the same order as in the
servers. Directories of this package and published ones in ModelOpt's layout read alike.
"""

import json
from fnmatch import fnmatchcase
from typing import Any

from halfbyte.export.reader import Checkpoint
from halfbyte.training.config import Format
from halfbyte.training.errors import UserError
from halfbyte.training.formats import SPECS
from halfbyte.training.kv_format import KVCache

ALGORITHMS = {spec.quant_algo: name for name, spec in SPECS.items() if spec.quant_algo is not None}
CACHES = {None: KVCache.none, "FP8": KVCache.fp8, "NVFP4": KVCache.nvfp4}


def formats_of(checkpoint: Checkpoint) -> dict[str, Format]:
    """Hugging Face module name -> format of every quantized linear; empty for a checkpoint in BF16.

    Raises:
        UserError: the configs are damaged, name an unknown algorithm, or contradict the tensors.
    """
    modules = checkpoint.quantized_modules()
    said = _said(checkpoint)
    if said is None:
        if modules:
            raise UserError(
                f"{checkpoint.folder}: {modules[0]} is quantized, but no config says how; get the files again"
            )
        return {}
    where, section = said
    if section.get("format") == "mxfp4-pack-quantized":
        return dict.fromkeys(modules, _mxfp4(where, section))
    layers = section.get("quantized_layers") or {}
    formats = {name: _format(where, name, layers.get(name, section)) for name in modules}
    excluded = section.get("exclude_modules", section.get("ignore")) or []
    for name in modules:
        if any(fnmatchcase(name, str(pattern)) for pattern in excluded):
            raise UserError(f"{where}: excludes {name}, which the files hold quantized; get the files again")
    return formats


def cache_of(checkpoint: Checkpoint) -> KVCache:
    """Format of the key/value cache.

    Raises:
        UserError: the configs are damaged or name an unknown one.
    """
    said = _said(checkpoint)
    if said is None:
        return KVCache.none
    where, section = said
    named = section.get("kv_cache_quant_algo")
    if named is None and section.get("kv_cache_scheme") is not None:
        named = section["kv_cache_scheme"] if section["kv_cache_scheme"] == "NVFP4" else "FP8"
    if not isinstance(named, str | None) or named not in CACHES:
        raise UserError(f"{where}: kv_cache_quant_algo = {named}: only FP8, NVFP4 and null can be read")
    return CACHES[named]


def _said(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """(file, section) that decides; None where nothing says that the checkpoint is quantized."""
    nested, flat = checkpoint.folder / "hf_quant_config.json", checkpoint.config.get("quantization_config")
    if nested.exists():
        try:
            section = json.loads(nested.read_bytes())["quantization"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{nested}: damaged or incomplete ({error!r}); get the file again") from error
        return _section(str(nested), section)
    return None if flat is None else _section(f"{checkpoint.folder / 'config.json'} quantization_config", flat)


def _section(where: str, section: Any) -> tuple[str, dict[str, Any]]:
    kinds = {"quantized_layers": dict | None, "exclude_modules": list | None, "ignore": list | None}
    if not isinstance(section, dict) or not all(isinstance(section.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{where}: not a JSON object of quantization settings; get the file again")
    return where, section


def _format(where: str, module: str, entry: Any) -> Format:
    algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        known = ", ".join(map(str, ALGORITHMS))
        raise UserError(f"{where}: quant_algo = {algorithm} for {module}: cannot be read here, only {known}")
    return ALGORITHMS[algorithm]


def _mxfp4(where: str, section: dict[str, Any]) -> Format:
    groups = section.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    if not isinstance(group, dict):
        raise UserError(f"{where}: no config_groups; get the file again")
    return Format.mxfp4 if group.get("input_activations") else Format.w4a16_mxfp4
