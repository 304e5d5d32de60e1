"""The stages that hold the model in memory, each a method of `Work`, with what they share between them."""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import torch

from halfbyte.launch.console import Console
from halfbyte.launch.imported import plain_weights, start_from
from halfbyte.training import (
    checkpoint,
    companions,
    corpus,
    data,
    evaluate,
    lora,
    lsq,
    model,
    ptq,
    quantize,
    recovery,
    retention,
)
from halfbyte.training.config import Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.fast_path import weights_once
from halfbyte.training.fetch import load_tokenizer
from halfbyte.training.files import read_json, write_json
from halfbyte.training.interrupt import Stop
from halfbyte.training.kv_format import KVCache
from halfbyte.training.model_source import brings_formats
from halfbyte.training.runtime import Runtime, on_first_rank
from halfbyte.training.schedule import collect
from halfbyte.training.served import weights_as_served
from halfbyte.training.shape import ModelShape, read_shape
from halfbyte.training.teacher_files import TeacherFiles, fingerprint, needed_windows


@dataclass
class Work:
    """One run in one process: the model as the stages have left it so far."""

    recipe: Recipe
    runtime: Runtime
    stop: Stop
    console: Console
    resume: bool
    """Leave alone what the run folder already holds."""
    shape: ModelShape
    tokenizer: Any
    gpt: Any
    exam: evaluate.Examination
    teacher: Any = None
    current: bool = field(default=False)
    """Whether `gpt` holds the trained weights."""

    @classmethod
    def open(
        cls, recipe: Recipe, runtime: Runtime, stop: Stop, console: Console, *, resume: bool, started: float
    ) -> "Work":
        """Import the BF16 model and load the evaluation items."""
        with console.stage("import") as notes:
            shape = read_shape(Path(recipe.model.path) / "config.json")
            tokenizer = load_tokenizer(Path(recipe.model.path))
            gpt, teacher = model.build(shape, recipe, runtime), None
            with plain_weights(Path(recipe.model.reference or recipe.model.path), recipe, runtime) as folder:
                model.import_hf(gpt, folder, shape, runtime)
                if recipe.method == Method.qad and recipe.distill.teacher is None:
                    teacher = model.build(shape, recipe, runtime)
                    model.import_hf(teacher, folder, shape, runtime)
                    teacher.requires_grad_(False)
            exam = evaluate.Examination.load(recipe, runtime, Path(recipe.run.dir), tokenizer, shape.max_positions)
            exam.check_vocabulary(shape.vocab)
            layout = recipe.parallel
            notes += [
                f"{shape.parameters / 1e6:.1f} M parameters",
                f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}{' SP' if layout.sequence else ''}",
                f"{str(runtime.dtype).removeprefix('torch.')} on {runtime.device.type}",
                f"process start {time.perf_counter() - started:.0f} s",
            ]
        return cls(recipe, runtime, stop, console, resume, shape, tokenizer, gpt, exam, teacher)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run.dir)

    @property
    def checkpoints(self) -> Path:
        """The folder of training checkpoints."""
        return self.folder / "checkpoints"

    @property
    def calibrated(self) -> Path:
        """The checkpoint of a calibration that changes weights; for PTQ it is the run's one checkpoint."""
        parent = self.checkpoints if self.recipe.method == Method.ptq else self.folder / "calibrated"
        return parent / retention.folder_name(0)

    def _marks(self) -> dict[str, Any]:
        """What is done, by stage, with what it was done for."""
        path = self.folder / "state.json"
        return on_first_rank(self.runtime, lambda: read_json(path) if path.exists() else {})

    def _mark(self, stage: str, value: Any) -> None:
        marks = self._marks() | {stage: value}
        if stage.startswith("evaluate."):
            marks.pop("gate", None)  # the verdict is about other scores
        on_first_rank(self.runtime, lambda: write_json(self.folder / "state.json", marks))

    def evaluate(self, stage: str, *, wanted: bool) -> None:
        """Score `stage`'s model on all tasks, unless an earlier start of this run did."""
        steps = self.recipe.train.steps if stage not in ("bf16", "ptq") else 0
        name = f"evaluate.{stage}"
        if not wanted or not self.recipe.evaluate.tasks or (self.resume and self._marks().get(name) == steps):
            return
        if steps and not self.current:
            self._load_trained()
        with contextlib.nullcontext() if stage == "bf16" else quantize.as_exported(self.gpt):
            self._score(stage)
        self._mark(name, steps)

    def _score(self, stage: str) -> None:
        with self.console.stage(f"evaluate {stage}") as notes, weights_once(self.gpt):
            scored = evaluate.evaluate(self.exam, self.gpt, stage)
            notes += [f"{task}: {evaluate.headline(scores)}" for task, scores in scored.items()]
            notes += [f"{task}: {note}" for task, note in self.exam.notes.items()]
            notes.append(f"{sum(int(scores['n']) for scores in scored.values())} items")

    def evaluate_exported(self, *, wanted: bool) -> None:
        """Export the newest checkpoint, verify it, and score on all tasks what its files decode to.

        The decoded weights take the place of the model's, so this is the last stage that needs the model.
        """
        from halfbyte.export.decode import write_decoded
        from halfbyte.export.team import team_of
        from halfbyte.launch import handover

        steps = 0 if self.recipe.method == Method.ptq else self.recipe.train.steps
        done = self.resume and self._marks().get("evaluate.exported") == steps
        if not wanted or done:
            return

        decoded = self.folder / "cache" / "decoded"
        out = handover.prepare(self.recipe, self.folder, self.console, resume=self.resume, team=team_of(self.runtime))
        scales = on_first_rank(self.runtime, lambda: write_decoded(out, decoded))
        with weights_as_served(self.gpt, self.recipe.quantize, scales):
            self._take_weights(decoded)
            self._score("exported")
        self.current = False
        on_first_rank(self.runtime, lambda: shutil.rmtree(decoded, ignore_errors=True))
        self._mark("evaluate.exported", steps)

    def _take_weights(self, folder: Path) -> None:
        """Put a Hugging Face directory's weights into the quantized model; ModelOpt's importer fills plain ones."""
        plain = model.build(self.shape, self.recipe, self.runtime)
        model.import_hf(plain, folder, self.shape, self.runtime)
        weights = dict(plain.named_parameters())
        with torch.no_grad():
            for name, parameter in self.gpt.named_parameters():
                if not companions.owns(name):  # their work is in the decoded weights
                    parameter.copy_(weights[name])

    def calibrate(self) -> None:
        """Insert the quantizers: calibrated now, or as quantize.json says."""
        path = self.folder / "quantize.json"
        with self.console.stage("calibrate") as notes:
            if brings_formats(Path(self.recipe.model.path)):
                start_from(self.recipe, self.gpt, self.shape, self.runtime, path)
            if on_first_rank(self.runtime, path.exists):
                report = quantize.restore(self.gpt, self.recipe, path)
                if ptq.changes_weights(self.recipe.quantize):
                    self._restore_weights()
                notes.append("as in quantize.json")
            else:
                report = ptq.calibrate(self.gpt, self.recipe, self.run_calibration)
                if ptq.changes_weights(self.recipe.quantize):
                    checkpoint.save(checkpoint.Trainable(self.gpt), {}, self.calibrated)
                on_first_rank(self.runtime, lambda: write_json(path, report))
            layers = report["layers"].values()
            errors = [layer["weight_relative_rms_error"] for layer in layers]
            notes.append(f"{_counted(layers)}, weight error {min(errors):.3f} to {max(errors):.3f} relative RMS")
            if self.recipe.quantize.kv_cache is not KVCache.none:
                notes.append(f"key/value cache in {self.recipe.quantize.kv_cache}")

    def _restore_weights(self) -> None:
        if not on_first_rank(self.runtime, self.calibrated.exists):
            raise UserError(f"{self.calibrated}: the calibrated weights are missing; calibrate again on a new run.dir")
        recovery.check(self.calibrated)
        checkpoint.load(checkpoint.Trainable(self.gpt), self.calibrated)
        quantize.refresh_scales(self.gpt, self.recipe.quantize)

    def run_calibration(self, stage: Any) -> None:
        """Run the calibration windows through a pipeline stage's model."""
        recipe = self.recipe
        length = recipe.quantize.calibration_length or recipe.train.sequence_length
        source = Path(recipe.quantize.calibration_data or recipe.data.train or "")
        packed = self.packed(source, length)
        windows = data.calibration_windows(packed, recipe.quantize.calibration_samples, recipe.train.seed)
        rows = max(1, recipe.evaluate.tokens_per_batch // length)
        # All data-parallel ranks see all windows: the maxima, and so every scale, are the same under any layout.
        with torch.no_grad():
            for batches in data.calibration_batches(windows, rows, self.runtime.device):
                for group in batched(batches, evaluate.GROUP):
                    collect(stage, group, None)

    def packed(self, source: Path, length: int) -> corpus.PackedDataset:
        """A text file as windows of `length` tokens: made once, then mapped from the run's cache.

        Raises:
            UserError: see corpus.prepare, and token ids that the model has no embedding for.
        """

        def prepare() -> corpus.PackedDataset:
            return corpus.prepare(source, self.tokenizer, self.recipe.data, length, self.folder / "cache")

        on_first_rank(self.runtime, lambda: len(prepare()))  # one rank tokenizes, all map the same file
        packed = prepare()
        packed.check_vocabulary(self.shape.vocab)
        return packed

    def keep_weights(self) -> None:
        """PTQ trains nothing: its weights are kept as step 0, for export and verify."""
        path = self.checkpoints / retention.folder_name(0)
        if not on_first_rank(self.runtime, path.exists):
            checkpoint.save(checkpoint.Trainable(self.gpt), {}, path)
        self._mark("keep_weights", 0)

    def train(self, *, wanted: bool) -> None:
        """Train to train.steps, from the newest checkpoint on whose files are as they were saved."""
        steps = self.recipe.train.steps
        if not wanted or (self.resume and self._trained(steps)):
            return
        from halfbyte.training.experiment import fit
        from halfbyte.training.module import Training

        assert self.recipe.data.train is not None  # resolve.py has checked it
        packed = self.packed(Path(self.recipe.data.train), self.recipe.train.sequence_length)
        last, said = recovery.newest_good(self.checkpoints)
        done = retention.step_of(last) if last else 0
        for line in said:
            self.console.say(f"  {line}, going on from {last.name if last else 'the start'}")
        if done > steps:
            raise UserError(f"train.steps = {steps}: {last} is already past it; raise train.steps or use a new run.dir")
        with self.console.stage("train") as notes:
            teacher = self.teacher if self.recipe.distill.teacher is None else self._teacher_files(packed)
            module = Training(self.gpt, teacher=teacher, recipe=self.recipe, runtime=self.runtime, data=packed)
            if done < steps:
                self._forget_scores()
            seconds = fit(module, self.recipe, self.runtime, self.stop, self.shape) if done < steps else []
            progress = module.progress
            if seconds:
                tokens = self.recipe.train.global_batch * self.recipe.train.sequence_length
                self._write_training(module, seconds, tokens)
                notes.append(
                    f"{steps} steps ({f'from {done}' if done else 'from the start'}), loss {progress.losses[0]:.4f} -> "
                    f"{progress.losses[-1]:.4f}, {tokens * len(seconds) / sum(seconds):,.0f} tokens/s"
                )
        self.current = bool(seconds)
        self._mark("train", steps)

    def _trained(self, steps: int) -> bool:
        """Whether training is done and its last checkpoint still there."""
        newest = on_first_rank(self.runtime, lambda: retention.latest(self.checkpoints))
        return self._marks().get("train") == steps and newest is not None and retention.step_of(newest) == steps

    def _forget_scores(self) -> None:
        """What is trained from here on was not scored or exported, even if a lost model of as many steps was."""
        from halfbyte.launch.handover import forget_export

        marks = {k: v for k, v in self._marks().items() if k in ("evaluate.bf16", "evaluate.ptq")}
        on_first_rank(self.runtime, lambda: write_json(self.folder / "state.json", marks))
        on_first_rank(self.runtime, lambda: forget_export(self.folder))

    def _teacher_files(self, packed: corpus.PackedDataset) -> TeacherFiles:
        folder = Path(self.recipe.distill.teacher or "")
        made_from = on_first_rank(self.runtime, lambda: fingerprint(self.recipe, packed, self.runtime.dtype))
        files = TeacherFiles(folder, made_from, needed_windows(self.recipe, packed))
        if files.note is not None:
            self.console.say(f"  note: {files.note}")
        return files

    def _write_training(self, module: Any, seconds: list[float], tokens: int) -> None:
        from halfbyte.training.telemetry import peak_gpu_bytes

        progress = module.progress
        errors = {} if self.recipe.method == Method.bf16 else quantize.weight_errors(self.gpt, self.recipe.quantize)
        content = {
            "steps": len(progress.losses),
            "losses": progress.losses,
            "loss_tokens": progress.tokens,
            "tokens_per_step": tokens,
            "seconds_per_step": seconds,
            "checkpoints": module.saves,
            "peak_gpu_bytes_rank0": peak_gpu_bytes(self.recipe, self.runtime.device),
            "weight_relative_rms_error": errors,
        }
        on_first_rank(self.runtime, lambda: write_json(self.folder / "train.json", content))

    def _load_trained(self) -> None:
        last = on_first_rank(self.runtime, lambda: retention.latest(self.checkpoints))
        if last is None:
            raise UserError(f"{self.checkpoints}: no checkpoint; train first (halfbyte train {self.folder})")
        if retention.step_of(last) != self.recipe.train.steps:
            remedy = f"go on with halfbyte train {self.folder}"
            raise UserError(f"{last}: not the last step (train.steps = {self.recipe.train.steps}); {remedy}")
        recovery.check(last)
        lsq.attach(self.gpt, self.recipe)
        lora.attach(self.gpt, self.recipe)
        checkpoint.load(checkpoint.Trainable(self.gpt), last)
        if self.recipe.method != Method.bf16:
            quantize.refresh_scales(self.gpt, self.recipe.quantize)
        self.current = True


def _counted(layers: Iterable[dict[str, Any]]) -> str:
    """How many Hugging Face linears quantize.json has in each format."""
    linears: Counter[str] = Counter()
    for layer in layers:
        linears[layer["format"]] += len(layer["hf"])
    return ", ".join(f"{count} linears in {name}" for name, count in sorted(linears.items()))
