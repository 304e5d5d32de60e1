"""Whether patterns on Hugging Face module names fit a model. Pure and torch-free; a line per problem."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from halfbyte.training.config import Recipe
from halfbyte.training.shape import FUSED_GROUPS, ModelShape, excluded, layer_norms, linear_sizes

EMBEDDINGS = {"model.embed_tokens", "lm_head"}


def pattern_problems(
    key: str, patterns: list[str], modules: Sequence[str], shape: ModelShape, kind: str = "module"
) -> Iterator[str]:
    """Every pattern matches something, and no fused linear is split.

    Args:
        key: The recipe's key; its last word says what is done to the modules.
        patterns: fnmatch patterns on the names of `modules`.
        modules: What they may match.
        shape: The model's shape.
        kind: What they are, in a word.
    """
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in modules):
            yield (
                f"{key} = {pattern}: matches no {kind}; write a Hugging Face module name such as "
                "model.layers.0.mlp.down_proj, * stands for anything"
            )
    verb = key.rpartition(".")[2].removesuffix("s")  # exclude, freeze, target
    for group in FUSED_GROUPS:
        split = [
            layer
            for layer in range(shape.layers)
            if 0 < sum(excluded(f"model.layers.{layer}.{name}", patterns) for name in group) < len(group)
        ]
        if split:
            members = ", ".join(name.rpartition(".")[2] for name in group)
            yield (
                f"{key} = [{', '.join(patterns)}]: splits {members} of layer {some(split)}, "
                f"one layer at training time; {verb} all of them or none"
            )


def freeze_problems(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """What train.freeze names is there and whole, and every pipeline stage keeps something to train."""
    patterns = recipe.train.freeze
    norms = [f"model.layers.{layer}.{name}" for layer in range(shape.layers) for name, _ in layer_norms(shape).values()]
    modules = [*linear_sizes(shape), *norms, *sorted(EMBEDDINGS), "model.norm"]
    yield from pattern_problems("train.freeze", patterns, modules, shape)
    key = f"train.freeze = [{', '.join(patterns)}]"
    frozen = {module for module in modules if excluded(module, patterns)}
    if shape.tied and len(frozen & EMBEDDINGS) == 1:
        yield f"{key}: model.embed_tokens and lm_head of this model are one parameter; freeze both or none"
    held = stages(recipe, shape, modules)
    still = [number for number, inside in enumerate(held) if inside <= frozen]
    if still:
        which = f"pipeline stage {some(still)} (counted from 0) with " if len(held) > 1 else ""
        yield f"{key}: leaves {which}nothing to train; freeze less"


def stages(recipe: Recipe, shape: ModelShape, modules: Sequence[str]) -> list[set[str]]:
    """What every pipeline stage holds; one stage where layers cannot be dealt out, which is reported elsewhere."""
    count, last = recipe.parallel.pipeline, recipe.parallel.last_stage_layers
    sizes = [shape.layers]
    if count > 1:
        last = shape.layers // count if last is None else last
        each, rest = divmod(shape.layers - last, count - 1)
        sizes = [each] * (count - 1) + [last] if not rest and each > 0 and last > 0 else sizes
    held: list[set[str]] = []
    for size in sizes:
        start = sum(sizes[: len(held)])
        prefixes = tuple(f"model.layers.{layer}." for layer in range(start, start + size))
        held.append({module for module in modules if module.startswith(prefixes)})
    held[0] |= EMBEDDINGS if shape.tied else {"model.embed_tokens"}
    held[-1] |= {"model.norm"} | (EMBEDDINGS if shape.tied else {"lm_head"})
    return held


def some(items: Sequence[int]) -> str:
    """The first of some numbers, and how many more there are."""
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
