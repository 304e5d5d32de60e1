"""Whether a recipe's values make sense together, before any process starts. Pure and torch-free; a line per problem."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from halfbyte.training.config import GateRule, Method, Recipe, TaskKind
from halfbyte.training.config_distill import TEACHER_INDEX
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.export_rules import export_problems
from halfbyte.training.families import TINY
from halfbyte.training.files import damage, read_json
from halfbyte.training.model_rules import model_problems
from halfbyte.training.model_source import brings_formats
from halfbyte.training.nemo_archive import is_archive
from halfbyte.training.run_rules import run_problems, unreachable_paths
from halfbyte.training.shape import ModelShape, read_shape
from halfbyte.training.side_by_side_rules import side_by_side_problems
from halfbyte.training.task_rules import task_file_problems

FETCHABLE = ("smollm2", *TINY)
LM_EVAL = TaskKind.lm_eval

POSITIVE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.data",
    "train.global_batch",
    "train.micro_batch",
    "train.sequence_length",
    "train.learning_rate",
    "train.eps",
    "train.lora.alpha",
    "quantize.calibration_length",
    "sensitivity.tokens",
    "sensitivity.bits",
    "generate.max_tokens",
    "distill.temperature",
    "distill.top_k",
    "checkpoint.keep",
    "evaluate.tokens_per_batch",
    "gate.perplexity_ratio",
    "gate.kl",
    "export.shard_gb",
    "export.files",
    "export.tensor_parallel",
    "launch.gpus_per_node",
    "launch.cpus_per_task",
)
NOT_NEGATIVE = (
    "train.seed",
    "train.warmup_steps",
    "train.fake_quant_after_steps",
    "train.min_learning_rate",
    "train.weight_decay",
    "train.clip_grad",
    "train.lora.rank",
    "train.block_scale_lr_mult",
    "checkpoint.every_steps",
    "checkpoint.keep_best",
    "distill.cross_entropy",
    "distill.hidden",
    "evaluate.kl_positions",
    "gate.threshold_pp",
    "generate.temperature",
    "generate.seed",
    "telemetry.quantization_every_steps",
    "telemetry.stragglers_every_steps",
    "verify.items",
    "launch.port",
    "launch.max_restarts",
    "launch.hang_seconds",
)
RANGES = dict.fromkeys(("train.beta1", "train.beta2", "distill.beta"), (0, 1)) | {"gate.confidence": (0.5, 0.9999)}
"""Both ends are excluded. Of more confidence a bootstrap needs millions of resamples; of less, nothing is certain."""


def problems(recipe: Recipe, *, need_weights: bool = False) -> list[str]:
    """Everything that would stop the run later, as `field = value: what is wrong; remedy`.

    Args:
        recipe: A type-correct recipe.
        need_weights: Whether the weights and tokenizer must already be at model.path.

    Returns:
        One line per problem; empty for a recipe that can run.
    """
    found = [*run_problems(recipe), *_numbers(recipe), *_steps(recipe), *side_by_side_problems(recipe)]
    unreachable = list(unreachable_paths(recipe))
    if unreachable:  # the other rules look into these folders
        return found + unreachable
    shape, unread = find_shape(recipe)
    found += [*unread, *_reference(recipe, shape)]
    found += [*_teacher(recipe), *_files(recipe), *_tasks(recipe), *_gate(recipe)]
    if shape is not None:
        found += [*model_problems(recipe, shape), *export_problems(recipe, shape)]
    if need_weights:
        found += _weights(recipe)
    return found


def find_shape(recipe: Recipe) -> tuple[ModelShape | None, list[str]]:
    """The model's sizes from model.path, else from model.config; (None, reasons) if neither can be read."""
    if not recipe.model.path:
        return None, []  # reported as missing
    config = Path(recipe.model.path) / "config.json"
    if not config.is_file() and not is_archive(config.parent):
        if recipe.model.config is None:
            remedy = "give a Hugging Face directory or a .nemo archive, or a config.json to plan with as model.config"
            return None, [f"model.path = {recipe.model.path}: holds no config.json; {remedy}"]
        config = Path(recipe.model.config)
    try:
        return read_shape(config), []
    except RecipeError as error:
        return None, list(error.problems)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every field of nested dataclasses; the list of tasks is one leaf."""
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _numbers(recipe: Recipe) -> Iterator[str]:
    values = dict(leaves(recipe))
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} = {value}: not finite; give a number"
        elif isinstance(value, int) and abs(value) >= 2**63:
            yield f"{key} = {value}: beyond 64 bits; give a smaller number"
        elif value is not None and key in POSITIVE and value <= 0:
            least = "at least 1" if isinstance(value, int) else "a number above 0"
            yield f"{key} = {value}: must be positive; give {least}"
        elif value is not None and key in NOT_NEGATIVE and value < 0:
            yield f"{key} = {value}: must not be negative; give 0 or more"
        elif value is not None and key in RANGES and not RANGES[key][0] < value < RANGES[key][1]:
            low, high = RANGES[key]
            yield f"{key} = {value}: must lie between {low} and {high}; the default is {dict(leaves(Recipe()))[key]}"
    if recipe.telemetry.straggler_ratio <= 1:
        yield (
            f"telemetry.straggler_ratio = {recipe.telemetry.straggler_ratio}: half of all ranks take the median or "
            "more; give a number above 1 (1.2 is the default)"
        )
    if recipe.launch.port > 65535:
        yield f"launch.port = {recipe.launch.port}: ports end at 65535; 0 picks a free one"


def _steps(recipe: Recipe) -> Iterator[str]:
    train, quantize = recipe.train, recipe.quantize
    if recipe.method != Method.ptq:
        if train.steps < 1:
            yield f"train.steps = {train.steps}: method {recipe.method} trains; give at least 1, or method=ptq"
        if train.warmup_steps > train.steps > 0:
            yield (
                f"train.warmup_steps = {train.warmup_steps}: longer than train.steps = {train.steps}; "
                f"give at most {train.steps}"
            )
        if train.min_learning_rate > train.learning_rate > 0:
            yield (
                f"train.min_learning_rate = {train.min_learning_rate}: above train.learning_rate = "
                f"{train.learning_rate}; lower it"
            )
    yield from _late_start(recipe)
    if recipe.method != Method.bf16 and quantize.calibration_samples < 1:
        yield (
            f"quantize.calibration_samples = {quantize.calibration_samples}: nothing to calibrate with; "
            "give at least 1 (512 is the default)"
        )
    per_pass = train.micro_batch * recipe.parallel.data
    if per_pass > 0 and train.global_batch % per_pass:
        yield (
            f"train.global_batch = {train.global_batch}: not a multiple of train.micro_batch x parallel.data = "
            f"{per_pass}; give a multiple of {per_pass}"
        )


def _teacher(recipe: Recipe) -> Iterator[str]:
    distill = recipe.distill
    if distill.teacher is None:
        return
    key = f"distill.teacher = {distill.teacher}"
    if not (Path(distill.teacher) / TEACHER_INDEX).is_file():
        yield f"{key}: holds no teacher.json; write the files with halfbyte teacher, or set null"
    else:
        yield from _other_teacher(recipe, Path(distill.teacher))
    if distill.top_k is None:
        yield f"{key}: holds top-k only; give distill.top_k the files' number"
    if distill.hidden:
        yield f"{key}: holds no hidden states; set distill.hidden=0, or distill.teacher=null to load a teacher"


def _other_teacher(recipe: Recipe, folder: Path) -> Iterator[str]:
    """What the files were made with and this recipe has not; text and model are compared when both are read."""
    values = {"distill.top_k": recipe.distill.top_k, "distill.temperature": recipe.distill.temperature}
    values |= {"sequence length": recipe.train.sequence_length}
    try:
        with damage(folder / TEACHER_INDEX):
            made: dict[str, Any] = read_json(folder / TEACHER_INDEX)["made from"]
            other = {name: made[name] for name, value in values.items() if value not in (None, made[name])}
    except UserError as error:
        yield f"distill.teacher = {error}"
        return
    for name, value in other.items():
        yield f"distill.teacher = {folder}: made with {name} = {value}, not {values[name]}; take that, or make it again"


def _files(recipe: Recipe) -> Iterator[str]:
    if recipe.model.fetch not in (None, *FETCHABLE):
        yield f"model.fetch = {recipe.model.fetch}: unknown; use one of {', '.join(FETCHABLE)}"
    train, calibration = recipe.data.train, recipe.quantize.calibration_data
    if recipe.method != Method.ptq and not train:
        yield f"data.train = null: method {recipe.method} trains; give a JSONL file"
    elif recipe.method == Method.ptq and not train and not calibration:
        yield "quantize.calibration_data = null: calibration needs text; give a JSONL file here or as data.train"
    files = {"data.train": train, "quantize.calibration_data": calibration, "sensitivity.data": recipe.sensitivity.data}
    files |= {f"evaluate.tasks.{i}.data": task.data for i, task in enumerate(recipe.evaluate.tasks)}
    lm_eval = {f"evaluate.tasks.{i}.data" for i, task in enumerate(recipe.evaluate.tasks) if task.kind == LM_EVAL}
    for key, path in files.items():
        if path and not Path(path).is_file():
            wanted = "the YAML file of a task of lm-eval" if key in lm_eval else "a JSONL or JSONL.gz file"
            yield f"{key} = {path}: no such file; give {wanted}"


def _late_start(recipe: Recipe) -> Iterator[str]:
    late, steps = recipe.train.fake_quant_after_steps, recipe.train.steps
    if late <= 0 or recipe.method not in (Method.qat, Method.qad):
        return
    if late >= steps > 0:
        yield f"train.fake_quant_after_steps = {late}: train.steps = {steps} end before it; give less than {steps}"
    if recipe.method == Method.qad and not recipe.distill.cross_entropy:
        yield (
            f"train.fake_quant_after_steps = {late}: until it is quantized, a QAD student is its teacher and has "
            "nothing to learn; give 0, or distill.cross_entropy a weight"
        )


def _tasks(recipe: Recipe) -> Iterator[str]:
    tasks = recipe.evaluate.tasks
    if not tasks and recipe.method != Method.bf16:
        yield "evaluate.tasks = []: the gate would have nothing to judge; give at least one task"
    names = [task.name for task in tasks]
    for i, task in enumerate(tasks):
        key = f"evaluate.tasks.{i}"
        if names.index(task.name) < i:
            yield f"{key}.name = {task.name}: used twice; give every task its own name"
        elif not re.fullmatch(r"[\w-]{1,64}", task.name) and task.name:
            yield f"{key}.name = {task.name}: becomes a file name; use letters, digits, _ and -, at most 64"
        if task.kind == LM_EVAL and Path(task.data).is_file():
            yield from task_file_problems(key, task.data)
        if task.first < 0:
            yield f"{key}.first = {task.first}: must not be negative; 0 starts at the first item"
        for field, value, least in (("limit", task.limit, 1), ("max_tokens", task.max_tokens, 2)):
            if value is not None and value < least:
                yield f"{key}.{field} = {value}: scores nothing; give at least {least}, or null for all"


def _gate(recipe: Recipe) -> Iterator[str]:
    gate, kinds = recipe.gate, {task.name: task.kind for task in recipe.evaluate.tasks}
    if gate.rule == GateRule.better_than_ptq and recipe.method == Method.ptq:
        yield "gate.rule = better_than_ptq: method ptq is compared with itself; set gate.rule=bf16"
    if not recipe.evaluate.ptq and (gate.rule == GateRule.better_than_ptq or recipe.method == Method.ptq):
        yield "evaluate.ptq = false: method ptq and gate.rule=better_than_ptq need PTQ's scores; set evaluate.ptq=true"
    for name, value in gate.thresholds_pp.items():
        key = f"gate.thresholds_pp.{name} = {value}"
        if name not in kinds:
            yield f"{key}: no such task; evaluate.tasks has {', '.join(kinds) or 'none'}"
        elif kinds[name] == TaskKind.text:
            yield f"{key}: task {name} has a perplexity only; gate.perplexity_ratio bounds it"
        elif not math.isfinite(value) or value < 0:
            yield f"{key}: must be a number of percentage points; give 0 or more"
    if gate.agreement is not None and not 0 < gate.agreement < 1:
        yield f"gate.agreement = {gate.agreement}: must lie between 0 and 1; give a share such as 0.9"
    for key, value in (("gate.kl", gate.kl), ("gate.agreement", gate.agreement)):
        if value is not None and not recipe.evaluate.kl_positions:
            yield f"{key} = {value}: evaluate.kl_positions = 0 compares no token with BF16; give it 1 or more"
    if gate.control is not None:
        yield from _control(recipe, Path(gate.control))


def _control(recipe: Recipe, folder: Path) -> Iterator[str]:
    if not (folder / "resolved.yaml").is_file():
        yield f"gate.control = {folder}: no run there; start the BF16 control first (method=bf16), or set null"
    elif folder == Path(recipe.run.dir).absolute():
        yield f"gate.control = {folder}: is this run; give the folder of a run of method bf16"


def must_fetch(recipe: Recipe) -> bool:
    """Whether model.fetch has to make the model first: it is set, and nothing is at model.path."""
    folder = Path(recipe.model.path)
    there = is_archive(folder) or (folder.is_dir() and any(folder.iterdir()))
    return recipe.model.fetch is not None and not there


def missing_weights(recipe: Recipe) -> list[str]:
    """What of a Hugging Face model is not at model.path: config.json, tokenizer.json, *.safetensors.

    Nothing for an archive: it is asked again once it is unpacked.
    """
    folder = Path(recipe.model.path)
    if is_archive(folder):
        return []
    return [name for name in ("config.json", "tokenizer.json", "*.safetensors") if not any(folder.glob(name))]


def _weights(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not model.path or must_fetch(recipe):
        return  # reported as missing, or about to be fetched
    missing = missing_weights(recipe)
    if missing:
        here = (
            f"`halfbyte fetch {model.fetch} DIR` makes a new one" if model.fetch else "put the Hugging Face files there"
        )
        yield f"model.path = {model.path}: lacks {', '.join(missing)}; {here}"


def _reference(recipe: Recipe, shape: ModelShape | None) -> Iterator[str]:
    """model.reference is another, plain copy of the model at model.path."""
    path = recipe.model.reference
    if path is None:
        return
    if not brings_formats(Path(recipe.model.path)):
        yield f"model.reference = {path}: is read only where model.path is quantized; leave the key out"
    elif brings_formats(Path(path)):
        yield f"model.reference = {path}: is quantized itself; give the BF16 model"
    else:
        try:
            if shape is not None and read_shape(Path(path) / "config.json") != shape:
                yield f"model.reference = {path}: has other sizes than {recipe.model.path}; give the same model in BF16"
        except RecipeError as error:
            yield from (f"model.reference: {line}" for line in error.problems)
