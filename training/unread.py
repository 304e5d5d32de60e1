"""Keys of a recipe that its method does not read: said, not refused, because several methods share a base."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from halfbyte.training.config import Method, Recipe
from halfbyte.training.rules import leaves

UNREAD: Mapping[Method, Sequence[str]] = {
    Method.ptq: ("train.*", "checkpoint.*", "distill.*"),
    Method.qat: ("distill.*",),
    Method.bf16: ("quantize.*", "distill.*"),
    Method.qad: (),
}
"""Patterns of keys that change nothing in a run of the method."""
READ = ("train.seed", "train.sequence_length", "train.dtype")
"""Keys of those that calibration and evaluation read."""


def unread(recipe: Recipe) -> list[str]:
    """A line that names the keys which the recipe sets and its method does not read; none where there are none."""
    defaults = dict(leaves(Recipe()))
    keys = [
        key
        for key, value in leaves(recipe)
        if value != defaults[key] and key not in READ and any(fnmatchcase(key, p) for p in UNREAD[recipe.method])
    ]
    return [f"note: method {recipe.method} does not read {', '.join(keys)}"] if keys else []
