"""What the runs of a soak left: losses, distances of final weights, kills and their cost; as JSON and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from halfbyte.training import retention
from halfbyte.training.errors import OK
from halfbyte.training.files import read_json
from halfbyte.training.saved_weights import read_weights
from halfbyte.training.shape import read_shape

TOLERATED = 2.0
"""On a GPU a disturbed run may end so many times as far from the undisturbed ones as they are from each other."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        seconds: Since the run's begin.
        rank: Of the process.
        moment: "start", "training" or "save".
        checkpoint: Step of the newest checkpoint; 0 without one.
        repeated: Steps that were done after it, and are done again.
    """

    seconds: float
    rank: str
    moment: str
    checkpoint: int
    repeated: int


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        folder: Its run folder.
        code: Its exit code; negative if it was cut off.
        seconds: From begin to end.
        start_seconds: Of them not in training steps of the last start: imports, calibration, saves.
        losses: Of every step; none where training did not end.
        kills: What was done to it.
        restarts: How often it started itself again.
        saves: `checkpoints` of train.json, without the last, which training waits for.
    """

    folder: Path
    code: int
    seconds: float
    start_seconds: float
    losses: list[float]
    kills: list[Kill]
    restarts: int
    saves: list[dict[str, float]]


def left_by(folder: Path, code: int, seconds: float, kills: list[Kill], restarts: int) -> Outcome:
    """Read what a run of `halfbyte train` left."""
    path = folder / "train.json"
    train = read_json(path) if path.exists() else {"losses": [], "seconds_per_step": [], "checkpoints": []}
    start = max(0.0, seconds - sum(train["seconds_per_step"]))
    return Outcome(folder, code, seconds, start, train["losses"], kills, restarts, train["checkpoints"][:-1])


def moment(step: int, *, saving: bool) -> str:
    """What a process is doing that has done steps up to `step` since its start, 0 for none."""
    return "save" if saving else "training" if step else "start"


def distance(one: Outcome, other: Outcome, model: Path) -> dict[str, float]:
    """How far the final weights and losses of two runs are from each other.

    Args:
        one: A run that ended.
        other: Another one.
        model: Hugging Face directory of the model that both started from.

    Returns:
        "largest" and "rms" absolute difference of the weights, in their checkpoint's dtype; "loss": largest absolute
        difference of a step's loss, nats.

    Raises:
        UserError: a checkpoint is damaged.
    """
    shape = read_shape(model / "config.json")
    newest = [retention.latest(run.folder / "checkpoints") for run in (one, other)]
    pairs = zip(*(read_weights(path, shape, ()) for path in newest if path), strict=True)
    largest = squares = count = 0.0
    for mine, its in pairs:
        apart = (mine.tensor.double() - its.tensor.double()).abs()
        largest = max(largest, float(apart.max()))
        squares, count = squares + float(apart.square().sum()), count + apart.numel()
    losses = max(abs(mine - its) for mine, its in zip(one.losses, other.losses, strict=True))
    return {"largest": largest, "rms": (squares / count) ** 0.5, "loss": losses}


def judge(outcomes: Sequence[Outcome], model: Path) -> dict[str, Any]:
    """The figures of a soak, as far as it has come.

    Returns:
        "runs": of each run its name, code, seconds, restarts, final loss, kills; "spread": distance of the undisturbed
        two, None without them; "disturbed": distance of the third from the nearer of them, None unless it ended;
        "lost_per_kill": seconds, None without kills; "saves": `cost_of_saves`.
    """
    ended = [run for run in outcomes if run.code == OK]
    spread = distance(ended[0], ended[1], model) if len(ended) > 1 else None
    disturbed = lost = None
    if len(ended) == 3:
        far = [distance(ended[2], run, model) for run in ended[:2]]
        disturbed = min(far, key=lambda found: found["largest"])
        usual = (ended[0].seconds + ended[1].seconds) / 2
        lost = (ended[2].seconds - usual) / len(ended[2].kills) if ended[2].kills else None
    runs = [
        {
            "name": run.folder.name,
            "code": run.code,
            "seconds": run.seconds,
            "steps": len(run.losses),
            "final_loss": run.losses[-1] if run.losses else None,
            "restarts": run.restarts,
            "kills": [asdict(kill) for kill in run.kills],
        }
        for run in outcomes
    ]
    saves = cost_of_saves([save for run in outcomes for save in run.saves])
    return {"runs": runs, "spread": spread, "disturbed": disturbed, "lost_per_kill": lost, "saves": saves}


def cost_of_saves(saves: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """What saves beside training cost it; None without any.

    Args:
        saves: Of each its seconds, stall_seconds of them in training's way, wait_seconds of these (saving.py).

    Returns:
        "number"; "seconds", "stall_seconds" and "share", stall over seconds: medians; "longest_stall": seconds;
        "waited": how many waited for the deletion of an old one, or had the next one wait.
    """
    if not saves:
        return None
    return {
        "number": len(saves),
        "seconds": median(save["seconds"] for save in saves),
        "stall_seconds": median(save["stall_seconds"] for save in saves),
        "share": median(save["stall_seconds"] / save["seconds"] for save in saves),
        "longest_stall": max(save["stall_seconds"] for save in saves),
        "waited": sum(save["wait_seconds"] > 0 for save in saves),
    }


def verdict(content: Mapping[str, Any], *, gpu: bool) -> bool:
    """Whether the disturbed run ended where the undisturbed ones do."""
    spread, disturbed = content["spread"], content["disturbed"]
    if spread is None or disturbed is None:
        return False
    if gpu:
        return disturbed["largest"] <= TOLERATED * spread["largest"]
    return not any((*spread.values(), *disturbed.values()))


def document(content: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """The figures as Markdown.

    Args:
        content: What `judge` returns.
        about: What the soak ran on, by name.
    """
    lines = [*(f"- {name}: {value}" for name, value in about.items()), ""]
    head = ("run", "exit code", "seconds", "steps", "final loss", "kills", "restarts", "steps repeated")
    lines += [_row(head), "|" + "---|" * len(head)]
    for run in content["runs"]:
        loss = "-" if run["final_loss"] is None else f"{run['final_loss']:.6f}"
        repeated = sum(kill["repeated"] for kill in run["kills"])
        cells = (run["code"], f"{run['seconds']:.0f}", run["steps"], loss, len(run["kills"]), run["restarts"], repeated)
        lines.append(_row((run["name"], *cells)))
    for name, title in (("spread", "undisturbed, undisturbed"), ("disturbed", "disturbed, nearer undisturbed")):
        if content[name] is not None:
            found = content[name]
            apart = f"weights {found['largest']:.3g} at most, {found['rms']:.3g} RMS; losses {found['loss']:.3g}"
            lines += ["", f"Differences, {title}: {apart}."]
    if content["lost_per_kill"] is not None:
        lines += ["", f"Lost per kill: {content['lost_per_kill']:.1f} s."]
    if content["saves"] is not None:
        cost = content["saves"]
        lines += [
            "",
            f"Saves beside training: {cost['number']}; medians: {cost['seconds']:.2f} s, of which training stood still "
            f"for {cost['stall_seconds']:.3f} s ({cost['share']:.1%}); at most {cost['longest_stall']:.3f} s. "
            f"{cost['waited']} waited for the deletion of an old one, or the next one had to wait for them.",
        ]
    kills = [kill for run in content["runs"] for kill in run["kills"]]
    if kills:
        head = ("kill", "after, s", "rank", "in", "newest checkpoint", "steps repeated")
        lines += ["", _row(head), "|" + "---|" * len(head)]
        for number, kill in enumerate(kills, 1):
            done = (f"{kill['seconds']:.0f}", kill["rank"], kill["moment"], kill["checkpoint"], kill["repeated"])
            lines.append(_row((number, *done)))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
