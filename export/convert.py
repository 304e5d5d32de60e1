"""A quantized checkpoint in another layout, made from its files: no training checkpoint and no GPU is needed.

The source is this package's export or a published directory in ModelOpt's layout. A conversion is read back by code
that shares nothing with what wrote it (export/converted.py) before it takes its place, so a folder that stands was
checked.
"""

import shutil
from pathlib import Path
from typing import Any

from halfbyte.export import compressed, converted, trtllm
from halfbyte.export.card import converted_card
from halfbyte.export.container import write_file, write_shards
from halfbyte.export.decode import decode_into
from halfbyte.export.folder import disk_errors, replacing, write_plain_json
from halfbyte.export.hf import side_files
from halfbyte.export.reader import Checkpoint, open_checkpoint
from halfbyte.export.record import CARD, RECORD, broken_hashes, file_entry, file_hash
from halfbyte.export.source import cache_of, formats_of
from halfbyte.training.choices import Container
from halfbyte.training.errors import UserError
from halfbyte.training.export_rules import container_problems
from halfbyte.training.files import read_json
from halfbyte.training.model_config import in_both_spellings
from halfbyte.training.shape import read_shape

CARRIED = ("method", "gate", "checkpoint", "recipe_sha256", "recipe", "versions")
"""Entries of the source's halfbyte.json that hold for the conversion too."""


def convert(source: Path, container: Container, out: Path, *, ranks: int) -> dict[str, Any]:
    """Convert a checkpoint, check the result against the source, and put it at `out`.

    Args:
        source: A quantized Hugging Face directory.
        container: The layout to make; not nemo.
        out: Destination; what stands there is replaced once the new one is complete and checked.
        ranks: Tensor-parallel size of the engine, for trtllm.

    Returns:
        bytes (all files), files (weight files), tensors (compared with the source).

    Raises:
        UserError: the source is damaged or cannot be held by the container, the result differs from the source, or the
            disk is full. What stood at `out` still does.
    """
    if container is Container.nemo:
        raise ValueError("an archive holds trained weights, and an exported directory has none: see export/nemo.py")
    checkpoint = open_checkpoint(source)
    formats = formats_of(checkpoint)
    if not formats:
        raise UserError(f"export format {container}: {source} is not quantized; there is nothing to convert")
    broken = broken_hashes(source) if (source / RECORD).exists() else []
    if broken:
        raise UserError(f"{broken[0]}; export it again")
    shape = read_shape(source / "config.json")
    problems = [*container_problems(container, shape, formats, cache_of(checkpoint), ranks)]
    if problems:
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems))
    if out.resolve() == source.resolve():
        raise UserError(f"--to {out}: is the checkpoint that is converted; name another folder")
    with disk_errors(out), replacing(out) as folder:
        _write(checkpoint, container, folder, ranks)
        tensors = converted.check(checkpoint, container, folder)
        for path in [*side_files(source), *source.glob(CARD)]:
            shutil.copyfile(path, folder / path.name)
        if (source / RECORD).exists() and (folder / CARD).exists():  # a published directory's card is not ours
            (folder / CARD).write_text(converted_card((folder / CARD).read_text(), container))
        write_plain_json(folder / RECORD, record_of(source, container, folder, ranks=ranks))
        size = sum(path.stat().st_size for path in folder.iterdir())
        count = len(list(folder.glob("*.safetensors")))
    return {"bytes": size, "files": count, "tensors": tensors}


def _write(checkpoint: Checkpoint, container: Container, folder: Path, ranks: int) -> None:
    if container is Container.trtllm:
        for rank in range(ranks):
            write_file(folder / f"rank{rank}.safetensors", trtllm.tensors(checkpoint, rank, ranks))
        write_plain_json(folder / "config.json", trtllm.config(checkpoint, ranks))
    elif container is Container.compressed_tensors:
        count = len({entry.file for entry in checkpoint.entries.values()})  # as many as the source has
        write_shards(folder, compressed.tensors(checkpoint), count=count, limit=0)
        section = compressed.quantization_config(checkpoint)
        config = in_both_spellings(checkpoint.config, "bfloat16") | {"quantization_config": section}
        write_plain_json(folder / "config.json", config)
    else:
        decode_into(checkpoint, folder)


def origin(source: Path, container: Container, ranks: int) -> dict[str, Any]:
    """What a conversion is made from, for its halfbyte.json: equal for two that would hold the same bytes."""
    described = source / (RECORD if (source / RECORD).exists() else "config.json")
    made = {"format": container.value, "source": source.name, "source_sha256": file_hash(described)}
    return made | ({"tensor_parallel": ranks} if container is Container.trtllm else {})


def record_of(source: Path, container: Container, folder: Path, *, ranks: int) -> dict[str, Any]:
    """The content of a conversion's halfbyte.json: what the source's says about its origin, and these files' hashes.

    Args:
        source: The checkpoint that was converted.
        container: The layout.
        folder: The conversion's files, complete but for halfbyte.json.
        ranks: As in convert.
    """
    path = source / RECORD
    made = read_json(path) if path.exists() else {}
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    record = {key: made[key] for key in CARRIED if key in made}
    return record | origin(source, container, ranks) | {"files": files}
