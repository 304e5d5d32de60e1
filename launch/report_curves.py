"""The plots of a report, as data: loss, weight errors per layer, block scales, KL by position."""

import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.export.reader import E4M3, E8M0, open_checkpoint
from halfbyte.launch.report_blocks import Block, Figures, Text
from halfbyte.launch.report_numbers import stage_name
from halfbyte.launch.report_plots import Plot, Series, draw, moving_mean
from halfbyte.launch.report_run import Absent, RunFiles
from halfbyte.training.config import Method, TaskKind
from halfbyte.training.config_distill import Distill
from halfbyte.training.errors import UserError
from halfbyte.training.scoring import kl_places

BINS = 16
"""Positions of long texts are gathered into this many bins."""
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# Loss -------------------------------------------------------------------------------------------------------------


def loss(files: RunFiles) -> list[Block]:
    """The loss of every step."""
    losses = [float(value) for value in files.train()["losses"]]
    if not losses:
        raise Absent("train.json holds no loss: no step was made")
    steps = list(range(1, len(losses) + 1))
    label = "cross-entropy, nats per token"
    if files.recipe.method is Method.qad:
        plain = replace(files.recipe.distill, temperature=1.0) == Distill()
        label = "KL to BF16, nats per token" if plain else "distillation loss per token"
    series, text = [Series("", steps, losses)], ""
    if len(losses) >= 50:
        width = max(5, len(losses) // 20)
        series = [Series("", steps, losses, style="thin"), Series("", steps, moving_mean(losses, width))]
        text = f"Thin: every step. Thick: mean of the last {width} steps."
    described = f"From {losses[0]:.4f} at step 1 to {losses[-1]:.4f} at step {len(losses)}. {text}".strip()
    plot = Plot("loss", "Training loss", described, "optimizer step", label, series)
    return [Figures("Loss", described, [draw(plot)])]


# Weight error -----------------------------------------------------------------------------------------------------


def weight_errors(files: RunFiles) -> list[Block]:
    """Relative RMS error of every quantized weight, a plot for each kind of linear."""
    layers = files.quantize()["layers"]
    before = {name: float(layer["weight_relative_rms_error"]) for name, layer in layers.items()}
    after, note = _errors_after(files)
    unknown = sorted(after.keys() - before.keys())
    if unknown:
        raise ValueError(f"train.json has a weight error of {unknown[0]}, which quantize.json does not know")
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for name, layer in layers.items():
        number = re.search(r"layers\.(\d+)\.", name)
        kind = ", ".join(hf.rpartition(".")[2] for hf in layer["hf"])
        kinds[kind][int(number[1]) if number else 0] = name
    shown = [*before.values(), *after.values()]
    margin = 0.08 * (max(shown) - min(shown)) or 0.01 * max(shown)
    limits = (100 * (min(shown) - margin), 100 * (max(shown) + margin))
    plots = []
    for kind, names in sorted(kinds.items(), key=lambda entry: _place(entry[0])):
        places = sorted(names)
        series = [_errors("before training" if after else "", places, names, before, "before" if after else "after")]
        series += [_errors("after", places, names, after, "after")] if after else []
        described = f"Weight error of {kind} by layer."
        plots.append(
            Plot(f"weight error {kind}", kind, described, "layer", "relative RMS error, %", series, limits=limits)
        )
    text = (
        f"|quantized − original| / |original| of each weight, {len(before)} layers: "
        f"{100 * min(before.values()):.2f} % to {100 * max(before.values()):.2f} % before training"
    )
    if after:
        text += f", {100 * min(after.values()):.2f} % to {100 * max(after.values()):.2f} % after"
    blocks: list[Block] = [Figures("Quantization error of the weights", f"{text}.", [draw(plot) for plot in plots])]
    return blocks + ([Text(note)] if note else [])


def _place(kind: str) -> tuple[int, str]:
    """Kinds of linears in the order in which a layer computes them."""
    first = kind.partition(",")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER), kind


def _errors(label: str, places: list[int], names: dict[int, str], errors: dict[str, float], tone: str) -> Series:
    there = [place for place in places if names[place] in errors]
    return Series(label, there, [100 * errors[names[place]] for place in there], tone=tone)


def _errors_after(files: RunFiles) -> tuple[dict[str, float], str]:
    """Errors after training by layer, and what to say if there are none."""
    try:
        train = files.train()
    except UserError as error:  # if it is damaged, the loss curve says so
        return {}, f"After training: not shown, {files.local(str(error))}."
    if not train.get("weight_relative_rms_error"):
        return {}, "After training: not shown, train.json does not hold the errors (weight_relative_rms_error)."
    return {name: float(value) for name, value in train["weight_relative_rms_error"].items()}, ""


# Scales -----------------------------------------------------------------------------------------------------------


def scales(files: RunFiles) -> list[Block]:
    """Histograms of the exported scales, from the stored codes; one tensor is read at a time."""
    folder = files.checkpoint()
    if files.recipe.method is Method.bf16:
        raise Absent("method bf16 quantizes nothing: the exported files hold no scales")
    counts, second, values = _codes(folder)
    blocks = int(counts.sum())
    if not blocks and not second:
        raise ValueError("the exported files hold no scales")
    figures, text = [], "No layer has block scales."
    if blocks:
        lowest, top = float(values[counts > 0].min()), float(values[counts > 0].max())
        text = (
            f"{blocks:,} blocks; scales from {lowest:.4g} to {top:.4g}; "
            f"{int(counts[values == values.max()].sum()):,} of them at the format's largest value ({values.max():g})."
        )
        figures.append(draw(_block_plot(counts, values, text)))
    if second:
        figures.append(draw(_second_plot(second)))
    return [Figures("Scales in the exported files", text, figures)]


def _codes(folder: Path) -> tuple[np.ndarray, dict[str, list[float]], np.ndarray]:
    """Blocks per scale code [256], scales per tensor by what they scale, and the value of each code [256]."""
    checkpoint = open_checkpoint(folder)
    counts, second = np.zeros(256, np.int64), defaultdict(list)
    mxfp4 = False
    for module in checkpoint.quantized_modules():
        mxfp4 |= f"{module}.weight_packed" in checkpoint.entries
        fp8 = checkpoint.entries[f"{module}.weight_scale"].dtype == "F32"
        if not fp8:
            counts += np.bincount(checkpoint.raw(f"{module}.weight_scale").reshape(-1), minlength=256)
        for suffix, what in (("weight_scale" if fp8 else "weight_scale_2", "weights"), ("input_scale", "activations")):
            if f"{module}.{suffix}" in checkpoint.entries:
                second[what].append(float(checkpoint.raw(f"{module}.{suffix}").reshape(())))
                if not 0 < second[what][-1] < math.inf:
                    raise ValueError(f"{module}.{suffix} is {second[what][-1]}, not a positive number")
    values = (E8M0 if mxfp4 else E4M3).copy()
    if counts[~np.isfinite(values) | (values < 0)].any():
        raise ValueError("a block scale is negative or not a number")
    values[~np.isfinite(values)] = 0.0
    return counts, dict(second), values


def _block_plot(counts: np.ndarray, values: np.ndarray, text: str) -> Plot:
    """Share of blocks per octave, so that the uneven spacing of the codes does not show as structure."""
    used = np.flatnonzero(values > 0)
    used = used[np.argsort(values[used])]
    logs = np.log2(values[used].astype(np.float64))
    edges = np.append(logs, 2 * logs[-1] - logs[-2])
    share = 100 * counts[used] / counts.sum() / np.diff(edges)
    there = np.flatnonzero(share)
    first, last = max(0, there[0] - 1), min(len(share), there[-1] + 2)
    series = Series("", edges[first : last + 1].tolist(), share[first:last].tolist(), style="steps")
    return Plot(
        "block scales", "Block scales of the weights", text, "block scale", "blocks, % per octave", [series], True
    )


def _second_plot(second: dict[str, list[float]]) -> Plot:
    """Scales per tensor (second-level ones, and FP8's only ones), in octaves."""
    logs = {what: np.log2(np.array(values)) for what, values in second.items()}
    low = min(math.floor(float(values.min())) for values in logs.values())
    high = max(math.floor(float(values.max())) for values in logs.values()) + 1
    edges = np.arange(low, high + 1) - 0.5 if _whole(logs) else np.arange(low, high + 1)
    tones = {"weights": "after", "activations": "before"}
    series = [
        Series(what, edges.tolist(), np.histogram(values, edges)[0].tolist(), tone=tones[what], style="steps")
        for what, values in logs.items()
    ]
    described = "; ".join(
        f"{what}: 2^{float(v.min()):.3g} to 2^{float(v.max()):.3g} over {len(v)} linears" for what, v in logs.items()
    )
    return Plot("scales per tensor", "Scales per tensor", described, "scale per tensor", "linears", series, True)


def _whole(logs: dict[str, np.ndarray]) -> bool:
    return all(bool((values == np.round(values)).all()) for values in logs.values())


# KL by position ---------------------------------------------------------------------------------------------------


def kl_by_position(files: RunFiles) -> list[Block]:
    """Mean KL to BF16 by place in the scored text, a plot for each task."""
    judged, there = files.judged(), files.evaluate()
    stages = list(dict.fromkeys(stage for stage in ("ptq", judged) if stage in there and stage != "bf16"))
    plots, without = [], []
    for task in there[judged]:
        series = [_positions(files, stage, task, "after" if stage == judged else "before") for stage in stages]
        found = [curve for curve in series if curve is not None]
        if not found:
            without.append(task)
            continue
        described = "; ".join(f"{curve.label}: {curve.y[0]:.3f} at first, {curve.y[-1]:.3f} at last" for curve in found)
        label = "scored token (1 = first)"
        plots.append(Plot(f"kl {task}", task, described, label, "KL to BF16, nats per token", found))
    if not plots:
        raise Absent("no score has its KL by position (evaluate.kl_positions = 0, or scored by an older version)")
    note: list[Block] = [Text(f"Without KL by position: {', '.join(without)}.")] if without else []
    text = f"Means over the items; shaded: ±1.96 standard errors. Long texts in up to {BINS} bins."
    return [Figures("KL to BF16 by position", text, [draw(plot) for plot in plots]), *note]


def _positions(files: RunFiles, stage: str, task: str, tone: str) -> Series | None:
    rows = [row for row in files.rows(stage, task) if row.get("kl_at")]
    kind = next((entry.kind for entry in files.recipe.evaluate.tasks if entry.name == task), None)
    said = {}
    if kind is TaskKind.lm_eval:  # what was generated is compared along BF16's output
        said = {row["item"]: row.get("output_tokens") for row in files.rows("bf16", task)}
    bins: dict[int, list[float]] = defaultdict(list)
    placed = []
    for row in rows:
        places = _places(row, said.get(row["item"]), files.recipe.evaluate.kl_positions)
        if len(places) == len(row["kl_at"]):
            placed.append((places, row["kl_at"]))
        elif kind is not TaskKind.lm_eval:  # a text of several windows is compared in each of them
            raise ValueError(f"item {row['item']} has {len(row['kl_at'])} KL values for {len(places)} positions")
    if not placed:
        return None
    longest = 1 + max(max(places) for places, _ in placed)
    width = math.ceil(longest / BINS)
    for places, values in placed:
        mine: dict[int, list[float]] = defaultdict(list)
        for place, kl in zip(places, values, strict=True):
            mine[place // width].append(float(kl))
        for number, inside in mine.items():
            bins[number].append(math.fsum(inside) / len(inside))  # an item counts once per bin
    return _means(bins, width, stage_name(stage), tone)


def _means(bins: dict[int, list[float]], width: int, label: str, tone: str) -> Series:
    """Means of bins of `width` tokens, with a band of 1.96 standard errors."""
    x, y, low, high = [], [], [], []
    for number in sorted(bins):
        values = bins[number]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        error = 1.96 * math.sqrt(variance / len(values))
        x.append(number * width + (width + 1) / 2)
        y.append(mean)
        low.append(max(0.0, mean - error))
        high.append(mean + error)
    return Series(label, x, y, tone=tone, low=low, high=high)


def _places(row: dict[str, Any], said: int | None, kl_positions: int) -> list[int]:
    """Where an item was compared, counted in scored tokens from 0.

    Args:
        row: Fields of scoring.Score.
        said: Tokens that BF16 generated for the item; None if nothing is generated.
        kl_positions: evaluate.kl_positions.
    """
    scored = row["tokens"] if said is None else said
    return kl_places(int(scored), kl_positions)
