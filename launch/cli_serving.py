"""The command lines of `halfbyte engine` and `halfbyte export --format`; engine.py and export.py do the work."""

import argparse
from collections.abc import Callable
from pathlib import Path

from halfbyte.training.environment import quiet_libraries
from halfbyte.training.errors import OK, USAGE, UserError


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Options of `halfbyte export` that convert instead of exporting again."""
    parser.add_argument("--format", help="convert what was exported: compressed_tensors | trtllm | dequantized | nemo")
    parser.add_argument("--to", metavar="PATH", help="where it goes; none means RUN_DIR/export/FORMAT (model.nemo)")
    parser.add_argument("--tp", metavar="N", type=int, help="with --format trtllm: tensor-parallel size")


def add_engine(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Register `halfbyte engine`."""
    parser = add("engine", engine, "build a TensorRT engine, or write what builds it; the serving commands")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--max-batch-size", metavar="N", type=int, required=True, help="most sequences at a time")
    parser.add_argument("--max-seq-len", metavar="N", type=int, required=True, help="most tokens of a sequence")
    parser.add_argument("--tp", metavar="N", type=int, help="tensor-parallel size; none: export.tensor_parallel")
    parser.add_argument("--allow-failed-gate", action="store_true", help="take what the gate did not release")


def export_as(args: argparse.Namespace) -> int:
    """`halfbyte export RUN --format FORMAT`; returns the exit code.

    Raises:
        UserError: options that do not go together, and whatever the conversion raises.
    """
    from halfbyte.launch import export

    quiet_libraries()
    if args.format is None or args.overrides:
        raise UserError("export --to, --tp: go with --format and without key=value; give --format FORMAT", USAGE)
    to = None if args.to is None else Path(args.to)
    export.export_as(Path(args.run_dir), args.format, to, args.tp, allow_failed_gate=args.allow_failed_gate)
    return OK


def engine(args: argparse.Namespace) -> int:
    """`halfbyte engine RUN`; returns the exit code.

    Raises:
        UserError: whatever the stage raises.
    """
    from halfbyte.launch import engine as stage

    quiet_libraries()
    sizes = (args.max_batch_size, args.max_seq_len, args.tp)
    print(stage.engine(Path(args.run_dir), *sizes, allow_failed_gate=args.allow_failed_gate))
    return OK
