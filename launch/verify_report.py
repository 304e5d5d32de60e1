"""verify.json, the report on an export and on the further layouts that were made from it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.training.errors import UserError
from halfbyte.training.files import damage, read_json, write_json


def raise_problems(report: dict[str, Any], folder: Path) -> None:
    """Raise UserError if a verify report is not clean."""
    if not report["ok"]:
        raise UserError(f"verify failed: {report['problems'][0]} ({folder / 'verify.json'} has all of it)")


def settle(folder: Path, further: Callable[[], list[str]]) -> bool:
    """Say in verify.json what is still wrong with the further layouts, some of which were made again or removed.

    Args:
        folder: The run folder.
        further: Gives a line for each; asked only where verify.json has such lines.

    Returns:
        Whether verify.json says something else now: report.html is made of it.

    Raises:
        UserError: verify.json is damaged or cannot be written.
    """
    path = folder / "verify.json"
    report = read_json(path) if path.exists() else {}
    if not report.get("further"):
        return False
    with damage(path):
        own = report["problems"][: -len(report["further"])]
        report["problem_count"] -= len(report["further"])
    settled = with_further({**report, "problems": own}, further())
    write_json(path, settled)
    return settled["problems"] != [*own, *report["further"]]


def with_further(report: dict[str, Any], further: Sequence[str]) -> dict[str, Any]:
    """The report on an export with lines about what was made from it: `further`, and the last of its problems."""
    count = report["problem_count"] + len(further)
    problems = {"problems": [*report["problems"], *further], "problem_count": count, "further": [*further]}
    return {**report, **problems, "ok": count == 0 and report["mismatches"] == 0}
