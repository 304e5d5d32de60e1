"""Text from the model in place: greedy or sampled decoding with a key/value cache, under TP, PP and DP.

Rows of a batch are padded on the right and every row's cache slot is its position, so a row's prompt goes through the
very arithmetic of scoring, and a decoding step writes over what padding left behind: the result of a row does not
depend on its neighbours. Under sequence parallelism a single token cannot be split, so it is off while decoding.
Shapes: B rows, S prompt length, T cache slots, G key/value heads of this rank, D head dimension, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from halfbyte.training import typed
from halfbyte.training.data import MicroBatch
from halfbyte.training.model import Attention
from halfbyte.training.schedule import collect, token_batch

SPLIT = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Megatron's marks of modules that split the sequence over tensor-parallel ranks."""


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
        index: Name of this prompt; with `seed` it decides what is sampled.
        tokens: At least one.
        limit: Most tokens to generate; 0 generates nothing.
        stops: Strings that end the output as soon as its text holds one.
        temperature: 0 takes the likeliest token; else tokens are sampled from softmax(logits / temperature).
        seed: Of the sampling.
    """

    index: int
    tokens: tuple[int, ...]
    limit: int
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Output:
    """How a prompt went on.

    Attributes:
        index: Prompt.index.
        tokens: What was generated, the token that ended it included.
        text: The tokens as text, without special tokens; a stop string and what follows it are still there.
        cut: Whether it ended at the limit.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    cut: bool


@dataclass
class Decoder:
    """A model, ready to continue prompts.

    Attributes:
        model: This rank's GPTModel, in evaluation mode.
        device: Where its parameters are.
        ends: Token ids that end an output.
        decode: Token ids -> text without special tokens.
    """

    model: torch.nn.Module
    device: torch.device
    ends: Collection[int]
    decode: Callable[[list[int]], str]

    def __call__(self, batch: Sequence[Prompt]) -> list[Output]:
        """Continue one batch of prompts; collective over the tensor- and pipeline-parallel ranks of this replica.

        Returns:
            One Output per prompt, in order, the same on every rank of the replica.
        """
        rows = [_Row(prompt, self) for prompt in batch]
        live = [row for row in rows if not row.done]
        if live:
            with _undivided(self.model), torch.no_grad():
                self._run(live)
        return [row.output() for row in rows]

    def _run(self, live: "list[_Row]") -> None:
        # A pipeline is filled by cutting the rows into as many micro-batches as it has stages.
        parts = parallel_state.get_pipeline_model_parallel_world_size()
        slots = max(len(row.prompt.tokens) for row in live) + max(row.prompt.limit for row in live)
        rows = _filled(live, parts)
        tokens = _right_padded([row.prompt.tokens for row in rows])
        caches = [Cache(slots, part) for part in _parts([len(row.prompt.tokens) for row in rows], parts)]
        while True:
            chosen = self._step(torch.tensor(tokens, device=self.device), caches, rows)
            for row, token in zip(live, chosen, strict=False):  # what fills up the last part is not heard
                row.add(token)
            going = [i for i, row in enumerate(live) if not row.done]
            if not going:
                return
            if len(going) <= len(live) // 2:  # what has ended need not be computed along
                caches = Cache.select(caches, _filled(going, parts), parts)
                live = [live[i] for i in going]
                rows = _filled(live, parts)
            tokens = [[row.tokens[-1]] for row in rows]

    def _step(self, tokens_BS: torch.Tensor, caches: "list[Cache]", rows: "list[_Row]") -> list[int]:
        """The next token of every row."""
        size = len(rows) // len(caches)
        batches = [token_batch(part) for part in tokens_BS.split(size)]

        def forward(stage: torch.nn.Module, batch: MicroBatch, index: int) -> torch.Tensor:
            with _cached(self.model, caches[index]):
                positions = caches[index].positions(batch.tokens)
                return stage(batch.tokens, positions, None)

        def take(logits: torch.Tensor, index: int) -> torch.Tensor:
            last = caches[index].last(logits)
            whole = gather_from_tensor_model_parallel_region(last)
            return _choose(whole.float(), rows[index * size : (index + 1) * size])

        chosen = collect(self.model, batches, take, forward)
        for cache in caches:
            cache.advance()
        answer = torch.cat(chosen) if chosen else torch.empty(len(rows), dtype=torch.int64, device=self.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = typed.pipeline_group()
            dist.broadcast(answer, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return answer.tolist()


@dataclass
class Cache:
    """Keys (with their rotation) and values of a micro-batch, per layer.

    Attributes:
        slots: T.
        lengths: Tokens of every row so far.
        filled: Whether the prompts have gone through.
        layers: Layer number -> keys and values, each [B, G, T, D].
        step: Row numbers [B], their positions [B] and the mask [B, 1, 1, T'] of this step, the same in every layer.
    """

    slots: int
    lengths: list[int]
    filled: bool = False
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def update(
        self, layer: int, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store a step's keys and values.

        Returns:
            The keys and values to attend to, and bool [B, 1, 1, T'], True where a row may look; None: causal.
        """
        if not self.filled:
            self.layers[layer] = (self._stored(k_BGSD), self._stored(v_BGSD))
            return k_BGSD, v_BGSD, None
        keys, values = self.layers[layer]
        if self.step is None:  # the first layer of this step
            at = self._positions(k_BGSD.device)
            rows = torch.arange(len(at), device=at.device)
            seen = torch.arange(max(self.lengths) + 1, device=at.device)
            self.step = (rows, at, (seen <= at[:, None])[:, None, None])
        rows, at, mask = self.step
        keys[rows, :, at], values[rows, :, at] = k_BGSD[:, :, 0], v_BGSD[:, :, 0]
        return keys[:, :, : mask.shape[3]], values[:, :, : mask.shape[3]], mask

    def _stored(self, x_BGSD: torch.Tensor) -> torch.Tensor:
        whole = x_BGSD.new_zeros(*x_BGSD.shape[:2], self.slots, x_BGSD.shape[3])
        whole[:, :, : x_BGSD.shape[2]] = x_BGSD
        return whole

    def _positions(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.lengths, device=device)

    def positions(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S]: where a step's tokens stand in their rows."""
        if self.filled:
            return self._positions(tokens_BS.device)[:, None]
        return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)

    def last(self, logits_BSV: torch.Tensor) -> torch.Tensor:
        """[B, V]: the logits after each row's last token."""
        if self.filled:
            return logits_BSV[:, 0]
        at = self._positions(logits_BSV.device) - 1
        return logits_BSV[torch.arange(len(at), device=at.device), at]

    def advance(self) -> None:
        """A step is over: its tokens are in the cache."""
        if self.filled:
            self.lengths = [length + 1 for length in self.lengths]
        self.filled, self.step = True, None

    @staticmethod
    def select(caches: "list[Cache]", rows: Sequence[int], parts: int) -> "list[Cache]":
        """The caches of some rows (counted over all of `caches`), cut into `parts` again."""
        lengths = [length for cache in caches for length in cache.lengths]
        chosen = [Cache(caches[0].slots, part, True) for part in _parts([lengths[row] for row in rows], parts)]
        keep = torch.tensor(rows)

        def pieces(layer: int, side: int) -> Iterable[torch.Tensor]:
            whole = torch.cat([cache.layers[layer][side] for cache in caches])
            return whole[keep.to(whole.device)].chunk(parts)

        for layer in caches[0].layers:
            for cache, keys, values in zip(chosen, pieces(layer, 0), pieces(layer, 1), strict=True):
                cache.layers[layer] = (keys, values)
        return chosen


class _Row:
    """A prompt and what has been generated so far."""

    def __init__(self, prompt: Prompt, decoder: Decoder):
        self.prompt, self.decoder = prompt, decoder
        self.tokens: list[int] = []
        self.stopped = False
        # Every token of a stop string has at least a byte of it; characters cut in two add a few tokens on each side.
        self.window = 8 + max((len(stop.encode()) for stop in prompt.stops), default=0)

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.prompt.limit

    def add(self, token: int) -> None:
        if self.done:  # a row that is computed along with others
            return
        self.tokens.append(token)
        self.stopped = token in self.decoder.ends
        if self.prompt.stops and not self.stopped:
            tail = self.decoder.decode(self.tokens[-self.window :])
            self.stopped = any(stop in tail for stop in self.prompt.stops)

    def output(self) -> Output:
        text = self.decoder.decode(self.tokens) if self.tokens else ""
        return Output(self.prompt.index, tuple(self.tokens), text, not self.stopped)


def _filled[X](rows: list[X], parts: int) -> list[X]:
    """The rows and, if they cannot be cut into `parts` equal ones, the last row again."""
    return rows + [rows[-1]] * (-len(rows) % parts)


def _right_padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of equal length; any token will do for padding: causal attention keeps it from the row's own positions."""
    length = max(len(row) for row in rows)
    return [[*row, *[0] * (length - len(row))] for row in rows]


def _parts(values: list[int], parts: int) -> list[list[int]]:
    size = len(values) // parts
    return [values[start : start + size] for start in range(0, len(values), size)]


def _choose(logits_BV: torch.Tensor, rows: "Sequence[_Row]") -> torch.Tensor:
    """int64 [B]: the likeliest token, or a sample by the exponential race (argmax of p / Exp(1) has distribution p)."""
    chosen = logits_BV.argmax(dim=-1)
    for i, row in enumerate(rows):
        if row.prompt.temperature > 0:
            # Seeded per prompt and position: a sample does not depend on the batch or the layout.
            key = hash((row.prompt.seed, row.prompt.index, len(row.tokens))) & 0x7FFF_FFFF_FFFF_FFFF
            noise = torch.empty(logits_BV.shape[1]).exponential_(generator=torch.Generator().manual_seed(key))
            chosen[i] = ((logits_BV[i] / row.prompt.temperature).softmax(-1) / noise.to(logits_BV.device)).argmax()
    return chosen


@contextlib.contextmanager
def _cached(model: Any, cache: Cache) -> Iterator[None]:
    """The model's attention reads and fills `cache`, and rotates by each row's own position."""
    rotary = model.rotary_pos_emb
    attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]

    def rotate(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        if not cache.filled:
            return None  # Megatron's own: positions 0 to S-1
        return rotary.get_emb(max(cache.lengths) + 1)[cache._positions(out.device)][:, 0, 0][None, :, None]

    handle = rotary.register_forward_hook(rotate)
    for attention in attentions:
        assert isinstance(attention, Attention)
        attention.cache = cache
    try:
        yield
    finally:
        handle.remove()
        for attention in attentions:
            attention.cache = None


@contextlib.contextmanager
def _undivided(model: Any) -> Iterator[None]:
    """No sequence parallelism inside: one token cannot be split."""
    holders = [model.config, *model.modules()]
    marks = [(holder, name) for holder in holders for name in SPLIT if vars(holder).get(name) is True]
    for holder, name in marks:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in marks:
            setattr(holder, name, True)
