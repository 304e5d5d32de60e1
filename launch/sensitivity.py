"""`halfbyte sensitivity`: a table of what quantizing each layer costs, and the best mixed plan within a budget of bits.

It works in <run.dir>/sensitivity and leaves <run.dir>/sensitivity.json and, with a budget, <run.dir>/sensitivity.yaml:
the plan as a part of a recipe, which `halfbyte run RECIPE <run.dir>/sensitivity.yaml` takes.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from halfbyte.launch.console import Console
from halfbyte.launch.summary import columns
from halfbyte.training.allocation import Choice, Group, allocate, fewest_bits, groups, mean_bits, patterns
from halfbyte.training.config import Format, Method, Recipe, Task, TaskKind
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.files import write_json
from halfbyte.training.formats import BITS
from halfbyte.training.interrupt import Stop
from halfbyte.training.rules import find_shape

STAGE = "sensitivity"
ROWS = 40
"""Rows of the table that are printed; the file has all."""


def prepare(recipe: Recipe) -> Recipe:
    """The measurement's own recipe: the model as it is before training, and one text as the only task. Torch-free.

    What quantize.layers says is not used: that is what is looked for.

    Raises:
        RecipeError: nothing to quantize, no text, or a budget that no plan keeps.
    """
    shape, found = find_shape(recipe)
    if recipe.method == Method.bf16:
        found.append("method = bf16: the control quantizes nothing; set method=ptq to measure what it could cost")
    task = _text(recipe)
    if task is None:
        found.append(
            "sensitivity.data = null: the recipe has no evaluation task of kind text to measure on; give a JSONL file"
        )
    if shape is not None:
        found += _budget_problems(recipe, groups(shape, recipe))
    if found or task is None:
        raise RecipeError(found)
    return replace(
        recipe,
        method=Method.ptq,
        run=replace(recipe.run, dir=str(Path(recipe.run.dir) / STAGE)),
        evaluate=replace(recipe.evaluate, tasks=[task]),
    )


def _text(recipe: Recipe) -> Task | None:
    if recipe.sensitivity.data:
        return Task(STAGE, recipe.sensitivity.data, TaskKind.text, text_key=recipe.data.text_key)
    return next((task for task in recipe.evaluate.tasks if task.kind == TaskKind.text), None)


def _budget_problems(recipe: Recipe, members: list[Group]) -> list[str]:
    budget = recipe.sensitivity.bits
    if not members:
        return [f"quantize.exclude = [{', '.join(recipe.quantize.exclude)}]: leaves no layer to measure; shorten it"]
    if budget is None:
        return []
    least = fewest_bits(members)
    if budget < least:
        return [
            f"sensitivity.bits = {budget:g}: below {least:.4g}, the fewest that the layers can have with "
            f"{recipe.quantize.format}; give {math.ceil(least * 100) / 100:g} or more"
        ]
    if budget >= BITS[None]:
        return [f"sensitivity.bits = {budget:g}: BF16 in every layer has {BITS[None]:g}; give less for a plan"]
    return []


def measure(recipe: Recipe, stop: Stop) -> None:
    """Measure every layer, choose a plan, measure it, write and print. Collective: in all processes of the layout.

    Args:
        recipe: What `prepare` returned; run.dir exists.
        stop: Installed signal handling.

    Raises:
        UserError: see Work.open and training/sensitivity.py.
    """
    from halfbyte.training.runtime import close_runtime, on_first_rank, open_runtime

    started = time.perf_counter()
    runtime = open_runtime(recipe)
    from halfbyte.launch.stages import Work
    from halfbyte.training import model_identity, sensitivity

    on_first_rank(runtime, lambda: model_identity.check(recipe, Path(recipe.run.dir).parent))
    console = Console(runtime.first)
    work = Work.open(recipe, runtime, stop, console, resume=False, started=started)
    work.gpt.eval()
    members = groups(work.shape, recipe)
    (task,) = recipe.evaluate.tasks
    items = sensitivity.enough(work.exam.items[task.name], recipe.sensitivity.tokens)
    comparison = sensitivity.Comparison(recipe, runtime, items, work.exam.pad_id)
    with console.stage("calibrate") as notes:
        variants = sensitivity.Variants(work.gpt, recipe, work.run_calibration)
        notes.append(f"{len(members)} layers")
    with console.stage("measure") as notes:
        content = _measured(recipe, members, variants, comparison, show=runtime.first)
        content["text"] = {"data": task.data, "task": task.name, "texts": len(items), "tokens": content.pop("tokens")}
        notes.append(f"{len(content['layers'])} variants on {content['text']['tokens']:,} tokens of {task.data}")
    folder = Path(recipe.run.dir).parent
    on_first_rank(runtime, lambda: _write(content, folder))
    console.say(report(content, folder))
    close_runtime()


def _measured(recipe: Recipe, members: list[Group], variants: Any, comparison: Any, *, show: bool) -> dict[str, Any]:
    from tqdm import tqdm

    singles = [(group, number_format) for group in members for number_format in group.formats]
    uniform = {
        number_format: {group: number_format if number_format in group.formats else None for group in members}
        for number_format in dict.fromkeys(number_format for _, number_format in singles)
    }
    bar = tqdm(total=1 + len(singles) + len(uniform), desc="  sensitivity", unit="pass", disable=not show, leave=False)

    def kl(chosen: Mapping[Group, Choice]) -> dict[str, Any]:
        variants.choose(chosen)
        interval = comparison.interval(comparison.run(variants.model))
        bar.update()
        return {"kl": interval.estimate, "interval": [interval.low, interval.high]}

    with bar:
        variants.choose({})
        comparison.run(variants.model)  # the BF16 logits
        bar.update()
        layers = [_single(group, number_format, kl({group: number_format})) for group, number_format in singles]
        costs = {group: {} for group in members}
        for (group, number_format), entry in zip(singles, layers, strict=True):
            costs[group][number_format] = entry["kl"]
        content: dict[str, Any] = {
            "model": recipe.model.path,
            "format": recipe.quantize.format.value,
            "tokens": sum(len(item.tokens) - 1 for item in comparison.items),
            "layers": sorted(layers, key=lambda entry: -entry["kl"]),
            "variants": {
                f"{number_format} everywhere": _whole(chosen, costs, kl(chosen))
                for number_format, chosen in uniform.items()
            },
        }
        if recipe.sensitivity.bits is not None:
            plan = allocate(costs, recipe.sensitivity.bits)
            content["variants"]["plan"] = _whole(plan, costs, kl(plan))
            content["plan"] = {
                "budget": recipe.sensitivity.bits,
                "layers": patterns(plan, recipe.quantize.format),
                "counts": _counts(plan),
            }
    return content


def _single(group: Group, number_format: Format, found: dict[str, Any]) -> dict[str, Any]:
    saved = (BITS[None] - BITS[number_format]) * group.weights
    names = {"layer": group.pattern, "hf": list(group.hf), "weights": group.weights, "format": number_format.value}
    return {**names, **found, "bits_saved": saved, "kl_per_bit": found["kl"] / saved}


def _whole(chosen: Mapping[Group, Choice], costs: dict[Group, dict], found: dict[str, Any]) -> dict[str, Any]:
    predicted = math.fsum(costs[group][choice] for group, choice in chosen.items() if choice)
    return {"bits_per_weight": mean_bits(chosen), "predicted_kl": predicted, **found}


def _counts(plan: Mapping[Group, Choice]) -> dict[str, int]:
    words = [choice.value if choice else "bf16" for choice in plan.values()]
    return {word: words.count(word) for word in sorted(set(words))}


def _write(content: dict[str, Any], folder: Path) -> None:
    write_json(folder / "sensitivity.json", content)
    path = folder / "sensitivity.yaml"
    if "plan" not in content:
        return
    plan = content["variants"]["plan"]
    quantize = {"format": content["format"], "layers": content["plan"]["layers"]}
    text = (
        f"# {plan['bits_per_weight']:.3f} bits per weight of at most {content['plan']['budget']:g}; KL to BF16 "
        f"{plan['kl']:.4g} nats per token measured, {plan['predicted_kl']:.4g} predicted from single layers\n"
        f"# on {content['text']['tokens']} tokens of {content['text']['data']}, model {content['model']}.\n"
        "# A part of a recipe: halfbyte run RECIPE THIS_FILE run.dir=NEW_FOLDER\n"
    )
    try:
        path.write_text(text + yaml.safe_dump({"quantize": quantize}, sort_keys=False))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another run.dir") from error


def report(content: dict[str, Any], folder: Path) -> str:
    """What `halfbyte sensitivity` prints of sensitivity.json."""
    head = ["layer", "format", "KL to BF16, nats", "95 % interval", "Mbit saved", "KL per Gbit"]
    rows = [
        [
            entry["layer"],
            entry["format"],
            f"{entry['kl']:.3e}",
            _interval(entry),
            f"{entry['bits_saved'] / 1e6:,.2f}",
            f"{1e9 * entry['kl_per_bit']:.3e}",
        ]
        for entry in content["layers"]
    ]
    lines = ["", *columns([head, *rows[:ROWS]])]
    if len(rows) > ROWS:
        lines.append(f"  and {len(rows) - ROWS} more in {folder / 'sensitivity.json'}")
    head = ["variant", "bits per weight", "sum of single KLs", "KL to BF16, nats", "95 % interval"]
    rows = [
        [
            name,
            f"{entry['bits_per_weight']:.3f}",
            f"{entry['predicted_kl']:.4e}",
            f"{entry['kl']:.4e}",
            _interval(entry),
        ]
        for name, entry in content["variants"].items()
    ]
    lines += ["", *columns([head, *rows]), ""]
    if "plan" in content:
        counts = ", ".join(f"{count} layers {word}" for word, count in content["plan"]["counts"].items())
        lines.append(f"  plan: {counts}, in {folder / 'sensitivity.yaml'}")
    else:
        lines.append("  no plan: give a budget in bits per weight, --bits 6")
    return "\n".join(lines)


def _interval(entry: dict[str, Any]) -> str:
    return "[{:.1e}, {:.1e}]".format(*entry["interval"])
