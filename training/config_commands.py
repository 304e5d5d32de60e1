"""Sections of the recipe that commands beside `halfbyte run` read."""

from dataclasses import dataclass


@dataclass
class Sensitivity:
    """What `halfbyte sensitivity` measures; a run does not read it."""

    data: str | None = None
    """JSONL of text that nothing is trained on; none means the first evaluation task of kind text."""
    tokens: int = 4096
    """Positions at which every variant is compared with the BF16 model: texts, cut to a sixteenth of it (or 32 tokens),
    until there are as many."""
    bits: float | None = None
    """Budget of the mixed plan, bits per weight with block scales, over the linears that quantize.exclude leaves.
    None chooses no plan."""


@dataclass
class Generate:
    """Training text sampled from the BF16 model. Which keys of a line hold text or turns is data.text_key, chat_key."""

    prompts: str | None = None
    """JSONL of what to continue; the command line sets it."""
    out: str | None = None
    """JSONL to write; the command line sets it."""
    max_tokens: int = 512
    """Most tokens to generate per prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    seed: int = 1234
    """Of the sampling."""
