"""Export, verify, gate, release: the stages on files, in one process.

    checkpoint -> export/candidate (exported, verified) -> scored -> judged -> export/hf (released, verdict inside)

A checkpoint for serving is a candidate until the gate has judged it: nothing stands at export/hf that was not verified
and released.
"""

import shutil
import subprocess
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.export import handoff, hf
from halfbyte.export.card import card_text
from halfbyte.export.folder import move
from halfbyte.export.imported import with_source_bytes
from halfbyte.export.reader import open_checkpoint
from halfbyte.export.record import RECORD, record_verdict
from halfbyte.export.team import ALONE, Team
from halfbyte.launch.console import Console
from halfbyte.launch.pipeline import judges_export, trained_name
from halfbyte.launch.scored import kinds, read_control, read_stages
from halfbyte.training import gate, integrity, retention, scoring, tasks
from halfbyte.training.config import Format, Method, Recipe, TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.hf_map import HFWeight
from halfbyte.training.jsonl import read_scores
from halfbyte.training.model_source import is_quantized
from halfbyte.training.shape import planned_linears, read_shape
from halfbyte.training.statistics import paired_ratio

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "nemo-toolkit", "lightning", "transformers", "halfbyte")


def versions() -> dict[str, str]:
    """Versions of what made the files, and the git revision of this package where it is a checkout."""
    return {name: metadata.version(name) for name in PACKAGES} | _revision()


def _revision() -> dict[str, str]:
    """`halfbyte revision`: commit, and whether files differ from it; nothing outside a checkout or without git."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:  # an installed copy may lie inside somebody else's repository, which does not track this file
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True, timeout=60)
        asked = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"halfbyte revision": done.stdout.strip()}


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
        resume: Keep an export of this checkpoint that was verified.
        team: The processes that call this together.

    Returns:
        The exported directory.

    Raises:
        UserError: it does not verify; it stays a candidate, and verify.json says all that is wrong with it.
    """
    record = folder / "export" / "export.json"

    def ready() -> Path | None:
        out = exported(folder)
        return out if resume and out is not None and record.exists() and read_json(record).get("verified") else None

    out = team.on_first(ready)
    if out is not None:
        return out
    with console.stage("export") as notes:
        sizes = _export(recipe, folder, record, team, console)
        size = f"{sizes['bytes_before'] / 1e6:.1f} MB -> {sizes['bytes_after'] / 1e6:.1f} MB"
        notes.append(f"{size} in {sizes['files']} file(s)")
    with console.stage("verify") as notes:
        report = verify(recipe, folder, candidate(folder), console, team)
        notes.append(f"{report['tensors']} tensors, {report['mismatches']} mismatches")
    raise_problems(report, folder)
    team.on_first(lambda: write_json(record, read_json(record) | {"verified": True}))
    return candidate(folder)


def raise_problems(report: dict[str, Any], folder: Path) -> None:
    """Raise UserError if a verify report is not clean."""
    if not report["ok"]:
        raise UserError(f"verify failed: {report['problems'][0]} ({folder / 'verify.json'} has all of it)")


def _export(recipe: Recipe, folder: Path, record: Path, team: Team, console: Console) -> dict[str, Any]:
    model_dir = Path(recipe.model.path)
    own = hf.own_weights(recipe, model_dir, team)
    team.on_every(lambda: _check_newest(folder, team))
    started = {"checkpoint": team.on_first(lambda: newest_checkpoint(folder).name), "verified": False}
    team.on_first(lambda: write_json(record, started | {"sizes": {}}))
    sizes = hf.write(
        _watched(trained_weights(recipe, folder, own.keys()), console, "export", sum(own.values())),
        recipe,
        model_dir=model_dir,
        out=candidate(folder),
        checkpoint=started["checkpoint"],
        versions=versions(),
        team=team,
    )
    team.on_first(lambda: write_json(record, started | {"sizes": sizes}))
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
    out, record = exported(folder), read_json(folder / "export" / "export.json")
    if out is None or not record["verified"]:
        raise UserError(f"{folder}: no verified export of the newest checkpoint; export it first (halfbyte export)")
    formats = _formats(recipe).values()
    licensed = any(out.glob("LICENSE*"))
    record_verdict(out, verdict, card_text(recipe, formats, verdict, record["sizes"], licensed=licensed))
    if out != released(folder):
        move(out, released(folder))
    handoff.write_handoff(released(folder), recipe, formats, verdict, record["sizes"], versions())
    return released(folder)


def check_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Refuse a verdict about another checkpoint than the newest (UserError)."""
    newest = newest_checkpoint(folder).name
    if verdict["checkpoint"] != newest:
        raise UserError(
            f"{folder}: gate.json judges {verdict['checkpoint']}, the newest checkpoint is {newest}; gate it first"
        )


def withdraw(folder: Path) -> None:
    """A gate that does not pass leaves nothing at export/hf, not even an older export; a current one is a candidate."""
    out = exported(folder)
    if out is not None and out == released(folder):
        record_verdict(out, None)
        move(out, candidate(folder))
    shutil.rmtree(released(folder), ignore_errors=True)
    (folder / "export" / "HANDOFF.md").unlink(missing_ok=True)


def check_again(recipe: Recipe, folder: Path, console: Console) -> dict[str, Any]:
    """Verify what stands: the export of the newest checkpoint, or else what was released before it.

    Raises:
        UserError: nothing was exported.
    """
    report = verify(recipe, folder, exported(folder) or released(folder), console, ALONE)
    record = folder / "export" / "export.json"
    if record.exists():
        write_json(record, read_json(record) | {"verified": report["ok"]})
    return report


def verify(recipe: Recipe, folder: Path, out: Path, console: Console, team: Team) -> dict[str, Any]:
    """Compare the files at `out` with the trained weights; rank 0 scores the decoded model and writes verify.json.

    Returns:
        The report; not raised, so that the caller decides what a finding means.
    """
    from halfbyte.export import verify as check

    own = hf.own_weights(recipe, Path(recipe.model.path), team)
    weights = _watched(trained_weights(recipe, folder, own.keys()), console, "verify", sum(own.values()))
    report = check.verify(out, weights, recipe, team)
    return team.on_first(lambda: _rescored(recipe, folder, out, report))


def _rescored(recipe: Recipe, folder: Path, out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report with what the decoded model scores, as it is in verify.json."""
    if report["ok"] and recipe.verify.items and recipe.evaluate.tasks:
        report["rescored"] = _rescore(recipe, folder, out)
        off = [name for name, task in report["rescored"].items() if not task["ok"]]
        if off:
            report["ok"] = False
            report["problems"] += [
                f"{name}: the decoded model scores differently: {report['rescored'][name]}" for name in off
            ]
    write_json(folder / "verify.json", report)
    return report


TOLERANCE = 0.05
"""Nats per token by which the decoded model may differ on average from the training-time model. The weights are equal
bit for bit; FP4 activations flip codes where another order of summation moves a value across a rounding border. In
FP32 on the CPU the two agree to the last digit; in BF16 single tokens differ by tenths of a nat, so the mean is
judged by its 99 % interval: the check fails when the whole interval lies outside the tolerance."""
CONFIDENCE = 0.99


def _rescore(recipe: Recipe, folder: Path, out: Path) -> dict[str, Any]:
    """Score the decoded checkpoint in transformers, without Megatron, on the first items of every task."""
    import torch

    from halfbyte.export.served import decoded_model
    from halfbyte.training.evaluate import item_limit
    from halfbyte.training.fetch import load_tokenizer

    cuda = torch.cuda.is_available()
    name = "bfloat16" if cuda else "float32"
    model = decoded_model(out, dtype=getattr(torch, name)).to("cuda" if cuda else "cpu")
    tokenizer = load_tokenizer(out)
    limit = read_shape(out / "config.json").max_positions
    stage = "ptq" if recipe.method == Method.ptq else trained_name(recipe)
    report: dict[str, Any] = {}
    for task in recipe.evaluate.tasks:
        if task.kind == TaskKind.lm_eval:
            continue  # lm-eval's prompts need its own code; the built-in kinds tell a wrong checkpoint as well
        items = tasks.load_items(task, tokenizer, item_limit(task, recipe, limit))[: recipe.verify.items]
        before = {row["item"]: row for row in read_scores(folder / "evaluate" / f"{stage}.{task.name}.jsonl")}
        scores = []
        for item in items:
            with torch.no_grad():
                logits = model(tasks.pad([item], tokenizer.eos_token_id, 1).to(model.device)).logits
            scores += scoring.score_batch(logits, [item], reference=None, kl_positions=0)
        report[task.name] = _drift(scores, before) | {"compute": name}
    return report


def _drift(scores: list[scoring.Score], before: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean difference of the log-likelihood per token between two scorings of the same items, with its interval."""
    differences = [score.loglikelihood - before[score.item]["loglikelihood"] for score in scores]
    interval = paired_ratio(differences, [score.tokens for score in scores], CONFIDENCE)
    low, high = (interval.low, interval.high) if len(scores) > 1 else (interval.estimate, interval.estimate)
    return {
        "n": len(scores),
        "nats_per_token_difference": interval.estimate,
        "interval": [low, high],
        "greedy_matches_equal": sum(score.correct == before[score.item]["correct"] for score in scores),
        "tolerance": TOLERANCE,
        "ok": low <= TOLERANCE and high >= -TOLERANCE,
    }
