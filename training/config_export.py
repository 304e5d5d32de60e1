"""The recipe's sections `export` and `verify`. Torch-free, as config.py."""

from dataclasses import dataclass, field

from halfbyte.training.choices import Container


@dataclass
class Export:
    """The checkpoint for serving."""

    shard_gb: float = 2.0
    """Largest size of one safetensors file, gigabytes (1e9 bytes). Every process writes files of its own."""
    files: int | None = None
    """Number of safetensors files of about the same size, in place of shard_gb; at most one per weight."""
    also: list[Container] = field(default_factory=list)
    """Further layouts that a released checkpoint is converted to, each into <run.dir>/export/<name>."""
    tensor_parallel: int = 1
    """GPUs that serve together: rank files of `trtllm`, and what the serving commands are written for."""


@dataclass
class Verify:
    """The check of the exported files."""

    items: int = 8
    """Items per task on which the decoded checkpoint is scored again; 0 means none."""
