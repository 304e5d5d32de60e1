"""The YAML of a recipe file: its keys, the line of each, and what stands there letter by letter."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halfbyte.training.errors import RecipeError

MOST_VALUES = 100_000
"""Most values of a file with its aliases written out: nine aliases of nine aliases, ten deep, are 3.5 billion."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file.

    Attributes:
        content: Its groups, keys and values, as YAML reads them.
        places: Dotted key -> " (NAME line N)".
        texts: Dotted key of every single value -> its characters: `no`, which YAML reads as false.
    """

    content: dict[Any, Any]
    places: dict[str, str]
    texts: dict[str, str]


def read(path: Path) -> RecipeFile:
    """Read a recipe file.

    Raises:
        RecipeError: it cannot be read, is no YAML, holds no keys, or far more values than a recipe has.
    """
    try:
        text = path.read_text()
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None and not isinstance(tree, yaml.MappingNode):  # None: an empty file
            raise RecipeError([f"{path}: holds a list or a single value, not keys; write key: value lines"])
        if tree is not None and _written_out(tree, {}) > MOST_VALUES:
            remedy = "write out what is needed"
            raise RecipeError([f"{path}: its aliases (*name) stand for more than {MOST_VALUES:,} values; {remedy}"])
        content: Any = OmegaConf.to_container(OmegaConf.create(text))
        nodes = list(_nodes(tree))
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror}); give a recipe file"]) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError([f"{path}, line {line}: not valid YAML ({error.problem}); fix the line"]) from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        raise RecipeError([f"{path}: not valid YAML ({str(error).splitlines()[0]}); fix the file"]) from error
    return RecipeFile(
        content,
        {key: f" ({path.name} line {line})" for key, line, _ in nodes},
        {key: node.value for key, _, node in nodes if isinstance(node, yaml.ScalarNode)},
    )


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, those of an alias at every place where it stands; `known` is by the node's identity."""
    if id(node) not in known:
        known[id(node)] = 0  # of an alias inside its own value, which is refused later
        known[id(node)] = 1 + sum(_written_out(part, known) for part in _parts(node))
    return known[id(node)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _nodes(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int, yaml.Node]]:
    """(dotted key, line number counted from 1, value) of everything below a node."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(f"{prefix}{key.value}", key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(f"{prefix}{i}", value, value) for i, value in enumerate(node.value)]
    for name, key, value in children:
        yield name, key.start_mark.line + 1, value
        yield from _nodes(value, f"{name}.")
