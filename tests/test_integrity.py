"""Checksums of a checkpoint's files, and which checkpoints stay: on folders of a few bytes."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.training import integrity, retention
from halfbyte.training.config_launch import Checkpoint

FILES = {"__0_0.distcp": b"first shard", "__1_0.distcp": b"second", "__11_0.distcp": b"of rank 11", ".metadata": b"m"}


def make(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """A complete checkpoint."""
    folder.mkdir(parents=True)
    for name, content in (FILES if files is None else files).items():
        (folder / name).write_bytes(content)
    integrity.write(folder, integrity.digests(folder, FILES if files is None else files))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "step_00000001")


def test_each_rank_hashes_what_it_wrote(folder):
    (folder / integrity.NAME).unlink()
    written = {rank: integrity.written_by(folder, rank) for rank in (0, 1, 11)}
    assert written == {0: [".metadata", "__0_0.distcp"], 1: ["__1_0.distcp"], 11: ["__11_0.distcp"]}


def test_megatron_reads_the_same_file(folder):
    """Its own verification, an independent reader, takes ours."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    verify_integrity_manifest(str(folder))
    (folder / "__1_0.distcp").write_bytes(b"Second")
    with pytest.raises(CheckpointingException, match=r"__1_0\.distcp: hash mismatch"):
        verify_integrity_manifest(str(folder))


NO_FILES = '{"algorithm": "sha256", "files": {}, "bytes": {}}'
DAMAGE = {
    "flipped": (lambda f: (f / "__1_0.distcp").write_bytes(b"secomd"), "__1_0.distcp is not what was saved"),
    "truncated": (lambda f: (f / "__1_0.distcp").write_bytes(b"sec"), "__1_0.distcp has 3 bytes instead of 6"),
    "missing": (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
    "added": (lambda f: (f / "common.pt").touch(), "common.pt was not saved with it"),
    "no sums": (lambda f: (f / integrity.NAME).unlink(), "integrity.json or a file that it lists cannot be read"),
    "half the sums": (lambda f: (f / integrity.NAME).write_text('{"algo'), "cannot be read"),
    "other sums": (lambda f: (f / integrity.NAME).write_text("[]"), "cannot be read"),
    "no files": (
        lambda f: (f / integrity.NAME).write_text('{"algorithm": "sha256", "files": {}, "bytes": {}}'),
        "read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_one_of_the_ranks_and_named(folder, kind):
    damage, says = DAMAGE[kind]
    assert [integrity.damage(folder, rank=rank, world=3) for rank in range(3)] == [None] * 3
    damage(folder)
    found = [integrity.damage(folder, rank=rank, world=3) for rank in range(3)]
    assert any(says in problem for problem in found if problem)
    assert says in (integrity.damage(folder) or "")
    assert integrity.complete(folder) is (kind == "flipped")  # which alone takes reading the files


def checkpoints(place: Path, steps) -> Path:
    for step in steps:
        retention.point(make(place / retention.folder_name(step)))
    return place


def left(place: Path) -> list[int]:
    return [retention.step_of(path) for path in retention.on_disk(place)]


@pytest.mark.parametrize(
    ("keep", "keep_best", "stays"),
    [(1, 0, [8]), (2, 0, [6, 8]), (9, 0, [2, 4, 6, 8]), (1, 1, [4, 8]), (1, 2, [4, 6, 8]), (2, 1, [4, 6, 8])],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, keep_best, stays):
    losses = [5, 5, 1, 1, 2, 2, 3, 3]  # means of two: 5, 1, 2, 3
    wanted = Checkpoint(every_steps=2, keep=keep, keep_best=keep_best)
    retention.prune(checkpoints(tmp_path, (2, 4, 6, 8)), wanted, losses)
    assert left(tmp_path) == stays


def test_leftovers_go_with_the_next_good_checkpoint_only(tmp_path):
    for name in (".step_00000004.tmp", "damaged_step_00000003", ".removed_step_00000001.7"):
        (tmp_path / name).mkdir()
    assert retention.prune(tmp_path, Checkpoint(keep=1), []) == []
    assert len(list(tmp_path.iterdir())) == 3
    removed = retention.prune(checkpoints(tmp_path, [2, 4]), Checkpoint(keep=1), [1.0] * 4)
    assert len(removed) == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path not in removed) == ["last", "step_00000004"]
    retention.delete(removed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_00000004"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), unique=True, min_size=1), st.sets(st.integers(1, 9)), st.integers(1, 3))
def test_the_only_good_checkpoint_is_never_deleted(tmp_path_factory, steps, broken, keep):
    place = checkpoints(tmp_path_factory.mktemp("kept"), sorted(steps))
    for step in broken & set(steps):
        (place / retention.folder_name(step) / "__0_0.distcp").unlink()
    retention.prune(place, Checkpoint(keep=keep), [1.0] * 9)
    good = sorted(set(steps) - broken)
    assert left(place) == (good[-keep:] if good else sorted(steps))


def test_the_link_follows_what_is_there(tmp_path):
    assert retention.repair_link(tmp_path) is None
    checkpoints(tmp_path, (2, 4))
    (tmp_path / ".step_00000006.tmp").mkdir()  # a killed save
    assert retention.latest(tmp_path) == tmp_path / "step_00000004"
    aside = retention.set_aside(tmp_path / "step_00000004")
    assert aside == tmp_path / "damaged_step_00000004"
    assert retention.repair_link(tmp_path) == tmp_path / "step_00000002"
    assert (tmp_path / "last").resolve().name == "step_00000002"
    shutil.rmtree(tmp_path / "step_00000002")
    assert retention.repair_link(tmp_path) is None


def test_sizes_stand_beside_the_sums(folder):
    content = json.loads((folder / integrity.NAME).read_text())
    assert content["bytes"] == {name: len(data) for name, data in FILES.items()}
