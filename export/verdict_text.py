"""The gate's verdict in words: for the files that go out with a checkpoint, and for the end of a run."""

from typing import Any

from halfbyte.training.config import GateRule

RULES = {
    GateRule.bf16: "every score within its threshold of BF16",
    GateRule.better_than_ptq: "perplexity and KL below PTQ's, no other score significantly lower",
}
"""What a pass means under a rule."""
BASELINES = {"control": "the BF16 control", "bf16": "BF16", "ptq": "PTQ"}
"""Models that a candidate is compared with, by their names in gate.json."""


def waived(verdict: dict[str, Any]) -> str:
    """What stands behind a verdict that is inconclusive but released."""
    waves = verdict["verdict"] == "inconclusive" and verdict["release"]
    return " (released: gate.inconclusive = release)" if waves else ""


def beside(verdict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rulings of gate.json that do not count: what the model was compared with -> verdict, reasons, tasks."""
    blocks = {baseline: verdict[f"against_{baseline}"] for baseline in ("control", "bf16")}
    return {BASELINES[name]: block for name, block in blocks.items() if block and name != verdict["baseline"]}


def verdict_lines(verdict: dict[str, Any]) -> list[str]:
    """Everything that was judged, in Markdown: a pass under one rule may be a failure beside the BF16 model."""
    rule = GateRule(verdict["rule"])
    lines = [f"Verdict: **{verdict['verdict']}**{waived(verdict)}, by the rule `{rule}`: {RULES[rule]}."]
    lines += [f"- {reason}" for reason in verdict["reasons"]]
    for against, block in beside(verdict).items():
        lines += ["", f"Within the thresholds of {against}: **{block['verdict']}**."]
        lines += [f"- {reason}" for reason in block["reasons"]]
    return lines
