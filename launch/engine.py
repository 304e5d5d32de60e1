"""`halfbyte engine RUN`: a TensorRT engine where one can be built here, else what is missing and how to build it there.

    TensorRT-LLM <= 1.2.1, Blackwell GPU   trtllm-build on the run's `trtllm` conversion; hash and log are kept
    newer TensorRT-LLM                     engines are gone: the directory is checked for direct loading
    neither                                the build as a shell and a Slurm script; one line says what is missing

In every case export/SERVE.md holds the commands for TensorRT-LLM, vLLM and SGLang with the sizes that were asked for.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from halfbyte.export import serving
from halfbyte.export.convert import convert, origin
from halfbyte.export.folder import disk_errors, replacing
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.record import RECORD, file_hash
from halfbyte.export.source import cache_of, formats_of
from halfbyte.export.verify import broken_directory
from halfbyte.launch.console import Console
from halfbyte.launch.export import place, serving_checkpoint
from halfbyte.launch.sbatch import container_options, log_option
from halfbyte.launch.scored import read_run
from halfbyte.training.choices import Container
from halfbyte.training.config import Recipe
from halfbyte.training.errors import USAGE, UserError
from halfbyte.training.files import read_json, write_json
from halfbyte.training.kv_format import KVCache

LAST_BUILDER = Version("1.2.1")
"""The last TensorRT-LLM with trtllm-build; after it, servers load the checkpoint itself."""
BLACKWELL = 10
"""Major compute capability from which there are FP4 tensor cores."""
BUILDER = "trtllm-build"


@dataclass(frozen=True)
class Machine:
    """What this machine has.

    Attributes:
        builder: Path of trtllm-build on PATH; None without.
        version: Of TensorRT-LLM, beside the builder or in this environment; None without.
        capabilities: Compute capability of every GPU, (major, minor).
    """

    builder: str | None
    version: Version | None
    capabilities: tuple[tuple[int, int], ...]

    @classmethod
    def probe(cls) -> "Machine":
        """Look; nothing of TensorRT-LLM is imported."""
        import torch

        builder = shutil.which(BUILDER)
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        return cls(builder, _version(builder), tuple(torch.cuda.get_device_capability(gpu) for gpu in gpus))

    @property
    def loads_directly(self) -> bool:
        """Whether this TensorRT-LLM has no engines any more."""
        return self.version is not None and self.version > LAST_BUILDER

    def missing(self) -> list[str]:
        """What a build needs and this machine lacks, in words."""
        lacks = []
        if self.version is None:
            lacks.append(f"tensorrt_llm <= {LAST_BUILDER} is not installed")
        if self.builder is None:
            lacks.append(f"{BUILDER} is not on PATH")
        if not any(major >= BLACKWELL for major, _ in self.capabilities):
            found = ", ".join(f"SM{major}{minor}" for major, minor in self.capabilities) or "none"
            lacks.append(f"no Blackwell GPU (SM{BLACKWELL}0 or newer; found: {found})")
        return lacks


def _version(builder: str | None) -> Version | None:
    """TensorRT-LLM's version: of the Python environment that the builder belongs to, else of this one."""
    python = Path(builder).with_name("python") if builder is not None else None
    try:
        if python is not None and python.exists() and python.resolve() != Path(sys.executable).resolve():
            question = "from importlib.metadata import version; print(version('tensorrt_llm'))"
            done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=True, timeout=60)
            return Version(done.stdout.strip())
        return Version(metadata.version("tensorrt_llm"))
    except (metadata.PackageNotFoundError, subprocess.SubprocessError, OSError, InvalidVersion):
        return None


def engine(folder: Path, batch: int, length: int, ranks: int | None, *, allow_failed_gate: bool) -> str:
    """Build an engine, or do what can be done here towards serving.

    Args:
        folder: A run folder with a released checkpoint.
        batch: Most sequences at a time.
        length: Most tokens of a sequence.
        ranks: Tensor-parallel size; none means export.tensor_parallel.
        allow_failed_gate: Take a checkpoint that the gate did not release.

    Returns:
        What was done, one line.

    Raises:
        UserError: bad sizes, nothing to serve, a checkpoint that no engine can hold, a build that failed, or nothing to
            build with: the scripts are written then.
    """
    recipe = read_run(folder)
    source = serving_checkpoint(recipe, folder, allow_failed_gate=allow_failed_gate)
    sizes = serving.Load(ranks or recipe.export.tensor_parallel, batch, length)
    _check_sizes(sizes, source)
    machine = Machine.probe()
    problems = broken_directory(source, recipe)
    if problems:
        raise UserError(f"{source}: cannot be served: {problems[0]} ({len(problems)} problems)")
    page = write_page(folder, source, sizes)
    if machine.loads_directly:
        _record(folder, machine, sizes, {"decision": "direct", "checkpoint": str(source)})
        return f"TensorRT-LLM {machine.version} loads {source} directly, its rules hold; commands: {page}"
    engines, command = folder / "export" / "engine", _prepare(folder, source, sizes, recipe)
    missing = machine.missing()
    if missing:
        _record(folder, machine, sizes, {"decision": "elsewhere", "missing": missing, "command": command})
        there = f"run {folder / 'export' / 'engine.sh'} or sbatch {folder / 'export' / 'engine.sbatch'} where they are"
        raise UserError(f"engine not built: {'; '.join(missing)}; {there}")
    log = _build(machine, command, engines)
    hashes = {path.name: file_hash(path) for path in sorted(engines.iterdir())}
    _record(folder, machine, sizes, {"decision": "built", "command": command, "files": hashes, "log": str(log)})
    return f"engine of {sizes.ranks} rank(s): {engines}; log: {log}; commands: {page}"


def _check_sizes(sizes: serving.Load, source: Path) -> None:
    values = {"--max-batch-size": sizes.batch, "--max-seq-len": sizes.length, "--tp": sizes.ranks}
    bad = [f"{name} {value}: not a positive number" for name, value in values.items() if value is None or value < 1]
    positions = open_checkpoint(source).config["max_position_embeddings"]
    if sizes.length is not None and sizes.length > positions:
        bad.append(f"--max-seq-len {sizes.length}: the model ends at {positions} positions; give at most that")
    if bad:
        raise UserError("\n".join(bad), USAGE)


def build_command(checkpoint: Path, out: Path, cache: KVCache, sizes: serving.Load) -> list[str]:
    """trtllm-build's command line: NVFP4 GEMMs, a paged cache, FP8 attention where the cache is FP8.

    Args:
        checkpoint: A conversion to `trtllm` for sizes.ranks GPUs.
        out: Where the engine goes.
        cache: Format of the key/value cache, none or FP8.
        sizes: Batch, length, ranks.
    """
    options = {
        "checkpoint_dir": checkpoint.resolve(),
        "output_dir": out.resolve(),
        "gemm_plugin": "nvfp4",
        "gpt_attention_plugin": "bfloat16",
        "remove_input_padding": "enable",
        "kv_cache_type": "paged",
        "tokens_per_block": serving.TOKENS_PER_PAGE,
        "use_paged_context_fmha": "enable",
        "use_fp8_context_fmha": "enable" if cache is KVCache.fp8 else "disable",
        "max_batch_size": sizes.batch,
        "max_seq_len": sizes.length,
        "workers": sizes.ranks,
    }
    return [BUILDER, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _prepare(folder: Path, source: Path, sizes: serving.Load, recipe: Recipe) -> list[str]:
    """The rank files and the scripts that build from them; the command."""
    rank_files = place(folder, Container.trtllm)
    made = read_json(rank_files / RECORD) if (rank_files / RECORD).exists() else {}
    if not origin(source, Container.trtllm, sizes.ranks).items() <= made.items():
        convert(source, Container.trtllm, rank_files, ranks=sizes.ranks)
    command = build_command(rank_files, folder / "export" / "engine", cache_of(open_checkpoint(source)), sizes)
    _write(folder / "export" / "engine.sh", f"#!/bin/bash\nset -euo pipefail\n{shlex.join(command)}\n").chmod(0o755)
    _write(folder / "export" / "engine.sbatch", sbatch_text(recipe, command, sizes.ranks))
    return command


def sbatch_text(recipe: Recipe, command: Sequence[str], ranks: int) -> str:
    """The Slurm job of one build: one node, one GPU per rank, partition, account and container of the recipe."""
    start = recipe.launch
    directives = [f"--job-name={recipe.run.name}_engine", "--nodes=1", "--ntasks=1", f"--gpus-per-node={ranks}"]
    directives += [f"--time={start.time}", log_option(Path(recipe.run.dir) / "export" / "engine-%j.log")]
    directives += [
        f"--{key}={value}" for key, value in vars(start).items() if key in ("partition", "account") and value
    ]
    container = container_options(recipe, Path.cwd())
    lines = ["#!/bin/bash", *(f"#SBATCH {word}" for word in directives), "", "set -euo pipefail"]
    return "\n".join([*lines, f"srun {shlex.join([*container, *command])}", ""])


def _build(machine: Machine, command: Sequence[str], engines: Path) -> Path:
    """Run trtllm-build into a folder that takes its place when it is whole; its output is the log.

    Raises:
        UserError: it failed, or left no engine; the last line of the log is in the message.
    """
    log = engines.with_name("engine.log")
    with Console(True).stage("engine") as notes, disk_errors(engines), replacing(engines) as partial:
        words = [str(partial) if word == str(engines.resolve()) else word for word in command]
        with log.open("w") as file:
            code = subprocess.run(
                [str(machine.builder), *words[1:]], stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        built = sorted(path.name for path in partial.glob("*.engine"))
        if code or not built:
            last = next(iter(log.read_text(errors="replace").strip().splitlines()[-1:]), "no output")
            raise UserError(
                f"{BUILDER} failed (exit code {code}, {len(built)} engine files): {last} ({log} has it all)"
            )
        notes.append(", ".join(built))
    return log


def write_page(folder: Path, source: Path, sizes: serving.Load) -> Path:
    """export/SERVE.md with the commands of every server, and the settings file that TensorRT-LLM's needs.

    Args:
        folder: The run folder.
        source: The checkpoint.
        sizes: What the server has to hold.

    Returns:
        The page.
    """
    checkpoint = open_checkpoint(source)
    formats, cache = frozenset(formats_of(checkpoint).values()), cache_of(checkpoint)
    served = serving.Served(str(source.resolve()), formats, cache, checkpoint.config["architectures"][0])
    settings = _write(folder / "export" / "trtllm-serve.yaml", yaml.safe_dump(serving.cache_settings(cache)))
    lines = [
        f"# Serving {folder.name} on {sizes.ranks} GPU(s), {sizes.batch} sequences of {sizes.length} tokens",
        "",
        "None of these commands was run where this file was written.",
    ]
    for server, command in serving.commands(served, sizes, settings).items():
        lines += ["", f"## {server}", "", "```bash", command, "```"]
    return _write(folder / "export" / "SERVE.md", "\n".join([*lines, ""]))


def _write(path: Path, text: str) -> Path:
    with disk_errors(path):
        path.write_text(text)
    return path


def _record(folder: Path, machine: Machine, sizes: serving.Load, outcome: dict[str, Any]) -> None:
    found = {"version": None if machine.version is None else str(machine.version), "builder": machine.builder}
    found |= {"capabilities": [list(pair) for pair in machine.capabilities]}
    asked = {"max_batch_size": sizes.batch, "max_seq_len": sizes.length, "tensor_parallel": sizes.ranks}
    write_json(folder / "export" / "engine.json", {**outcome, "tensorrt_llm": found, **asked})
