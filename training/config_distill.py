"""The recipe's section `distill`: how QAD compares the student with its teacher. Torch-free, as config.py."""

from dataclasses import dataclass, field
from enum import StrEnum

TEACHER_INDEX = "teacher.json"
"""In the folder that `halfbyte teacher` writes and distill.teacher names: what its files were made from."""


class Divergence(StrEnum):
    """How far the student's distribution is from the teacher's; formulas in losses.py."""

    forward_kl = "forward_kl"
    """KL(teacher || student)."""
    reverse_kl = "reverse_kl"
    """KL(student || teacher)."""
    jensen_shannon = "jensen_shannon"
    """Both towards their mixture, weighted by distill.beta."""


@dataclass
class Distill:
    """QAD: loss per token = divergence + cross_entropy x CE to the labels + hidden x MSE of hidden states."""

    loss: Divergence = Divergence.forward_kl
    beta: float = 0.5
    """jensen_shannon: the teacher's weight in the mixture, between 0 and 1."""
    temperature: float = 1.0
    """Divides the logits of both models."""
    top_k: int | None = None
    """Compare the teacher's K likeliest tokens and all others as one; none compares the full vocabulary."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy to the labels, nats."""
    hidden: float = 0.0
    """Weight of the mean squared difference of student and teacher after the last norm, over the hidden size."""
    hidden_layers: list[int] = field(default_factory=list)
    """Numbers of layers, from 0, whose outputs are compared instead: the mean over them. Not with pipeline stages or
    recomputation."""
    teacher: str | None = None
    """Folder that `halfbyte teacher` wrote: the top-k is read from there, and no teacher is loaded."""
