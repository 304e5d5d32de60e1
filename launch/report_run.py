"""What a report reads: the JSON files of a run folder, each there, absent for a reason, or damaged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.launch.pipeline import trained_name
from halfbyte.launch.report_blocks import Block, Missing
from halfbyte.training.config import Judges, Method, Recipe
from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json
from halfbyte.training.jsonl import read_scores


class Absent(UserError):
    """A part of the run that is not there; the message says why. Not a fault: a run may end before it."""


@dataclass(frozen=True)
class RunFiles:
    """A run folder.

    Attributes:
        recipe: The recipe, as resolved.yaml has it.
        folder: The run folder.
    """

    recipe: Recipe
    folder: Path

    def read(self, name: str, why: str) -> dict[str, Any]:
        """A JSON file.

        Args:
            name: Path inside the folder.
            why: What to say if it is not there.

        Raises:
            Absent: It is not there.
            UserError: It is damaged.
        """
        path = self.folder / name
        if not path.exists():
            raise Absent(f"{name} is not there: {why}")
        return read_json(path)

    def gate(self) -> dict[str, Any]:
        """gate.json."""
        return self.read("gate.json", "the run was not judged (halfbyte gate RUN_DIR)")

    def evaluate(self) -> dict[str, Any]:
        """evaluate.json."""
        if not self.recipe.evaluate.tasks:
            raise Absent("the recipe names no tasks (evaluate.tasks)")
        return self.read("evaluate.json", "nothing was scored yet (halfbyte evaluate RUN_DIR)")

    def quantize(self) -> dict[str, Any]:
        """quantize.json."""
        if self.recipe.method is Method.bf16:
            raise Absent("method bf16 quantizes nothing")
        return self.read("quantize.json", "nothing was calibrated yet (halfbyte run resumes)")

    def train(self) -> dict[str, Any]:
        """train.json."""
        if self.recipe.method is Method.ptq:
            raise Absent("method ptq trains nothing")
        return self.read("train.json", "training has not ended yet (halfbyte run resumes)")

    def sizes(self) -> dict[str, Any]:
        """export/export.json of a checkpoint that is there."""
        self.checkpoint()
        return self.read("export/export.json", "the export has not ended (halfbyte export RUN_DIR)")

    def record(self) -> dict[str, Any]:
        """halfbyte.json of the exported checkpoint."""
        checkpoint = self.checkpoint()
        return self.read(
            str(checkpoint.relative_to(self.folder) / "halfbyte.json"), "the export has not ended (halfbyte export)"
        )

    def verify(self) -> dict[str, Any]:
        """verify.json."""
        self.checkpoint()
        return self.read("verify.json", "the exported files were not checked (halfbyte verify RUN_DIR)")

    def checkpoint(self) -> Path:
        """Folder of the exported checkpoint: the candidate while the gate has not released it.

        Raises:
            Absent: There is none.
        """
        for name in ("candidate", "hf"):  # a candidate is newer than what was released before it
            out = self.folder / "export" / name
            if out.is_dir():
                return out
        path = self.folder / "gate.json"
        if path.exists():
            with damage(path):
                verdict = str(read_json(path)["verdict"])
            if verdict in ("fail", "inconclusive"):
                raise Absent(f"no exported checkpoint: the gate says {verdict} (--allow-failed-gate overrides)")
        raise Absent("no exported checkpoint: nothing was exported yet (halfbyte export RUN_DIR)")

    def rows(self, stage: str, task: str) -> list[dict[str, Any]]:
        """Per-item scores, the fields of scoring.Score.

        Raises:
            UserError: The file is missing or damaged.
        """
        path = self.folder / "evaluate" / f"{stage}.{task}.jsonl"
        rows = read_scores(path)
        for row in rows:
            lacking = {"item", "loglikelihood", "tokens", "kl"} - row.keys()
            if lacking:
                raise UserError(f"{path}: damaged (a score lacks {', '.join(sorted(lacking))}); evaluate again")
        return rows

    def judged(self) -> str:
        """The stage of evaluate.json that the gate judges, or would judge: exported files before the trained model.

        Raises:
            Absent: Only BF16 was scored.
            UserError: evaluate.json is missing or damaged.
        """
        stages = list(self.evaluate())
        trained = trained_name(self.recipe)
        order = [trained, "ptq"] if self.recipe.gate.judges is Judges.trained else ["exported", trained, "ptq"]
        for stage in order:
            if stage in stages:
                return stage
        raise Absent(f"evaluate.json scores {' and '.join(stages) or 'nothing'} only")

    def local(self, message: str) -> str:
        """A message without the run folder's own path, which is where the reader is."""
        return message.replace(f"{self.folder}/", "")


def guarded(files: RunFiles, what: str, source: str, build: Callable[[], list[Block]]) -> list[Block]:
    """Blocks of one part; if it is absent or damaged, one line that says so.

    Args:
        files: The run.
        what: The part, as a reader calls it.
        source: The file that it is made of, which is blamed if its content makes no sense.
        build: Makes the blocks.
    """
    try:
        with damage(files.folder / source):
            return build()
    except Absent as error:
        return [Missing(what, files.local(str(error)))]
    except UserError as error:
        return [Missing(what, files.local(str(error)), damaged=True)]
