"""The report of a run: report.html (one file, no network), report.md with report/*.png, and the same in W&B.

A run may have ended early: a part that is not there is named with its reason, a damaged file with one line.
"""

import hashlib
from pathlib import Path

from halfbyte.launch import report_curves as curves
from halfbyte.launch import report_facts as facts
from halfbyte.launch.report_blocks import Missing, Report, Section, Table
from halfbyte.launch.report_html import html
from halfbyte.launch.report_items import worst_items
from halfbyte.launch.report_markdown import markdown
from halfbyte.launch.report_numbers import stage_name
from halfbyte.launch.report_run import RunFiles, guarded
from halfbyte.launch.report_scores import head, score_blocks
from halfbyte.training.config import Method, Recipe, Wandb
from halfbyte.training.errors import UserError
from halfbyte.training.files import read_json, replace_file, write_json
from halfbyte.training.kv_format import KVCache

PARTS = (
    ("Scores", "The table of scores", "evaluate.json", score_blocks),
    ("Training", "The loss curve", "train.json", curves.loss),
    ("Quantization", "The weight errors", "quantize.json", curves.weight_errors),
    ("Quantization", "The histograms of scales", "export/hf", curves.scales),
    ("Quantization", "KL by position", "evaluate", curves.kl_by_position),
    ("Worst items", "The worst items", "evaluate", worst_items),
    ("Export", "Sizes", "export/export.json", facts.sizes),
    ("Export", "Verification", "verify.json", facts.verification),
    ("Throughput", "Throughput", "train.json", facts.throughput),
    ("Recipe", "The recipe", "resolved.yaml", facts.recipe),
    ("Versions and hashes", "Versions and hashes", "export/hf/halfbyte.json", facts.versions),
    ("Reproduce", "The command", "resolved.yaml", facts.reproduce),
)
"""(section, part, file it is made of, what makes it), in the order of the report."""


def write(recipe: Recipe, folder: Path, *, to_wandb: bool = True) -> list[Missing]:
    """Write report.html, report.md and report/*.png into a run folder, and log the same to the run's W&B run.

    Args:
        recipe: The recipe of the run.
        folder: The run folder; whatever it holds so far.
        to_wandb: Whether W&B gets it, too, if the recipe uses it; opening its run takes seconds.

    Returns:
        The parts that are missing from the report.

    Raises:
        UserError: The folder cannot be written.
    """
    files = RunFiles(recipe, folder)
    report = build(files)
    pictures = folder / "report"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for figure in report.figures():
            replace_file(pictures / f"{figure.name}.png", figure.png)
        for old in set(pictures.glob("*.png")) - {pictures / f"{figure.name}.png" for figure in report.figures()}:
            old.unlink()
        replace_file(folder / "report.html", html(report).encode())
        replace_file(folder / "report.md", markdown(report, pictures.name).encode())
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror}); free space") from error
    if to_wandb and recipe.run.wandb is not Wandb.disabled:
        _log(recipe, folder, report)
    return report.missing()


def summary(missing: list[Missing]) -> str:
    """What `write` returned, in a few words."""
    return f"without {', '.join(part.what.lower() for part in missing)}" if missing else "complete"


def build(files: RunFiles) -> Report:
    """The report's content."""
    sections: dict[str, Section] = {}
    for title, what, source, make in PARTS:
        blocks = guarded(files, what, source, lambda make=make: make(files))
        before = sections[title].blocks if title in sections else []
        sections[title] = Section(title, [*before, *blocks])
    recipe = files.recipe
    method = f"{stage_name(recipe.method.value)}, {recipe.quantize.format.value}"
    if recipe.quantize.kv_cache is not KVCache.none:
        method += f", {recipe.quantize.kv_cache} cache"
    if recipe.method is Method.bf16:
        method = "BF16 control"
    subtitle = f"{method} from {Path(recipe.model.path).name}"
    return Report(recipe.run.name, subtitle, head(files), list(sections.values()))


def _log(recipe: Recipe, folder: Path, report: Report) -> None:
    """The same tables and plots in the run's own W&B run, once for every content."""
    digest = hashlib.sha256((folder / "report.md").read_bytes()).hexdigest()
    mark = folder / "report" / "wandb.json"
    if mark.exists() and read_json(mark).get("report_md_sha256") == digest:
        return
    from halfbyte.training.experiment import log_report

    scores = next((block for block in _section(report, "Scores").blocks if isinstance(block, Table)), None)
    groups = scores.groups if scores else []
    columns = ["task", *(scores.head if scores else [])]
    figures: dict[str, str | float] = {"report/verdict": report.head.verdict}
    figures |= {f"report/{label}": f"{value} ({small})" for label, value, small in report.head.tiles}
    for group in groups:
        for row in group.rows:
            for column, cell in zip(columns[1:], row, strict=True):
                if cell.value is not None:
                    figures[f"report/{group.title.partition(' (')[0]}/{row[0].text}/{column}"] = cell.value
    log_report(
        recipe,
        columns=columns,
        rows=[[group.title, *(cell.text for cell in row)] for group in groups for row in group.rows],
        images=[(figure.name, figure.title, figure.png) for figure in report.figures()],
        summary=figures,
    )
    write_json(mark, {"report_md_sha256": digest})


def _section(report: Report, title: str) -> Section:
    return next(section for section in report.sections if section.title == title)
