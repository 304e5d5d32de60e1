"""Interpolations that a recipe may hold: `${group.key}`, and nothing that asks OmegaConf to compute or look elsewhere.

`${oc.env:HF_TOKEN}` would put a secret into resolved.yaml; other resolvers run what a library registered.
"""

from collections.abc import Iterator
from typing import Any

from omegaconf import grammar_parser
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser


def resolver_in(value: Any) -> str | None:
    """The first text of a value (a text, or lists and mappings of texts) that calls a resolver; None if none does."""
    for text in _texts(value):
        try:
            tree = grammar_parser.parse(text)
        except OmegaConfBaseException:  # not an interpolation at all; what reads it says so
            continue
        if any(isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext) for node in _nodes(tree)):
            return text
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and "${" in value:
        yield value


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for index in range(tree.getChildCount()):
        yield from _nodes(tree.getChild(index))
