"""The command `halfbyte plan`: its options and what it does with them."""

import argparse

from halfbyte.training.errors import OK, RecipeError


def options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes beside a recipe and key=value."""
    parser.add_argument(
        "--gpu", metavar="GPU", default="H200", help="A100 | H100 | H200 (default) | B200 | GB200-NVL72"
    )
    parser.add_argument("--nodes", metavar="N", type=int, help="hosts to find a layout for; none: the recipe's GPUs")
    parser.add_argument(
        "--model", metavar="NAME", help="another model in the recipe's place: a config.json or its name"
    )


def command(args: argparse.Namespace) -> int:
    """Print the plan; returns the exit code."""
    from halfbyte.launch.plan_model import Architecture, named_model
    from halfbyte.launch.plan_text import named_gpu, plan
    from halfbyte.training.resolve import resolve
    from halfbyte.training.rules import find_shape

    gpu = named_gpu(args.gpu)
    recipe = resolve(args.recipe, args.overrides)
    if args.model is not None:
        model = named_model(args.model)
    else:
        shape, unread = find_shape(recipe)
        if shape is None:
            raise RecipeError(unread)
        model = Architecture.dense(recipe.run.name, shape)
    print(plan(recipe, model, gpu, args.nodes))
    return OK
