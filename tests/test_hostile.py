"""Damaged and hostile model directories: one clear line from verify, import and conversion; nothing is executed."""

import errno
import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_tools import UNTIED, export, recipe
from safetensors.torch import load_file, save_file

from halfbyte.export.convert import convert
from halfbyte.export.decode import write_decoded
from halfbyte.export.hf import HFWeight, write
from halfbyte.export.imported import calibration
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.rules import broken_rules
from halfbyte.export.source import cache_of, formats_of
from halfbyte.export.verify import verify
from halfbyte.launch.imported import adopt
from halfbyte.training.choices import Container
from halfbyte.training.config import Method
from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import expected_shapes
from halfbyte.training.kv_format import KVCache
from halfbyte.training.resolve import resolve
from halfbyte.training.shape import read_shape
from halfbyte.training.weight_files import check_weights

INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj"


def sharded(place: Path, method: Method) -> Path:
    run = recipe(cache=KVCache.fp8 if method is not Method.bf16 else KVCache.none)
    run.method, run.export.shard_gb = method, 3e-5
    return export(place, UNTIED, run)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp("quantized"), Method.qat)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp("plain"), Method.bf16)


# ---- ways to damage a directory


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncated(folder: Path) -> None:
    os.truncate(first(folder), first(folder).stat().st_size - 1)


def half_a_header(folder: Path) -> None:
    os.truncate(first(folder), 20)


def claims_ten_gigabytes(folder: Path) -> None:
    """The length of the header is there, as a hole in the file: a reader that trusts it fills the memory."""
    with first(folder).open("r+b") as file:
        file.write(struct.pack("<Q", 10_000_000_000))
    os.truncate(first(folder), 10_000_000_100)


def pickled(folder: Path) -> None:
    """Loading it would make the file `executed`."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder.parent / "executed"),)

    first(folder).write_bytes(pickle.dumps(Payload()))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def only_pickle(folder: Path) -> None:
    pickled(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()


def swapped(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def missing_shard(folder: Path) -> None:
    first(folder).unlink()


def change_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return changed


def traversal(folder: Path) -> None:
    """The index points at a file outside that holds the right tensor."""
    shutil.copyfile(first(folder), folder.parent / "outside.safetensors")
    change_index(lambda names: names.update({next(iter(names)): "../outside.safetensors"}))(folder)


def deep_index(folder: Path) -> None:
    (folder / INDEX).write_text("[" * 100_000)


def deep_header(folder: Path) -> None:
    first(folder).write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def endless_layers(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**12}))


def edit(change: Callable[[dict[str, torch.Tensor]], Any], name: str) -> Callable[[Path], None]:
    """Change the tensors of the file that holds `name`."""

    def edited(folder: Path) -> None:
        file = next(f for f in sorted(folder.glob("*.safetensors")) if name in load_file(f))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edited


BOTH = {
    "truncated": truncated,
    "half a header": half_a_header,
    "10 GB header": claims_ten_gigabytes,
    "pickle": pickled,
    "only pickle": only_pickle,
    "swapped shards": swapped,
    "missing shard": missing_shard,
    "path traversal": traversal,
    "absolute path": change_index(lambda names: names.update({next(iter(names)): "/etc/passwd"})),
    "no string": change_index(lambda names: names.update({next(iter(names)): {"a": 1}})),
    "deep index": deep_index,
    "deep header": deep_header,
    "deep config": deep_config,
    "endless layers": endless_layers,
    "missing tensor": edit(lambda t: t.pop(NORM), NORM),
}
PACKED = {
    "flipped scale": edit(
        lambda t: t[f"{DOWN}.weight_scale"].view(torch.uint8)[0, :1].bitwise_xor_(4), f"{DOWN}.weight_scale"
    ),
    "NaN scale": edit(lambda t: t[f"{DOWN}.weight_scale"].view(torch.uint8)[0].fill_(127), f"{DOWN}.weight_scale"),
    "wrong dtype": edit(
        lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].float()}), f"{DOWN}.weight_scale"
    ),
    "missing scale": edit(lambda t: t.pop(f"{DOWN}.weight_scale_2"), f"{DOWN}.weight_scale_2"),
}


def trained(folder: Path) -> list[HFWeight]:
    """Any weights: what verify says about unreadable files does not depend on them."""
    shapes = expected_shapes(read_shape(folder.parent / "source" / "config.json"))
    quantized = torch.tensor(0.4), torch.tensor(4.0), None
    return [
        HFWeight(name, torch.ones(shape), "_proj" in name, *(quantized if "_proj" in name else ()))
        for name, shape in shapes.items()
    ]


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert text
    assert all(len(line) < 600 for line in text.splitlines())
    return text


@pytest.mark.parametrize("kind", [*BOTH, *PACKED])
def test_a_damaged_quantized_directory_is_told_by_every_reader(quantized: Path, tmp_path: Path, kind: str):
    folder = Path(shutil.copytree(quantized, tmp_path / "hf"))
    (BOTH | PACKED)[kind](folder)
    if kind == "only pickle":
        one_line(lambda: verify(folder, trained(quantized), recipe()))  # nothing was verified: not even a report
    else:
        report = verify(folder, trained(quantized), recipe(cache=KVCache.fp8))
        assert not report["ok"]
        assert all("\n" not in line for line in report["problems"])

    def take() -> None:
        run = adopt(resolve("tiny", [f"model.path={folder}", "method=ptq", "train.sequence_length=32"]))
        calibration(open_checkpoint(folder), read_shape(folder / "config.json"), run.quantize)
        write_decoded(folder, tmp_path / "decoded")
        check_weights(tmp_path / "decoded", read_shape(folder / "config.json"))

    assert "\n" not in one_line(take)
    one_line(lambda: convert(folder, Container.dequantized, tmp_path / "out", ranks=1))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", list(BOTH))
def test_a_damaged_plain_directory_is_told_before_it_is_imported(plain: Path, tmp_path: Path, kind: str):
    folder = Path(shutil.copytree(plain, tmp_path / "hf"))
    BOTH[kind](folder)
    assert "\n" not in one_line(lambda: check_weights(folder, read_shape(folder / "config.json")))
    assert not (tmp_path / "executed").exists()


def paths(node: Any, above: tuple = ()) -> list[tuple]:
    """Where every value of a JSON document is."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [above, *(path for key, child in children for path in paths(child, (*above, key)))]


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_no_config_crashes_the_checks(quantized: Path, tmp_path: Path, name: str):
    """Every value of the configs replaced by values of every other kind."""
    folder = Path(shutil.copytree(quantized, tmp_path / "hf"))
    content = json.loads((folder / name).read_text())
    run = recipe(cache=KVCache.fp8)
    for path in paths(content):
        for value in (None, -1, 1e308, "x", [[1]], {"x": 1}):
            changed: Any = {"root": json.loads(json.dumps(content))}
            *route, last = ("root", *path)
            node = changed
            for key in route:
                node = node[key]
            node[last] = value
            (folder / name).write_text(json.dumps(changed["root"]))
            try:
                checkpoint = open_checkpoint(folder)
                assert all("\n" not in line for line in broken_rules(checkpoint, run))
                formats_of(checkpoint)
                cache_of(checkpoint)
            except UserError as error:
                assert str(error)  # noqa: PT017 - either answer is right, a crash is not


# ---- a disk that fills up, a process that dies


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_stood_there(quantized: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    convert(quantized, Container.trtllm, out, ranks=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left" in one_line(lambda: convert(quantized, Container.trtllm, out, ranks=1))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def killed(work: Callable[[], Any]) -> None:
    """Run `work` in a forked process, which has to die of SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's threads did not come along
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_conversion_or_export_looks_like_none(quantized: Path, tmp_path: Path, monkeypatch):
    """Nothing stands at the destination, and what is left of the attempt does not disturb the next one."""
    out, calls, really = tmp_path / "out", [], os.pwrite

    def dies(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*args)

    monkeypatch.setattr(os, "pwrite", dies)
    killed(lambda: convert(quantized, Container.trtllm, out, ranks=1))
    monkeypatch.undo()
    assert not out.exists()
    convert(quantized, Container.trtllm, out, ranks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def weights() -> Any:
        yield from trained(quantized)[:9]
        os.kill(os.getpid(), signal.SIGKILL)

    made, run = tmp_path / "made", recipe()
    model_dir = quantized.parent / "source"
    killed(lambda: write(weights(), run, model_dir=model_dir, out=made, checkpoint="x", versions={}))
    assert not made.exists()
    write(trained(quantized), run, model_dir=model_dir, out=made, checkpoint="x", versions={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]
