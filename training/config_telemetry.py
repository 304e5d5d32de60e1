"""The recipe's section about what is watched while a run trains."""

from dataclasses import dataclass


@dataclass
class Telemetry:
    """Beside metrics.jsonl, metrics.prom and W&B, which every run has."""

    tensorboard: bool = False
    """Write the same metrics to <run.dir>/tensorboard."""
    quantization_every_steps: int = 200
    """Compare every quantized weight and linear's input with its rounded value every N steps, on one micro-batch;
    0 never does."""
    stragglers_every_steps: int = 100
    """Time every rank without its waiting for others every N steps; 0 never does. That step runs without overlap."""
    straggler_ratio: float = 1.2
    """A rank is named when it takes this many times the median."""
