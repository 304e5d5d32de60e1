"""The shape of the code base, read from its source: directions of import, single doorways, sizes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("recipes", "training", "export", "launch")
"""A folder may import itself and those before it."""
SOURCES = sorted(path for folder in ORDER for path in (ROOT / folder).glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))

DOORWAYS = {
    "nemo": {"training/experiment.py"},
    "wandb": {"training/experiment.py"},
    "modelopt": {"training/quantize.py", "training/model.py"},
}
ENVIRONMENT = {"training/environment.py", "launch/start.py"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(source: str) -> Iterator[str]:
    """Dotted names of all imports, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def back_edges(folder: str, source: str) -> list[str]:
    """Imports of halfbyte folders that stand after `folder` in ORDER, or of a folder under its bare name."""
    allowed = ORDER[: ORDER.index(folder) + 1]
    edges = []
    for module in imported(source):
        first, _, rest = module.partition(".")
        inside = rest.partition(".")[0]
        if first in (*ORDER, "tests") or (first == "halfbyte" and inside not in allowed):
            edges.append(module)
    return edges


def reads_environment(source: str) -> bool:
    nodes = list(ast.walk(ast.parse(source)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = {module.rpartition(".")[2] for module in imported(source) if module.startswith("os.")}
    return bool((attributes | names) & {"environ", "getenv", "putenv"})


def test_the_checks_see_what_they_should():
    assert back_edges("training", "from halfbyte.launch.cli import main") == ["halfbyte.launch.cli.main"]
    assert back_edges("training", "def f():\n    import training.config") == ["training.config"]
    assert back_edges("export", "from halfbyte import launch") == ["halfbyte.launch"]
    assert back_edges("launch", "from halfbyte.export.hf import write\nimport torch.export") == []
    assert reads_environment("import os\nos.environ['X'] = '1'")
    assert reads_environment("from os import getenv")
    assert not reads_environment("import os\nos.getpid()")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way(path):
    assert back_edges(path.parent.name, path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_single_doorways(path):
    source = path.read_text()
    packages = _packages(path)
    for package, files in DOORWAYS.items():
        assert package not in packages or name(path) in files, f"{package} is imported in {sorted(files)} only"
    assert not reads_environment(source) or name(path) in ENVIRONMENT, f"os.environ belongs to {sorted(ENVIRONMENT)}"


def test_the_map_in_contributing_is_true():
    """Every file that it names is there, and the doorways that it names are those that are held here."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:training|export|launch|recipes|tests)/\w+\.py)`", text))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
    doors = set().union(*DOORWAYS.values(), ENVIRONMENT)
    assert doors <= named
    used = {package: {name(path) for path in SOURCES if package in _packages(path)} for package in DOORWAYS}
    assert used == DOORWAYS


def _packages(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported(path.read_text())}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_guessed(path):
    """No getattr with a default, no catch-all except: both hide the mistake. worker() alone ends in one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            assert len(node.args) == 2, f"line {node.lineno}: getattr with a default"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            last_resort = name(path) == "launch/pipeline.py" and caught == "BaseException"
            assert passes_on or last_resort or caught not in ("everything", "Exception", "BaseException"), node.lineno


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name)
def test_sizes(path):
    source = path.read_text()
    limit = 300 if path in SOURCES else 500
    assert sum(bool(line.strip()) for line in source.splitlines()) <= limit, "split the file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60 or path in TESTS, f"{node.name} has {length} lines"


def test_every_module_says_what_it_is():
    for path in SOURCES:
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), name(path)
