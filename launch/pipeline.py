"""The stages of a run, in order. Start reading here.

    import -> evaluate BF16 -> calibrate -> evaluate PTQ -> train (QAT, QAD) -> evaluate
           -> export (a candidate) -> verify -> evaluate what the exported files decode to
           -> gate -> release (the candidate becomes export/hf)

The first two lines need all processes of the layout and happen in `together`: the model's stages are methods of `Work`
(stages.py), and every process exports and verifies files of its own (handover.prepare). The last line works on files
and happens in `alone`, on rank 0. Each stage writes one JSON into the run folder, so a stopped run goes on where it was
and any stage can be run again by itself.
"""

import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.launch.console import Console
from halfbyte.training import environment, logs, retention
from halfbyte.training.config import Judges, Method, Recipe
from halfbyte.training.errors import CAUSE, FAILED, LOST, OK, UserError
from halfbyte.training.files import damage, read_json, write_json
from halfbyte.training.interrupt import Interrupted, Stop

STAGES = ("calibrate", "evaluate", "train", "gate", "export", "verify")
SCORED = ("calibrate", "evaluate", "train", "gate")
"""A run that hands nothing over: all that a sweep over settings needs."""
TOGETHER = ("calibrate", "evaluate", "train")
"""Stages that need the layout's process group; the others read files."""


def run_stages(recipe: Recipe, stages: Sequence[str], stop: Stop, *, allow_failed_gate: bool = False) -> int:
    """Run `stages` in this process, one of the layout's.

    Args:
        recipe: Resolved recipe; run.dir exists and holds resolved.yaml.
        stages: Some of STAGES. SCORED or all: what a run folder already holds is not done again. Fewer: these are. Or
            "sensitivity" or "generate" alone, which are not stages of a run.
        stop: Installed signal handling.
        allow_failed_gate: Export even if the gate does not pass, with the verdict in the files.

    Returns:
        The exit code.

    Raises:
        UserError: a stage stopped; its message is one line.
    """
    if list(stages) == ["generate"]:
        from halfbyte.launch.generate import generate

        generate(recipe, stop)
        return OK
    if list(stages) == ["sensitivity"]:
        from halfbyte.launch.sensitivity import measure

        measure(recipe, stop)
        return OK
    if list(stages) == ["teacher"]:
        from halfbyte.launch.teacher import write

        write(recipe, stop)
        return OK
    resume = set(SCORED) <= set(stages)
    first = environment.coordinates()[0] == 0
    if any(stage in TOGETHER for stage in stages) and not (resume and _trained_and_scored(recipe)):
        first = together(recipe, [stage for stage in stages if stage in TOGETHER], stop, resume=resume)
    rest = [stage for stage in stages if stage not in TOGETHER]
    return alone(recipe, rest, resume=resume, allow_failed_gate=allow_failed_gate) if first and rest else OK


def together(recipe: Recipe, stages: Sequence[str], stop: Stop, *, resume: bool) -> bool:
    """Everything that needs the model in memory under the layout; collective.

    Returns:
        Whether this process is rank 0, which goes on alone.
    """
    from halfbyte.training.runtime import close_runtime, on_first_rank, open_runtime

    started = time.perf_counter()
    runtime = open_runtime(recipe)
    from halfbyte.launch.stages import Work
    from halfbyte.training import model_identity

    on_first_rank(runtime, lambda: model_identity.check(recipe, Path(recipe.run.dir)))
    work = Work.open(recipe, runtime, stop, Console(runtime.first), resume=resume, started=started)
    on_first_rank(runtime, lambda: model_identity.begin(recipe, work.folder))
    work.evaluate("bf16", wanted="evaluate" in stages)
    if recipe.method != Method.bf16:
        work.calibrate()
        work.evaluate("ptq", wanted="evaluate" in stages and recipe.evaluate.ptq)
    if recipe.method == Method.ptq:
        work.keep_weights()
    else:
        work.train(wanted="train" in stages)
        work.evaluate(trained_name(recipe), wanted="evaluate" in stages)
    if judges_export(recipe):
        work.evaluate_exported(wanted="evaluate" in stages)
    close_runtime()  # a failure skips this: the process ends, and the others may be inside a collective
    return runtime.first


def judges_export(recipe: Recipe) -> bool:
    """Whether the gate judges the exported files, so that they have to be scored."""
    return recipe.method != Method.bf16 and recipe.gate.judges == Judges.exported and bool(recipe.evaluate.tasks)


def _trained_and_scored(recipe: Recipe) -> bool:
    """Whether the run folder holds all that `together` makes: then no process needs the model."""
    path = Path(recipe.run.dir) / "state.json"
    marks = read_json(path) if path.exists() else {}
    wanted: dict[str, int] = {"evaluate.bf16": 0} if recipe.evaluate.tasks else {}
    if recipe.method != Method.bf16 and recipe.evaluate.tasks and recipe.evaluate.ptq:
        wanted |= {"evaluate.ptq": 0}
    steps = 0 if recipe.method == Method.ptq else recipe.train.steps
    if recipe.method == Method.ptq:
        wanted |= {"keep_weights": 0}
    else:
        wanted |= {"train": steps} | ({f"evaluate.{trained_name(recipe)}": steps} if recipe.evaluate.tasks else {})
    if judges_export(recipe):
        wanted |= {"evaluate.exported": steps}
    newest = retention.latest(Path(recipe.run.dir) / "checkpoints")
    kept = newest is not None and retention.step_of(newest) == steps
    return kept and all(marks.get(name) == value for name, value in wanted.items())


def trained_name(recipe: Recipe) -> str:
    """Name of the last stage in evaluate.json: the method, or `bf16_trained` for the control."""
    return "bf16_trained" if recipe.method == Method.bf16 else recipe.method.value


def alone(recipe: Recipe, stages: Sequence[str], *, resume: bool, allow_failed_gate: bool) -> int:
    """Gate, export, verify: on files, in one process.

    Returns:
        0, or the gate's exit code.
    """
    from halfbyte.launch import export as also
    from halfbyte.launch import handover
    from halfbyte.launch import report as written
    from halfbyte.launch.summary import summary_text
    from halfbyte.launch.verify_report import raise_problems
    from halfbyte.training import model_identity
    from halfbyte.training.gate import exit_code

    console, folder = Console(True), Path(recipe.run.dir)
    code = OK
    if {"export", "verify"} & set(stages):
        model_identity.check(recipe, folder)
    if "gate" in stages:
        with console.stage("gate") as notes:
            notes.append(handover.judge(recipe, folder)["verdict"])
    if {"gate", "export"} & set(stages):
        verdict = read_json(folder / "gate.json")
        with damage(folder / "gate.json"):
            code = exit_code(verdict)
        if "export" in stages:
            handover.check_verdict(folder, verdict)
            handover.prepare(recipe, folder, console, resume=resume)
            with console.stage("release") as notes:
                released = code == OK or allow_failed_gate
                if released:
                    notes.append(str(handover.release(recipe, folder, verdict)))
                else:
                    handover.withdraw(folder)
                    also.withdraw_also(folder)
                    notes.append(f"no: the gate says {verdict['verdict']} (--allow-failed-gate overrides)")
            if released:
                also.convert_also(recipe, folder, console)
    verified = None
    if "verify" in stages and not resume:
        with console.stage("verify") as notes:
            verified = handover.check_again(recipe, folder, console, also.altered(folder))
            notes.append(f"{verified['tensors']} tensors, {verified['mismatches']} mismatches")
    with console.stage("report") as notes:
        notes.append(written.summary(written.write(recipe, folder, to_wandb=resume)))
    if verified is not None:
        raise_problems(verified, folder)
    if (folder / "gate.json").exists():
        console.say(summary_text(recipe, folder))
    return code


def worker(argv: Sequence[str]) -> int:
    """Entry of one process under torchrun or srun: RESOLVED_YAML STAGE... [--allow-failed-gate].

    A failure leaves its one line in <run.dir>/errors/rank<N>.json for the parent, and a traceback beside it when it was
    not a UserError. What libraries say is in <run.dir>/logs/rank<N>.log.
    """
    words, flags = [w for w in argv if not w.startswith("--")], [w for w in argv if w.startswith("--")]
    folder = Path(words[0]).parent
    with logs.captured(folder, environment.coordinates()[0]) as in_file, logs.lasting_output():
        code = _work(folder, words, flags, in_file=in_file)
        logs.OWN.info("ends with code %d", code)
    return code


def _work(folder: Path, words: Sequence[str], flags: Sequence[str], *, in_file: bool) -> int:
    stop = Stop()
    stop.install()
    try:
        try:
            environment.set_process_environment()
            if not in_file:
                environment.quiet_libraries()
            from halfbyte.training.resolve import load

            recipe = load(Path(words[0]), [])
            return run_stages(recipe, words[1:], stop, allow_failed_gate="--allow-failed-gate" in flags)
        finally:
            stop.close()
    except UserError as error:
        _report(folder, str(error), error.code)
        if not isinstance(error, Interrupted):  # it may be stopped because another one failed
            _leave_cause(folder, error.code)
        return error.code
    except BaseException as error:  # noqa: BLE001 - the process ends here: one line says why, a file has the traceback
        full = _memory(error)
        message = full or f"{type(error).__name__}: {_line(error)}"
        died = _lost(error)
        code = LOST if died else FAILED
        details = _report(folder, message, code, died=died).with_suffix(".txt")
        with suppress(OSError):  # where there is no room for it, its line has to do
            details.write_text(traceback.format_exc())
            _report(folder, f"{message} (traceback: {details})", code, died=died)
        if full:
            _leave_cause(folder, code)
        return code


def _leave_cause(folder: Path, code: int) -> None:
    """Leave an exit code that no peer's end can have brought about, unless another process was first."""
    with suppress(OSError), (folder / "errors" / CAUSE).open("x") as file:
        file.write(f"{code}\n")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _lost(error: BaseException) -> bool:
    """Whether a device or a peer went away: the same start, repeated, may well succeed."""
    import torch

    return isinstance(error, torch.AcceleratorError | torch.distributed.DistError) and not _memory(error)


def _memory(error: BaseException | None) -> str | None:
    """What to do where a GPU's memory ran out, also in the capture of a graph, which ends in another error."""
    import torch

    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    facts = ". ".join(_line(error).split(". ")[:3])
    return (
        f"GPU memory ran out ({facts}): lower train.micro_batch, in an evaluation evaluate.tokens_per_batch, or set "
        "train.cuda_graphs=never (in a pipeline) or train.recompute=true; halfbyte plan says what a layout needs"
    )


def _report(folder: Path, message: str, code: int, *, died: bool = False) -> Path:
    path = folder / "errors" / f"rank{environment.coordinates()[0]}.json"
    content: dict[str, Any] = {"time": time.time(), "message": message, "code": code, "died": died}
    logs.OWN.info(message)
    try:
        write_json(path, content)
    except UserError:  # a full disk is no reason to die without a word
        logs.tell(f"error: {message}")
    return path


if __name__ == "__main__":
    environment.die_with_parent()
    sys.exit(worker(sys.argv[1:]))
