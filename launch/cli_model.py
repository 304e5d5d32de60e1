"""Commands that start from a recipe or a run and need the model's weights: sensitivity, generate, teacher."""

import argparse
from pathlib import Path

from halfbyte.training.config import Recipe
from halfbyte.training.errors import OK, RecipeError


def with_weights(args: argparse.Namespace):
    """Resolve a recipe whose weights must be there, fetching them where the recipe says how.

    Where they are quantized or bring quantizers, the recipe takes its formats from them; a .nemo archive is unpacked.
    """
    from halfbyte.launch.imported import adopt, unpack
    from halfbyte.launch.start import inside_launcher
    from halfbyte.training.resolve import resolve
    from halfbyte.training.rules import must_fetch

    recipe = resolve(args.recipe, args.overrides, need_weights=True)
    if must_fetch(recipe):
        fetch, folder = recipe.model.fetch, recipe.model.path
        if inside_launcher():  # one process per GPU: they would all fetch
            raise RecipeError([f"model.path = {folder}: nothing there; run `halfbyte fetch {fetch} {folder}` first"])
        fetch_into(str(fetch), Path(folder))
        recipe = resolve(args.recipe, args.overrides, need_weights=True)
    return unpack(adopt(recipe))


def fetch_into(name: str, folder: Path) -> None:
    """Make model `name` in `folder`, and say so."""
    from halfbyte.training.fetch import fetch

    print(f"{fetch(name, folder)}: {name} is there", flush=True)


def recipe_or_run(args: argparse.Namespace):
    """The recipe that is named, or that of the run folder that is named; its weights must be there."""
    from halfbyte.launch.start import RESOLVED
    from halfbyte.training.resolve import of_run
    from halfbyte.training.rules import problems

    resolved = Path(args.recipe) / RESOLVED
    if not resolved.is_file():
        return with_weights(args)
    recipe = of_run(resolved, args.overrides)
    found = problems(recipe, need_weights=True)
    if found:
        raise RecipeError(found)
    return recipe


def sensitivity(args: argparse.Namespace) -> int:
    """`halfbyte sensitivity`: returns the exit code."""
    from halfbyte.launch.sensitivity import STAGE, prepare
    from halfbyte.launch.start import RESOLVED, is_first

    if args.bits is not None:
        args.overrides.append(f"sensitivity.bits={args.bits}")
    recipe = recipe_or_run(args)
    measured = prepare(recipe)
    code = _start(measured, STAGE)
    plan = Path(recipe.run.dir) / "sensitivity.yaml"
    if code == OK and recipe.sensitivity.bits is not None and is_first():
        resolved = Path(args.recipe) / RESOLVED
        source = resolved if resolved.is_file() else args.recipe
        print(f"  run it: halfbyte run {source} {plan} run.dir={recipe.run.dir}_mixed")
    return code


def generate(args: argparse.Namespace) -> int:
    """`halfbyte generate`: returns the exit code."""
    from halfbyte.launch.generate import STAGE, prepare

    return _start(prepare(recipe_or_run(args), args.prompts, args.out), STAGE)


def teacher(args: argparse.Namespace) -> int:
    """`halfbyte teacher`: returns the exit code."""
    from halfbyte.launch.teacher import STAGE, prepare

    recipe = with_weights(args)
    folder = Path(args.out or f"{recipe.run.dir}_teacher").absolute()
    return _start(prepare(recipe, folder), STAGE)


def _start(recipe: Recipe, stage: str) -> int:
    """Run a stage that is not one of a run, in a run folder of its own; returns the exit code."""
    from halfbyte.launch.start import RESOLVED, holding, launch
    from halfbyte.training.resolve import save

    folder = Path(recipe.run.dir)
    with holding(folder):
        save(recipe, folder / RESOLVED)
        return launch(recipe, [stage])
