"""Export, verify, gate, release: the stages on files. A team of processes shares out what is written and compared.

    checkpoint -> export/candidate (exported, verified) -> scored -> judged -> export/hf (released, verdict inside)

A checkpoint for serving is a candidate until the gate has judged it: nothing stands at export/hf that was not verified
and released.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.export import handoff, hf
from halfbyte.export.card import card_text
from halfbyte.export.copied import broken_copies
from halfbyte.export.folder import move
from halfbyte.export.imported import with_source_bytes
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.record import RECORD, altered_file, broken_hashes, file_hash, record_verdict
from halfbyte.export.team import ALONE, Team
from halfbyte.launch.console import Console
from halfbyte.launch.pipeline import judges_export, trained_name
from halfbyte.launch.rescore import rescore
from halfbyte.launch.revision import revision
from halfbyte.launch.scored import kinds, read_control, read_stages
from halfbyte.launch.verify_report import raise_problems, with_further
from halfbyte.training import gate, integrity, retention
from halfbyte.training.config import Format, Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.hf_map import HFWeight
from halfbyte.training.model_config import read_config
from halfbyte.training.model_source import is_quantized
from halfbyte.training.shape import planned_linears, read_shape

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "nemo-toolkit", "lightning", "transformers", "halfbyte")


def versions() -> dict[str, str]:
    """Versions of what made the files, and the git revision of this package where it is a checkout."""
    found, commit = {name: metadata.version(name) for name in PACKAGES}, revision(40)
    return found if commit is None else found | {"halfbyte revision": commit}


def judge(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Compare per-item scores and write gate.json.

    Raises:
        UserError: a stage was not evaluated, stages were scored on different items, gate.control is no scored BF16 run,
            or the newest checkpoint was not the one scored.
    """
    checkpoint = scored_checkpoint(recipe, folder)
    stages = read_stages(folder) if recipe.evaluate.tasks else {}
    stage = control = None
    if recipe.gate.control is not None and recipe.method != Method.bf16:
        stage, control = read_control(recipe, Path(recipe.gate.control))
    verdict = gate.judge(recipe.gate, method=recipe.method, kinds=kinds(recipe), stages=stages, control=stage)
    verdict |= {"checkpoint": checkpoint, "control": control}
    write_json(folder / "gate.json", verdict)
    write_json(folder / "state.json", read_json(folder / "state.json") | {"gate": checkpoint})
    return verdict


def scored_checkpoint(recipe: Recipe, folder: Path) -> str:
    """Name of the newest checkpoint, if it is the one that evaluate.json scores."""
    newest = newest_checkpoint(folder).name
    if not recipe.evaluate.tasks:  # only a BF16 control may have none
        return newest
    marks = read_json(folder / "state.json")
    scored = marks.get("keep_weights" if recipe.method == Method.ptq else f"evaluate.{trained_name(recipe)}")
    if scored is None or newest != f"step_{scored:08d}":
        state = "no trained model" if scored is None else f"the model after step {scored}"
        raise UserError(f"{folder}: evaluate.json scores {state}, the newest checkpoint is {newest}; evaluate it first")
    if judges_export(recipe) and marks.get("evaluate.exported") != scored:
        raise UserError(f"{folder}: the exported files of {newest} were not scored; evaluate them (halfbyte evaluate)")
    return newest


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    last = retention.latest(folder / "checkpoints")
    if last is None:
        raise UserError(f"{folder / 'checkpoints'}: no checkpoint; train first (halfbyte train {folder})")
    return last


def trained_weights(recipe: Recipe, folder: Path, only: Collection[str] | None = None) -> Iterator[HFWeight]:
    """The newest checkpoint's tensors in Hugging Face naming; with `only` those of these names.

    Raises:
        UserError: there is no checkpoint.
    """
    from halfbyte.training import saved_weights

    last, source = newest_checkpoint(folder), Path(recipe.model.path)
    weights = saved_weights.read_weights(last, read_shape(source / "config.json"), _formats(recipe), only)
    return with_source_bytes(weights, open_checkpoint(source)) if is_quantized(source) else weights


def weight_errors(folder: Path) -> dict[str, float]:
    """Hugging Face module name -> relative RMS error of its weight: after training, else after calibration.

    Raises:
        UserError: quantize.json or train.json is damaged.
    """
    path, trained = folder / "quantize.json", folder / "train.json"
    layers, after = read_json(path), read_json(trained) if trained.exists() else {}
    with damage(path):
        found = after.get("weight_relative_rms_error", {})
        entries = layers["layers"].items()
        return {name: found.get(key, of["weight_relative_rms_error"]) for key, of in entries for name in of["hf"]}


def _check_newest(folder: Path, team: Team) -> None:
    """Compare the newest checkpoint's files with their checksums, each process a share.

    Raises:
        UserError: they are not as they were saved.
    """
    last = newest_checkpoint(folder)
    reason = integrity.damage(last, rank=team.rank, world=team.size)
    if reason is not None:
        raise UserError(integrity.damaged_line(last, reason))


def _formats(recipe: Recipe) -> dict[str, Format]:
    """Module name -> format of every quantized linear."""
    return planned_linears(read_shape(Path(recipe.model.path) / "config.json"), recipe)


def released(folder: Path) -> Path:
    """Where the checkpoint for serving stands once it is released."""
    return folder / "export" / "hf"


def candidate(folder: Path) -> Path:
    """Where it stands until then."""
    return folder / "export" / "candidate"


def exported(folder: Path) -> Path | None:
    """The export of the newest checkpoint: the candidate or what was released, whichever it is; None if there is none.

    Raises:
        UserError: there is no checkpoint, or an export's halfbyte.json is damaged.
    """
    newest = newest_checkpoint(folder).name
    for out in (candidate(folder), released(folder)):
        if (out / RECORD).exists() and read_json(out / RECORD).get("checkpoint") == newest:
            return out
    return None


def prepare(recipe: Recipe, folder: Path, console: Console, *, resume: bool, team: Team = ALONE) -> Path:
    """Export the newest checkpoint as a candidate, every process its own files, and verify it.

    Args:
        recipe: The recipe.
        folder: The run folder.
        console: Gets a line per stage.
        resume: Keep an export of this checkpoint that was verified and whose files are as they were then.
        team: The processes that call this together.

    Returns:
        The exported directory.

    Raises:
        UserError: it does not verify; it stays a candidate, and verify.json says all that is wrong with it.
    """
    out = _standing(folder, console, team) if resume else None
    if out is not None:
        return out
    with console.stage("export") as notes:
        sizes = _export(recipe, folder, team, console)
        size = f"{sizes['bytes_before'] / 1e6:.1f} MB -> {sizes['bytes_after'] / 1e6:.1f} MB"
        notes.append(f"{size} in {sizes['files']} file(s)")
    with console.stage("verify") as notes:
        report = verify(recipe, folder, candidate(folder), console, team)
        notes.append(f"{report['tensors']} tensors, {report['mismatches']} mismatches")
    raise_problems(report, folder)
    team.on_first(lambda: remember(folder, verified=True))
    return candidate(folder)


def _standing(folder: Path, console: Console, team: Team) -> Path | None:
    """The verified export of the newest checkpoint if its files are as they were verified, each process a share."""

    def verified() -> Path | None:
        out = exported(folder)
        return out if out is not None and known(folder).get("verified") else None

    out = team.on_first(verified)
    if out is None:
        return None
    shares = team.on_every(lambda: broken_hashes(out, rank=team.rank, size=team.size))
    record = team.on_first(lambda: altered_file(out / RECORD, known(folder).get("record_sha256")))
    altered = [*record, *(line for share in shares for line in share)]
    if altered:
        console.say(f"  {altered[0]}; exporting it again")
    return None if altered else out


def known(folder: Path) -> dict[str, Any]:
    """What the run knows about its export (export/export.json), empty if there is none.

    Keys: checkpoint, verified, sizes; record_sha256, of the export's halfbyte.json; also, further layout -> SHA-256 of
    its halfbyte.json, or of the archive.
    """
    path = folder / "export" / "export.json"
    return read_json(path) if path.exists() else {}


def remember(folder: Path, **entries: Any) -> None:
    """Put entries into export/export.json."""
    write_json(folder / "export" / "export.json", known(folder) | entries)


def forget_export(folder: Path) -> None:
    """What was exported will not be the newest checkpoint, even if that gets the same name."""
    (folder / "export" / "export.json").unlink(missing_ok=True)


def _export(recipe: Recipe, folder: Path, team: Team, console: Console) -> dict[str, Any]:
    model_dir = Path(recipe.model.path)
    own = hf.own_weights(recipe, model_dir, team)
    team.on_every(lambda: _check_newest(folder, team))
    checkpoint = team.on_first(lambda: newest_checkpoint(folder).name)
    team.on_first(lambda: remember(folder, checkpoint=checkpoint, verified=False, sizes={}))
    sizes = hf.write(
        _watched(trained_weights(recipe, folder, own.keys()), console, "export", sum(own.values())),
        recipe,
        model_dir=model_dir,
        out=candidate(folder),
        checkpoint=checkpoint,
        versions=versions(),
        team=team,
    )
    team.on_first(lambda: remember(folder, sizes=sizes, record_sha256=file_hash(candidate(folder) / RECORD)))
    return sizes


def _watched(weights: Iterator[HFWeight], console: Console, name: str, total: int) -> Iterator[HFWeight]:
    """The same weights, under a bar of their bytes in BF16."""
    with console.progress(name, total) as advance:
        for weight in weights:
            yield weight
            advance(2 * weight.tensor.numel())


def release(recipe: Recipe, folder: Path, verdict: dict[str, Any]) -> Path:
    """Give the verified export its verdict and its place at export/hf, with export/HANDOFF.md beside it.

    Returns:
        export/hf.

    Raises:
        UserError: the verdict is about another checkpoint, or there is no verified export of the newest one.
    """
    check_verdict(folder, verdict)
    out, record = exported(folder), known(folder)
    if out is None or not record.get("verified"):
        raise UserError(f"{folder}: no verified export of the newest checkpoint; export it first (halfbyte export)")
    architecture = read_config(out / "config.json")["architectures"][0]
    made = (recipe, _formats(recipe).values(), verdict, record["sizes"], versions(), architecture)
    record_verdict(out, verdict, card_text(*made, licensed=any(out.glob("LICENSE*"))))
    remember(folder, record_sha256=file_hash(out / RECORD))
    if out != released(folder):
        move(out, released(folder))
    handoff.write_handoff(released(folder), *made)
    return released(folder)


def check_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Refuse a verdict about another checkpoint than the newest, or about scores that were replaced (UserError)."""
    newest = newest_checkpoint(folder).name
    if verdict["checkpoint"] != newest:
        raise UserError(
            f"{folder}: gate.json judges {verdict['checkpoint']}, the newest checkpoint is {newest}; gate it first"
        )
    if read_json(folder / "state.json").get("gate") != newest:
        raise UserError(f"{folder}: gate.json is older than the scores; gate it first (halfbyte gate {folder})")


def withdraw(folder: Path) -> None:
    """A gate that does not pass leaves nothing at export/hf, not even an older export; a current one is a candidate."""
    out = exported(folder)
    if out is not None and out == released(folder):
        record_verdict(out, None)
        remember(folder, record_sha256=file_hash(out / RECORD))
        move(out, candidate(folder))
    shutil.rmtree(released(folder), ignore_errors=True)
    (folder / "export" / "HANDOFF.md").unlink(missing_ok=True)


def check_again(recipe: Recipe, folder: Path, console: Console, further: Sequence[str] = ()) -> dict[str, Any]:
    """Verify what stands: the export of the newest checkpoint, or else what was released before it.

    Args:
        recipe: The recipe.
        folder: The run folder.
        console: Gets a bar.
        further: Lines about what was made from the export.

    Raises:
        UserError: nothing was exported.
    """
    report = verify(recipe, folder, exported(folder) or released(folder), console, ALONE, further)
    if known(folder):  # a further layout is made again from an export that is sound itself
        remember(folder, verified=report["problem_count"] == len(further))
    return report


def verify(
    recipe: Recipe, folder: Path, out: Path, console: Console, team: Team, further: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare the files at `out` with the trained weights; rank 0 scores the decoded model and writes verify.json.

    Args:
        recipe: The recipe.
        folder: The run folder.
        out: The exported directory.
        console: Gets a bar.
        team: The processes that call this together.
        further: Lines about what was made from the export, which belong into the report.

    Returns:
        The report; not raised, so that the caller decides what a finding means.
    """
    from halfbyte.export import verify as check

    own = hf.own_weights(recipe, Path(recipe.model.path), team)
    weights = _watched(trained_weights(recipe, folder, own.keys()), console, "verify", sum(own.values()))
    report = check.verify(out, weights, recipe, team)
    return team.on_first(lambda: _completed(recipe, folder, out, report, further))


def _completed(
    recipe: Recipe, folder: Path, out: Path, report: dict[str, Any], further: Sequence[str]
) -> dict[str, Any]:
    """The report as it is in verify.json: with copied files, what the decoded model scores, and `further` lines."""
    found = [
        *altered_file(out / RECORD, known(folder).get("record_sha256")),
        *broken_copies(out, Path(recipe.model.path)),
    ]
    if report["ok"] and not found and recipe.verify.items and recipe.evaluate.tasks:
        report["rescored"] = rescore(recipe, folder, out)
        off = {name: task for name, task in report["rescored"].items() if not task["ok"]}
        found += [f"{name}: the decoded model scores differently: {task}" for name, task in off.items()]
    report["problems"] += found
    report["problem_count"] += len(found)
    report = with_further(report, further)
    write_json(folder / "verify.json", report)
    return report
