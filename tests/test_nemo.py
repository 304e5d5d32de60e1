"""A .nemo archive out of a run and into the next one changes no quantizer; one from anybody gets one clear line."""

import hashlib
import io
import json
import os
import pickle
import runpy
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_tools import LLAMA, QWEN3, UNTIED, model_folder, recipe
from safetensors.torch import load, load_file, save, save_file

from halfbyte.export import hf, nemo, quantizer_state
from halfbyte.export.record import record_verdict
from halfbyte.export.verify import verify
from halfbyte.launch import export, handover
from halfbyte.launch.check import plan_text
from halfbyte.launch.console import Console
from halfbyte.launch.imported import adopt, plain_weights, start_from, unpack
from halfbyte.training import checkpoint, model, nemo_archive, quantize
from halfbyte.training.choices import BlockScale, Container
from halfbyte.training.config import Format, LayerFormat, Method, Recipe, SecondScale
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import read_json, write_json
from halfbyte.training.kv_format import KVCache
from halfbyte.training.model_config import read_config
from halfbyte.training.resolve import of_run, resolve
from halfbyte.training.resolve import save as save_recipe
from halfbyte.training.rules import find_shape, problems
from halfbyte.training.shape import planned_linears, read_shape

WORLD = runpy.run_path(str(Path(__file__).parent / "workers" / "world.py"))
VERSIONS = {"torch": "2", "halfbyte": "0.1.0", "nemo-toolkit": "3.0.0"}


def finished(folder: Path, config: dict, run: Recipe) -> Recipe:
    """A run folder as training leaves it, but for the training: calibrated random weights, exported and released."""
    source = model_folder(folder / "tiny-llama", config)
    run.model.path, run.run.dir, run.train.steps = str(source), str(folder / "run"), 1
    place, shape = folder / "run", read_shape(source / "config.json")
    with WORLD["world_of_one"]() as runtime:
        gpt = WORLD["random_model"](runtime, run, shape=shape)
        tokens = torch.arange(48).remainder(config["vocab_size"]).view(2, 24)
        report = quantize.quantize(gpt, run, lambda stage: stage(tokens, tokens * 0 + torch.arange(24), None))
        write_json(place / "quantize.json", report)
        checkpoint.save(checkpoint.Trainable(gpt), {}, place / "checkpoints" / "step_00000001")
    save_recipe(run, place / "resolved.yaml")
    weights = handover.trained_weights(run, place)
    out = handover.released(place)
    hf.write(weights, run, model_dir=source, out=out, checkpoint="step_00000001", versions=VERSIONS)
    record_verdict(out, {"verdict": "pass"}, "# card\n")
    return run


def mixed() -> Recipe:
    run = recipe(cache=KVCache.fp8)
    run.quantize.layers = {"model.layers.0.*": LayerFormat.fp8, "*.o_proj": LayerFormat.bf16}
    run.quantize.scale_2, run.export.files = SecondScale.amax, 3
    return run


def best_blocks() -> Recipe:
    run = recipe(Format.w4a16_nvfp4)
    run.quantize.block_scale = BlockScale.four_over_six
    return run


RUNS = {
    "cache": (UNTIED, recipe(cache=KVCache.nvfp4)),
    "mixed": (QWEN3, mixed()),
    "mxfp4": (LLAMA, recipe(Format.mxfp4)),
    "w4a8": (LLAMA, recipe(Format.w4a8_nvfp4_fp8)),
    "four over six": (LLAMA, best_blocks()),
}


def next_run(folder: Path, archive: Path, *options: str) -> Recipe:
    """The recipe of a run that starts from an archive, which is unpacked into its folder."""
    base = [f"model.path={archive}", f"run.dir={folder / 'next'}", "method=ptq", "train.sequence_length=32"]
    return unpack(adopt(resolve("tiny", [*base, "quantize.calibration_samples=2", *options])))


@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_from_an_archive_exports_the_same_bytes(tmp_path: Path, kind: str):
    config, made = RUNS[kind]
    run = finished(tmp_path, config, made)
    place = Path(run.run.dir)
    archive = export.export_as(place, "nemo", None, None, allow_failed_gate=False)
    assert {path.name for path in place.glob("export/*")} == {"hf", archive.name, "export.json"}
    again = next_run(tmp_path, archive)
    source, shape, report = Path(again.model.path), read_shape(place / "export/hf/config.json"), tmp_path / "q.json"
    assert read_shape(source / "config.json") == shape
    assert planned_linears(shape, again) == planned_linears(shape, run)
    with WORLD["world_of_one"]() as runtime:
        gpt = model.build(shape, again, runtime)
        with plain_weights(source, again, runtime) as folder:
            model.import_hf(gpt, folder, shape, runtime)
        start_from(again, gpt, shape, runtime, report)
        quantize.restore(gpt, again, report)
        checkpoint.save(checkpoint.Trainable(gpt), {}, Path(again.run.dir) / "checkpoints" / "step_00000000")
    before = read_json(place / "quantize.json")
    assert {key: value for key, value in read_json(report).items() if key != "source"} == before
    out, weights = tmp_path / "again", handover.trained_weights(again, Path(again.run.dir))
    hf.write(weights, again, model_dir=source, out=out, checkpoint="step_00000000", versions=VERSIONS)
    files = sorted(path.name for path in out.glob("model*"))
    one = load_all(handover.released(place))
    other = load_all(out)
    assert files
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name
    assert verify(out, handover.trained_weights(again, Path(again.run.dir)), again)["problems"] == []


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_an_export_that_settles_verify_json_renews_the_report(tmp_path: Path):
    """And only such a one: nothing else of the report is made of a conversion."""
    run = finished(tmp_path, LLAMA, recipe())
    place = Path(run.run.dir)
    line = f"{place / 'export/model.nemo'} changed after the export (SHA-256 differs)"
    found = {"tensors": 5, "elements": 9, "mismatches": 0, "rescored": {}, "ok": False}
    found |= {"problems": ["export/hf: a finding of its own", line], "problem_count": 2, "further": [line]}
    write_json(place / "verify.json", found)
    export.export_as(place, "nemo", None, None, allow_failed_gate=False)
    page = (place / "report.html").read_text()
    assert "changed after the export" not in page
    assert "NOT VERIFIED" in page  # for the line that is about the release itself
    assert "a finding of its own" in page
    (place / "report.html").unlink()
    export.export_as(place, "nemo", None, None, allow_failed_gate=False)
    assert not (place / "report.html").exists()


# ---- what an archive holds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = recipe(cache=KVCache.fp8)
    made.export.shard_gb = 5e-5
    return finished(tmp_path_factory.mktemp("made"), UNTIED, made)


@pytest.fixture(scope="module")
def archive(run: Recipe) -> Path:
    return export.export_as(Path(run.run.dir), "nemo", None, None, allow_failed_gate=False)


def content(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_it_holds_weights_as_trained_and_the_hash_of_every_file(run: Recipe, archive: Path):
    files = content(archive)
    assert list(files)[:4] == ["model_config.yaml", "halfbyte.json", "config.json", "quantizers.json"]
    record = json.loads(files["halfbyte.json"])
    assert (record["format"], record["gate"], record["checkpoint"]) == ("nemo", {"verdict": "pass"}, "step_00000001")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "halfbyte.json"}
    assert {name: entry["sha256"] for name, entry in record["files"].items()} == hashes
    assert (files["LICENSE"], files["README.md"]) == (b"yours", b"# card\n")
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 1
    weights = {name: tensor for shard in shards for name, tensor in load(files[shard]).items()}
    trained = {weight.name: weight for weight in handover.trained_weights(run, Path(run.run.dir))}
    assert weights.keys() == trained.keys() == json.loads(files["model.safetensors.index.json"])["weight_map"].keys()
    assert all(torch.equal(weights[name], weight.tensor) for name, weight in trained.items())
    numbers, report = load(files["quantizers.safetensors"]), read_json(Path(run.run.dir) / "quantize.json")
    for key, layer in report["layers"].items():
        for module in layer["hf"]:
            for side in ("weight", "input"):
                assert float(numbers[f"{module}.{side}_quantizer.amax"]) == layer["amax"][side], key
                assert float(numbers[f"{module}.{side}_quantizer.scale"]) == layer["scale_2"][side], key
    cache = report["caches"]["decoder.layers.1.self_attention"]["value"]
    assert float(numbers["model.layers.1.self_attn.v_proj.output_quantizer.scale"]) == cache["scale"]
    assert not any(name.endswith(nemo_archive.PICKLES) for name in files)


def test_nemo_reads_its_config(archive: Path):
    """The connector of the NeMo that is installed, which nobody here wrote."""
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    found: Any = SaveRestoreConnector().restore_from(None, str(archive), return_config=True)
    assert found.target == nemo.TARGET
    assert (found.sizes.layers, found.recipe.quantize.kv_cache) == (2, "fp8")
    assert yaml.safe_load(content(archive)["model_config.yaml"])["halfbyte_version"] == "0.1.0"


def test_the_bytes_depend_on_the_checkpoint_alone(run: Recipe, archive: Path, tmp_path: Path):
    export.export_as(Path(run.run.dir), "nemo", tmp_path / "x.nemo", None, allow_failed_gate=False)
    assert (tmp_path / "x.nemo").read_bytes() == archive.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]


def test_a_plan_is_made_without_unpacking(archive: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = adopt(resolve("tiny", [f"model.path={archive}"]))
    shape, unread = find_shape(shown)
    assert unread == []
    assert shape is not None
    assert "nvfp4" in plan_text(shown, shape)
    assert list(tmp_path.iterdir()) == []


def test_it_is_unpacked_once_and_again_when_it_is_another(archive: Path, tmp_path: Path):
    mine = tmp_path / "mine.nemo"
    mine.write_bytes(archive.read_bytes())
    folder = Path(next_run(tmp_path, mine).model.path)
    assert folder == tmp_path / "next" / "unpacked" / "mine"
    assert not (folder / "model_config.yaml").is_symlink()
    inode = (folder / "config.json").stat().st_ino
    assert Path(next_run(tmp_path, mine).model.path) == folder
    assert (folder / "config.json").stat().st_ino == inode
    (folder / "halfbyte.json").write_text("{}")
    next_run(tmp_path, mine)
    assert (folder / "config.json").stat().st_ino != inode


def test_a_run_folder_that_was_moved_finds_what_was_unpacked_in_it(archive: Path, tmp_path: Path):
    mine = Path(shutil.copy(archive, tmp_path / "mine.nemo"))
    save_recipe(next_run(tmp_path, mine), tmp_path / "next" / "resolved.yaml")
    mine.unlink()
    moved = (tmp_path / "next").rename(tmp_path / "moved")
    found = of_run(moved / "resolved.yaml")
    assert (found.run.dir, found.model.path) == (str(moved), str(moved / "unpacked" / "mine"))
    assert problems(found, need_weights=True) == []
    assert of_run(moved / "resolved.yaml", ["model.path=elsewhere/x"]).model.path == str(Path("elsewhere/x").absolute())


def test_a_release_gets_its_archive_and_loses_it(run: Recipe, archive: Path, tmp_path: Path):
    """export.also: made once, kept while it is current, and removed when another model or none is released."""
    place, before, inode = Path(run.run.dir), archive.read_bytes(), archive.stat().st_ino
    wanted = replace(run, export=replace(run.export, also=[Container.nemo]))
    export.convert_also(wanted, place, Console(False))
    assert archive.stat().st_ino == inode
    assert export.altered(place) == []
    archive.write_bytes(before[:-1] + b"x")  # behind the last file: nobody reads it, but it is not what was made
    assert export.altered(place) == [f"{archive} changed after the export (SHA-256 differs)"]
    export.convert_also(wanted, place, Console(False))
    assert archive.read_bytes()[-1] == 0
    assert export.altered(place) == []
    older = content(archive)
    older["halfbyte.json"] = older["halfbyte.json"].replace(b"source_sha256", b"source_sha512")
    packed(archive, older)
    export.convert_also(run, place, Console(False))
    assert not archive.exists()
    export.convert_also(wanted, place, Console(False))
    assert content(archive)["quantizers.safetensors"] == older["quantizers.safetensors"]
    export.withdraw_also(place)
    assert not archive.exists()
    archive.write_bytes(before)


# ---- refusals on the way out


def test_bad_commands_are_one_line(run: Recipe, tmp_path: Path):
    place = Path(run.run.dir)
    for words, source, to in (
        ("is no run folder", handover.released(place), tmp_path / "x.nemo"),
        ("end its name with .nemo", place, tmp_path / "x"),
    ):
        with pytest.raises(UserError, match=words):
            export.export_as(source, "nemo", to, None, allow_failed_gate=False)
    assert list(tmp_path.iterdir()) == []


def test_a_release_of_another_checkpoint_makes_no_archive(run: Recipe, tmp_path: Path, monkeypatch):
    """A release that is not what the trained weights quantize to, and one that is not of the newest checkpoint."""
    place, out = Path(run.run.dir), tmp_path / "x.nemo"

    def other(only):
        for weight in handover.trained_weights(run, place, only):
            yield replace(weight, tensor=-weight.tensor) if "down_proj" in weight.name else weight

    errors = handover.weight_errors(place)
    with pytest.raises(UserError, match=r"is not what the checkpoint quantizes to: .*down_proj"):
        nemo.write(handover.released(place), run, other, errors, out)
    monkeypatch.setattr(handover, "newest_checkpoint", lambda folder: folder / "checkpoints" / "step_00000002")
    with pytest.raises(UserError, match="was made from step_00000001, the newest checkpoint is step_00000002"):
        export.export_as(place, "nemo", out, None, allow_failed_gate=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_stood_there(run: Recipe, tmp_path: Path, monkeypatch):
    out = tmp_path / "x.nemo"
    out.write_bytes(b"older")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    for place in ("halfbyte.export.container.os.pwrite", "tarfile.TarFile.addfile"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(UserError, match="No space left"):
                export.export_as(Path(run.run.dir), "nemo", out, None, allow_failed_gate=False)
        assert out.read_bytes() == b"older"
        assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]


# ---- archives from anybody


def packed(out: Path, files: dict[str, bytes], *extra: tarfile.TarInfo, **options: Any) -> None:
    with tarfile.open(out, "w:", **options) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.size else None)


def member(name: str, kind: bytes = tarfile.REGTYPE, **settings: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in settings.items():
        setattr(made, key, value)
    return made


def one(name: str, kind: bytes = tarfile.REGTYPE, **settings: Any) -> Callable[[Path, dict[str, bytes]], None]:
    """The archive with one member more."""
    return lambda out, files: packed(out, files, member(name, kind, **settings))


def claims_ten_gigabytes(out: Path, files: dict[str, bytes]) -> None:
    """The first file's header says so; as a hole the bytes would even be there for a second file."""
    packed(out, files)
    with out.open("r+b") as file:
        header = member(next(iter(files)), size=10_000_000_000).tobuf(tarfile.GNU_FORMAT)
        file.write(header)


def long_header(kind: bytes) -> Callable[[Path, dict[str, bytes]], None]:
    """An extended header of 20 GB, which tarfile would read as a whole; the file is a hole of that size."""

    def write(out: Path, files: dict[str, bytes]) -> None:
        out.write_bytes(member("././@LongLink", kind, size=20_000_000_000).tobuf(tarfile.GNU_FORMAT))
        os.truncate(out, 20_000_001_024)

    return write


def pickled(name: str) -> Callable[[Path, dict[str, bytes]], None]:
    """What NeMo's own connector writes: loading it would make the folder `executed`."""

    def write(out: Path, files: dict[str, bytes]) -> None:
        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(out.parent / "executed"),)

        packed(out, {"./model_config.yaml": b"a: 1\n", name: pickle.dumps(Payload())}, format=tarfile.PAX_FORMAT)

    return write


def truncated(out: Path, files: dict[str, bytes]) -> None:
    packed(out, files)
    os.truncate(out, 3 * out.stat().st_size // 4)


def compressed(out: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(out, "w:gz") as tar:
        tar.addfile(member("model_config.yaml"))


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, dict[str, bytes]], None]:
    """The archive with another content of one file, and the hash that goes with it."""

    def write(out: Path, files: dict[str, bytes]) -> None:
        data, record = change(files[name]), json.loads(files["halfbyte.json"])
        record["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        packed(out, files | {name: data, "halfbyte.json": json.dumps(record).encode()})

    return write


def without(name: str) -> Callable[[Path, dict[str, bytes]], None]:
    return lambda out, files: packed(out, {key: data for key, data in files.items() if key != name})


def twice(out: Path, files: dict[str, bytes]) -> None:
    packed(out, files, member("./config.json", size=2))


def flipped(out: Path, files: dict[str, bytes]) -> None:
    name = next(name for name in files if name.startswith("model-00002"))
    packed(out, files | {name: files[name][:-1] + bytes([files[name][-1] ^ 1])})


def pax_loop(out: Path, files: dict[str, bytes]) -> None:
    """Extended headers that describe extended headers."""
    one_more = member("x", tarfile.XHDTYPE, size=0).tobuf(tarfile.USTAR_FORMAT)
    out.write_bytes(one_more * 5_000)


HOSTILE: dict[str, tuple[Callable[[Path, dict[str, bytes]], None], str]] = {
    "absolute": (one("/etc/halfbyte", size=1), "AbsolutePathError|not a plain file name"),
    "up": (one("../outside", size=1), "OutsideDestinationError"),
    "folder": (one("weights/model.safetensors", size=1), "not a plain file name"),
    "hidden": (one(".bashrc", size=1), "not a plain file name"),
    "symbolic link": (one("config.json2", tarfile.SYMTYPE, linkname="/etc/passwd"), "AbsoluteLinkError"),
    "inner link": (one("other", tarfile.SYMTYPE, linkname="config.json"), "not a plain file"),
    "hard link": (one("other", tarfile.LNKTYPE, linkname="config.json"), "not a plain file"),
    "device": (one("other", tarfile.CHRTYPE), "SpecialFileError"),
    "pipe": (one("other", tarfile.FIFOTYPE), "SpecialFileError"),
    "ten gigabytes": (claims_ten_gigabytes, "claims 10,000,000,000 bytes, more than the file has"),
    "long name": (long_header(tarfile.GNUTYPE_LONGNAME), "claim more bytes than any archive needs"),
    "long header": (long_header(tarfile.XHDTYPE), "claim more bytes than any archive needs"),
    "pax loop": (pax_loop, "not an uncompressed tar archive|lacks"),
    "twice": (twice, "'config.json' in it is there twice"),
    "truncated": (truncated, "damaged one .*unexpected end of data|claims"),
    "compressed": (compressed, "not an uncompressed tar archive"),
    "text": (lambda out, files: out.write_text("weights\n" * 200), "not an uncompressed tar archive"),
    "empty": (lambda out, files: out.touch(), "not an uncompressed tar archive"),
    "pickle": (pickled("./model_weights.ckpt"), "'model_weights.ckpt' in it is a pickle"),
    "pickles of ranks": (pickled("./tp_rank_00/model_weights.ckpt"), "is a pickle"),
    "no config.json": (without("config.json"), "lacks config.json; only archives that"),
    "no model_config.yaml": (without("model_config.yaml"), "lacks model_config.yaml"),
    "no quantizers": (without("quantizers.json"), "lacks quantizers.json"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json is listed in halfbyte.json but missing"),
    "an unlisted file": (one("other.json", size=1), "other.json is not listed in halfbyte.json"),
    "a flipped bit": (flipped, "changed after the export"),
    "not JSON": (changed("config.json", lambda _: b"{"), "config.json: not valid JSON"),
    "deep JSON": (changed("config.json", lambda _: b"[" * 100_000), "config.json: not valid JSON"),
    "another format": (changed("quantizers.json", lambda data: data.replace(b'"nvfp4"', b'"int4"')), "int4"),
    "list for object": (changed("quantizers.json", lambda _: b"[]"), "quantizers.json: missing or damaged"),
    "no layer": (
        changed("quantizers.json", lambda data: json.dumps(json.loads(data) | {"layers": {}}).encode()),
        "no linear is quantized",
    ),
    "other layers": (changed("quantizers.json", lambda data: data.replace(b"layers.1.", b"layers.7.")), "layers.7"),
    "a split layer": (
        changed("quantizers.json", lambda data: data.replace(b"layers.1.self_attn.q_proj", b"layers.1.x")),
        "does not have",
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_archive_is_one_line(archive: Path, tmp_path: Path, how: str):
    write, words = HOSTILE[how]
    bad = tmp_path / "bad.nemo"
    write(bad, content(archive))
    with pytest.raises(UserError, match=words) as error:
        next_run(tmp_path, bad)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert {path.name for path in tmp_path.rglob("*")} <= {"bad.nemo", "next", "unpacked", ".lock"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.input_quantizer.amax"), "lacks model.layers.0.mlp.up_proj.input"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_quantizer.amax"].mul_(2), "not one maximum for one fused"),
        (lambda t: t["model.layers.1.mlp.down_proj.weight_quantizer.scale"].mul_(2), "weight_quantizer.scale is not"),
        (lambda t: t["model.layers.1.mlp.down_proj.input_quantizer.amax"].fill_(torch.nan), "not one FP32 number"),
        (lambda t: t["model.layers.1.self_attn.k_proj.output_quantizer.amax"].mul_(3), "output_quantizer.scale is not"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(archive: Path, tmp_path: Path, change, words: str):
    nemo_archive.unpack(archive, tmp_path)
    numbers = load_file(tmp_path / "quantizers.safetensors")
    change(numbers)
    save_file(numbers, tmp_path / "quantizers.safetensors")
    state, shape = quantizer_state.read_state(tmp_path), read_shape(tmp_path / "config.json")
    with pytest.raises(UserError, match=words) as error:
        quantizer_state.calibration(tmp_path, state, shape)
    assert "\n" not in str(error.value)


def test_learned_scales_that_are_not_whole_are_refused(archive: Path, tmp_path: Path):
    nemo_archive.unpack(archive, tmp_path)
    shape, state = read_shape(tmp_path / "config.json"), quantizer_state.read_state(tmp_path)
    numbers = load_file(tmp_path / "quantizers.safetensors")
    name = f"model.layers.0.mlp.up_proj.{quantizer_state.LOG2}"
    for log2, words in (
        (torch.zeros(96, 4), "not all of mlp.gate_proj, mlp.up_proj in layer 0"),
        (torch.zeros(96, 5), r"\[96, 5\] is not \[96, 4\] finite numbers"),
        (torch.full((96, 4), torch.inf), "finite numbers"),
    ):
        (tmp_path / "quantizers.safetensors").write_bytes(save(numbers | {name: log2}))
        with pytest.raises(UserError, match=words):
            quantizer_state.learned_scales(tmp_path, replace(state, learned=True), shape)


def test_a_recipe_that_says_otherwise_is_refused(archive: Path, tmp_path: Path):
    bad = {
        "quantize.format=mxfp4": "quantize.format = mxfp4: .* has quantizers with nvfp4",
        "quantize.block_scale=mse": "quantize.block_scale = mse",
        "quantize.smoothing=awq_lite": "take the place of a calibration",
        "method=bf16": "take the BF16 model",
        "method=qad": "model.reference: .* needs the BF16 model",
    }
    for option, words in bad.items():
        with pytest.raises(RecipeError, match=words):
            next_run(tmp_path, archive, option)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    config = {key: value for key, value in read_config(archive / "config.json").items() if "dtype" not in key}
    (teacher / "config.json").write_text(json.dumps(config))
    run = next_run(tmp_path, archive, "method=qad", f"model.reference={teacher}")
    assert (run.method, run.quantize.kv_cache) == (Method.qad, KVCache.fp8)
