"""Which tokens a step computes on: the order of windows, micro-batches, and the calibration set.

The order is a function of (seed, step) alone, so a resume needs no data state beyond the step, and the layout
(data-parallel size, micro-batch size) only decides who computes what. corpus.py makes the windows.

Shapes: L = sequence length in tokens, n = windows, b = micro-batch size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.utils.data import IterableDataset

from halfbyte.training.corpus import PackedDataset, prepare, tokenize_corpus
from halfbyte.training.errors import USAGE, UserError
from halfbyte.training.jsonl import read_jsonl

__all__ = [
    "MicroBatch",
    "PackedDataset",
    "StepStream",
    "calibration_batches",
    "calibration_windows",
    "plain_batches",
    "prepare",
    "rank_micro_batches",
    "read_jsonl",
    "step_windows",
    "tokenize_corpus",
    "window_batch",
    "window_index",
]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one data-parallel rank computes on.

    Attributes:
        tokens: int64 [b, L] inputs.
        labels: int64 [b, L] the next token of each input.
        loss_mask: float32 [b, L]; 1 where the label carries loss.
        segments: int64 [b, L] when documents are isolated, else None.
        windows: Numbers of the b windows in the packed corpus; empty if they are not from there.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    segments: torch.Tensor | None
    windows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        segments = None if self.segments is None else self.segments.to(device)
        return MicroBatch(
            self.tokens.to(device), self.labels.to(device), self.loss_mask.to(device), segments, self.windows
        )


def calibration_windows(dataset: PackedDataset, samples: int, seed: int) -> MicroBatch:
    """Windows to calibrate on, chosen without repetition as a function of (dataset size, seed), as one batch.

    Attention stays inside documents where training's does. In the place of padding a window's own tokens come again, as
    documents of their own: what a model makes of padding would count in every maximum, percentile and mean.

    Args:
        dataset: Packed with the calibration length.
        samples: Windows wanted; all are used when there are fewer, so compare with the result's first dimension.
        seed: Any integer.

    Returns:
        b = min(samples, n) windows without loss, on the CPU.

    Raises:
        UserError: samples < 1.
    """
    if samples < 1:
        reason = f"quantize.calibration_samples = {samples}: calibration needs at least one window; 512 is usual"
        raise UserError(reason, USAGE)
    rows = np.sort(_permutation(len(dataset), seed, 0)[:samples])
    tokens, segments = (array[rows].astype(np.int64) for array in (dataset.tokens[:, :-1], dataset.segments))
    for at, row in enumerate(rows):
        filled = dataset.filled(row)
        turn, place = np.divmod(np.arange(dataset.sequence_length), filled)
        segments[at] = segments[at, place] + turn * (segments[at, filled - 1] + 1)
        tokens[at] = tokens[at, place]
    return _plain(torch.from_numpy(tokens), torch.from_numpy(segments) if dataset.isolate_documents else None)


def calibration_batches(windows: MicroBatch, rows: int, device: torch.device) -> list[list[MicroBatch]]:
    """Windows as micro-batches, every window once: a batch that is filled up would count some of them twice.

    Args:
        windows: At least one.
        rows: Windows per batch.
        device: Where the batches go.

    Returns:
        At most two lists, each with batches of one size as a pipeline wants them: the full batches, and the rest.
    """
    segments, batches = windows.segments, []
    for start in range(0, len(windows.tokens), rows):
        part = slice(start, start + rows)
        batches.append(_plain(windows.tokens[part], None if segments is None else segments[part]).to(device))
    whole = len(windows.tokens) // rows
    return [part for part in (batches[:whole], batches[whole:]) if part]


def _plain(tokens: torch.Tensor, segments: torch.Tensor | None) -> MicroBatch:
    """A batch for a forward pass without a loss."""
    return MicroBatch(tokens, tokens, torch.zeros(tokens.shape, device=tokens.device), segments)


def plain_batches(windows: torch.Tensor, rows: int, device: torch.device) -> list[MicroBatch]:
    """Windows as micro-batches for forward passes without a loss, all of one size as a pipeline wants them.

    Args:
        windows: int64 [n, L], n >= 1.
        rows: Windows per batch; cut to n. The last batch is filled up with windows from the start.
        device: Where the batches go.

    Returns:
        ceil(n / rows) micro-batches whose labels are their tokens and whose loss mask is zero.
    """
    rows = min(rows, len(windows))
    batches = []
    for start in range(0, len(windows), rows):
        tokens = windows[torch.arange(start, start + rows) % len(windows)].to(device)
        batches.append(_plain(tokens, None))
    return batches


def window_index(position: int, *, windows: int, seed: int) -> int:
    """Which window stands at a position of the endless training order; every epoch is its own permutation.

    Args:
        position: 0-based count of sequences since the start of training.
        windows: n.
        seed: Any integer.
    """
    epoch, place = divmod(position, windows)
    return int(_permutation(windows, seed, epoch)[place])


def step_windows(dataset: PackedDataset, step: int, *, global_batch: int, seed: int) -> list[int]:
    """Window indices of one optimizer step (0-based), in order; a batch may span two epochs.

    Args:
        dataset: The packed corpus.
        step: Optimizer step, counted from 0.
        global_batch: Sequences per step over all ranks.
        seed: Any integer.
    """
    start = step * global_batch
    return [window_index(start + i, windows=len(dataset), seed=seed) for i in range(global_batch)]


def rank_micro_batches(
    dataset: PackedDataset,
    step: int,
    *,
    global_batch: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    seed: int,
) -> list[MicroBatch]:
    """One data-parallel rank's share of an optimizer step: global_batch / (micro_batch x data_size) micro-batches.

    Args:
        dataset: The packed corpus.
        step: Optimizer step, counted from 0.
        global_batch: Sequences per step over all ranks.
        micro_batch: b, sequences per forward pass.
        data_rank: This rank's place among the data-parallel ranks.
        data_size: Data-parallel ranks.
        seed: Any integer.

    Raises:
        ValueError: micro_batch x data_size does not divide global_batch (the recipe check refuses this earlier).
    """
    if global_batch % (micro_batch * data_size):
        raise ValueError(f"global_batch {global_batch} is no multiple of {micro_batch} x {data_size}")
    indices = step_windows(dataset, step, global_batch=global_batch, seed=seed)
    share = global_batch // data_size
    mine = indices[data_rank * share : (data_rank + 1) * share]
    return [window_batch(dataset, mine[i : i + micro_batch]) for i in range(0, share, micro_batch)]


class StepStream(IterableDataset):
    """The micro-batches of optimizer steps start_step .. stop_step-1, one list per step (at most one loader worker).

    Args:
        dataset: The packed corpus.
        start_step: First step to yield (a resume passes the number of steps done).
        stop_step: One past the last step.
        global_batch, micro_batch, data_rank, data_size, seed: As in `rank_micro_batches`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        start_step: int,
        stop_step: int,
        *,
        global_batch: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        seed: int,
    ):
        super().__init__()
        self.start_step, self.stop_step = start_step, stop_step
        self._at = partial(
            rank_micro_batches,
            dataset,
            global_batch=global_batch,
            micro_batch=micro_batch,
            data_rank=data_rank,
            data_size=data_size,
            seed=seed,
        )

    def __len__(self) -> int:
        """Steps."""
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield one list of MicroBatch per step."""
        return map(self._at, range(self.start_step, self.stop_step))


def window_batch(dataset: PackedDataset, rows: Sequence[int]) -> MicroBatch:
    """Windows of a corpus as one micro-batch, on the CPU.

    Args:
        dataset: The packed corpus.
        rows: Numbers of b windows.
    """
    rows = list(rows)
    windows = torch.from_numpy(dataset.tokens[rows].astype(np.int64))
    mask = torch.from_numpy(dataset.loss_mask[rows].astype(np.float32))
    segments = torch.from_numpy(dataset.segments[rows].astype(np.int64)) if dataset.isolate_documents else None
    return MicroBatch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), mask, segments, tuple(rows))


@lru_cache(maxsize=2)  # a batch touches two epochs at most
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [size]: 0..size-1 sorted by a hash of (seed, epoch, index).

    numpy promises no stable random streams across its versions, and a resumed run must find the same order. The hash
    is SplitMix64's output function (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    with np.errstate(over="ignore"):
        key = _splitmix64(_splitmix64(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
        return np.argsort(_splitmix64(key + np.arange(size, dtype=np.uint64)), kind="stable")


def _splitmix64(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
