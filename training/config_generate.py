"""The recipe's section `generate`: what `halfbyte generate` samples; a run does not read it."""

from dataclasses import dataclass


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
