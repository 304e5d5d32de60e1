"""`python -m halfbyte.bench.export FOLDER`: what the evidence about exports says, measured again.

packing     one weight to bytes in every format: seconds, on one core and on the GPU that is there
agreement   SmolLM2-135M, calibrated: its training-time model and the files decoded in transformers, token by token; and
            the .nemo archive: bytes, seconds to write and to read back
conversions the same files in every other layout: bytes, seconds to convert and to read back
size        an 8B-shaped model with random weights, written by two processes: seconds, bytes, peak memory
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from halfbyte.export import hf, nemo
from halfbyte.export.convert import convert
from halfbyte.export.pack import pack
from halfbyte.export.team import team_of
from halfbyte.training.choices import Container
from halfbyte.training.config import BlockScale, Format, Quantize, Recipe
from halfbyte.training.hf_map import HFWeight, expected_shapes
from halfbyte.training.resolve import resolve
from halfbyte.training.runtime import Runtime, open_runtime
from halfbyte.training.shape import planned_linears, read_shape

PACKED = (
    (Format.nvfp4, BlockScale.amax),
    (Format.nvfp4, BlockScale.four_over_six),
    (Format.nvfp4, BlockScale.mse),
    (Format.mxfp4, BlockScale.amax),
    (Format.fp8, BlockScale.amax),
)
"""Formats and rules for block scales that `packing` times."""
WINDOW = 512
"""Tokens that are scored in one pass."""
SHAPE = "llama31_8b.json"
LINEAR_AMAX, INPUT_AMAX = 0.2, 8.0
"""Any maxima: the time to write does not depend on them."""


def packing(device: str, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Pack a BF16 [4096, 14336] that lies on `device`: the best of some repeats, per format; results go to the CPU."""
    tensor = torch.randn(4096, 14336, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16().to(device)
    weight = HFWeight("model.layers.0.mlp.down_proj.weight", tensor, True, tensor.abs().max(), torch.tensor(8.0))
    torch.set_num_threads(1)
    for number_format, rule in PACKED:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            packed = pack(weight, Quantize(format=number_format, block_scale=rule))
            seconds.append(time.perf_counter() - started)
        name = f"{number_format.value} {rule.value}"
        rates = {key: size / min(seconds) / 1e6 for key, size in _bytes(tensor, packed).items()}
        yield {"packing": name, "device": device, "ms": round(1e3 * min(seconds), 1)} | {
            f"{key}_MB_per_s": round(rate) for key, rate in rates.items()
        }


def _bytes(tensor: torch.Tensor, packed: dict[str, torch.Tensor]) -> dict[str, int]:
    return {"bf16": tensor.nbytes, "packed": sum(part.nbytes for part in packed.values())}


def agreement(folder: Path, tokens: int, number_format: str) -> dict[str, Any]:
    """Top-1 agreement of the training-time model with its exported files, teacher-forced on held-out text.

    Args:
        folder: Gets the model, the export and the checkpoint.
        tokens: Positions to compare.
        number_format: The value of quantize.format.
    """
    from halfbyte.export.served import decoded_model
    from halfbyte.export.verify import verify
    from halfbyte.training import checkpoint, model, quantize
    from halfbyte.training.fast_path import weights_once
    from halfbyte.training.fetch import fetch, load_tokenizer
    from halfbyte.training.saved_weights import read_weights

    source = folder / "smollm2"
    if not source.exists():
        fetch("smollm2", source)
    options = ["method=ptq", f"model.path={source}", f"quantize.format={number_format}", "quantize.block_scale=amax"]
    options += ["quantize.smoothing=none", "quantize.weights=round", f"run.dir={folder / 'run'}", "train.dtype=float32"]
    recipe = resolve("smollm2_135m_nvfp4_ptq", [*options, "parallel.pipeline=1", "parallel.last_stage_layers=null"])
    runtime, shape = open_runtime(recipe), read_shape(source / "config.json")
    windows = _windows(recipe, load_tokenizer(source), tokens)
    gpt = model.build(shape, recipe, runtime)
    model.import_hf(gpt, source, shape, runtime)
    positions = torch.arange(WINDOW).expand(1, -1)

    def run(stage: torch.nn.Module, rows: torch.Tensor = windows[-4:]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [stage(row[None], positions, None)[0].argmax(-1) for row in rows]

    layers = quantize.quantize(gpt, recipe, run)["layers"].values()
    saved = folder / "run" / "checkpoints" / "step_00000000"
    checkpoint.save(checkpoint.Trainable(gpt), {}, saved)
    with weights_once(gpt):
        trained = torch.stack(run(gpt.eval(), windows))

    def weights(only: Collection[str] | None = None) -> Iterator[HFWeight]:
        return read_weights(saved, shape, planned_linears(shape, recipe), only)

    out, started = folder / f"hf_{number_format}", time.perf_counter()
    sizes = hf.write(weights(), recipe, model_dir=source, out=out, checkpoint=saved.name, versions=_versions())
    seconds = time.perf_counter() - started
    errors = {name: layer["weight_relative_rms_error"] for layer in layers for name in layer["hf"]}
    started = time.perf_counter()
    archive = nemo.write(out, recipe, weights, errors, folder / "model.nemo")
    archive["seconds"] = round(time.perf_counter() - started, 1)
    mismatches = verify(out, weights(), recipe)["mismatches"]
    decoded = decoded_model(out)
    with torch.no_grad():
        served = torch.stack([decoded(row[None]).logits[0].argmax(-1) for row in windows])
    same = int((served == trained).sum())
    return {
        "format": number_format,
        "tokens": trained.numel(),
        "top1_equal": same,
        "agreement": same / trained.numel(),
        "mismatches": mismatches,
        "seconds": round(seconds, 1),
        **sizes,
        "nemo": archive,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "megatron-core", "nvidia-modelopt", "nemo-toolkit", "transformers", "compressed-tensors")
    return {name: metadata.version(name) for name in (*packages, "safetensors", "halfbyte")}


def _windows(recipe: Recipe, tokenizer: Any, tokens: int) -> torch.Tensor:
    """int64 [n, WINDOW]: the held-out texts of the recipe, one after the other."""
    import gzip

    task = next(task for task in recipe.evaluate.tasks if task.name == "english")
    with gzip.open(task.data, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    count = -(-tokens // WINDOW)
    return ids.repeat(-(-count * WINDOW // len(ids)))[: count * WINDOW].view(count, WINDOW)


def conversions(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Convert the NVFP4 export of `agreement`: seconds, reading back included, and bytes of all files."""
    rows = []
    for container in Container:
        if container is Container.nemo:
            continue  # of a checkpoint, not of an export: measured by `agreement`
        started = time.perf_counter()
        made = convert(folder / "hf_nvfp4", container, folder / container.value, ranks=ranks)
        rows.append({"container": container.value, "seconds": round(time.perf_counter() - started, 1), **made})
    return rows


def size(folder: Path, processes: int, files: int) -> dict[str, Any]:
    """Write an 8B-shaped model in NVFP4 from several processes; seconds and peak memory of each."""
    from importlib.resources import files as resources

    source = folder / "shape_8b"
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text((resources("halfbyte.recipes") / "shapes" / SHAPE).read_text())
    (source / "tokenizer.json").write_text("{}")
    disk = [_disk(folder / "noise", 2_000_000_000)]
    with tempfile.TemporaryDirectory(dir=folder) as meeting:  # of this run: a file store outlives one that was killed
        torch.multiprocessing.spawn(_member, (processes, files, folder, Path(meeting)), nprocs=processes)
        found = [json.loads((Path(meeting) / f"{rank}.json").read_text()) for rank in range(processes)]
    slowest = max(one["seconds"] for one in found)
    written = found[0]["bytes_after"] / slowest / 1e6
    disk.append(_disk(folder / "noise", 2_000_000_000))
    return {
        **{key: found[0][key] for key in ("bytes_before", "bytes_after", "files", "quantized")},
        "processes": processes,
        "seconds": round(slowest, 1),
        "cpu_seconds": [round(one["cpu"], 1) for one in found],
        "read_MB_per_s": round(found[0]["bytes_before"] / slowest / 1e6),
        "written_MB_per_s": round(written),
        "disk_MB_per_s": [round(speed) for speed in disk],
        "of_disk": round(written / (sum(disk) / len(disk)), 2),
        "peak_MB_per_process": [round(one["peak"] / 1e6) for one in found],
        "before_MB_per_process": [round(one["before"] / 1e6) for one in found],
    }


def _member(rank: int, world: int, files: int, folder: Path, meeting: Path) -> None:
    """One process of `size`; leaves what it measured in `meeting`."""
    dist.init_process_group("gloo", init_method=f"file://{meeting / 'store'}", rank=rank, world_size=world)
    runtime = Runtime(rank, world, rank, world, torch.device("cpu"), torch.float32)
    team = team_of(runtime)
    recipe = Recipe()
    recipe.quantize.format, recipe.export.files = Format.nvfp4, files
    own = hf.own_weights(recipe, folder / "shape_8b", team)
    weights = _random(folder / "shape_8b", recipe, own)
    torch.set_num_threads(1)
    before, started, cpu = _peak(), time.perf_counter(), time.process_time()
    sizes = hf.write(
        weights,
        recipe,
        model_dir=folder / "shape_8b",
        out=folder / "hf_8b",
        checkpoint="step_00000000",
        versions={},
        team=team,
    )
    spent = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    (meeting / f"{rank}.json").write_text(json.dumps({**spent, "peak": _peak(), "before": before, **sizes}))
    dist.destroy_process_group()


def _random(source: Path, recipe: Recipe, own: Collection[str]) -> Iterator[HFWeight]:
    """BF16 weights of a model that nobody trained: parts of one tensor that is made before the first is asked for."""
    shape = read_shape(source / "config.json")
    formats, amax = planned_linears(shape, recipe), (torch.tensor(LINEAR_AMAX), torch.tensor(INPUT_AMAX))
    sizes = {name: torch.Size(extent) for name, extent in expected_shapes(shape).items() if name in own}
    most = max(size.numel() for size in sizes.values())
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16().repeat(-(-most // (1 << 20)))

    def weight(name: str, size: torch.Size) -> HFWeight:
        quantized = name.removesuffix(".weight") in formats
        return HFWeight(name, noise[: size.numel()].view(size), quantized, *(amax if quantized else ()))

    return (weight(name, size) for name, size in sizes.items())


def _peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _disk(path: Path, count: int) -> float:
    """Sequential write speed of one process with fsync, MB/s; of bytes that no disk can compress."""
    block = os.urandom(16_000_000)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(count // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return count / seconds / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print JSON, a line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder; 12 GB for `size`")
    parser.add_argument("--what", nargs="+", default=["packing", "agreement", "conversions", "size"])
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--format", default="nvfp4", help="quantize.format of the agreement")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--files", type=int, default=8)
    args = parser.parse_args(argv)
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(_versions()), flush=True)
    if "packing" in args.what:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for row in packing(device):
                print(json.dumps(row), flush=True)
    if "agreement" in args.what:
        print(json.dumps(agreement(folder, args.tokens, args.format)), flush=True)
    if "conversions" in args.what:
        for row in conversions(folder, ranks=1):
            print(json.dumps(row), flush=True)
    if "size" in args.what:
        print(json.dumps(size(folder, args.processes, args.files)), flush=True)


if __name__ == "__main__":
    main()
