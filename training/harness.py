"""lm-evaluation-harness scores the model in place: its tasks, prompts, filters and metrics, our passes.

lm-eval runs on rank 0; the other ranks serve it (crew.py). Tokenization, truncation and stopping are those of lm-eval's
own Hugging Face backend, so that scores agree with it item by item. No bar, no log line, no network.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from halfbyte.training.crew import Crew
from halfbyte.training.errors import UserError
from halfbyte.training.generate import Output, Prompt
from halfbyte.training.scoring import Item, Score, digest

GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature"}
"""What a task may ask of generation; lm-eval's other names for the limit become max_gen_toks."""


class InPlace(TemplateLM):
    """This run's model as lm-eval sees it; on rank 0, inside `Crew.lead`.

    Args:
        crew: Has the jobs "score" (items -> scores) and "generate" (prompts -> outputs).
        tokenizer: The model's tokenizer.
        max_length: Tokens that the model takes.
        compared: Whether a request's item is compared with BF16.
        seed: Of sampling, for tasks that ask for it.

    Attributes:
        answers: Every request with what the model made of it, in order; the windows of a text are one answer.
        prompts: Prompt.index -> prompt, of generation requests.
        truncated: Requests that lost tokens on the left.
    """

    def __init__(
        self,
        crew: Crew,
        tokenizer: Any,
        max_length: int,
        *,
        compared: Callable[[Instance], bool] = lambda request: False,
        seed: int = 0,
    ):
        super().__init__()
        self.crew, self.tokenizer, self.max_length = crew, tokenizer, max_length
        self.compared, self.seed = compared, seed
        self.answers: list[tuple[Instance, Score | Output]] = []
        self.prompts: dict[int, Prompt] = {}
        self.truncated = 0
        self._requests: list[Instance] = []

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: BOS, or EOS for a tokenizer without one."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text already starts with the prefix."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **settings)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy choice) of every request's continuation.

        Raises:
            UserError: a continuation is empty.
        """
        for request in requests:
            if not _args(request)[1]:
                raise UserError(f"{_name(request)}: its continuation is empty; fix the task's target or choices")
        self._requests = list(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        items = []
        for i, (request, (texts, context, continuation)) in enumerate(zip(self._requests, requests, strict=True)):
            moved = len(texts[0]) - len(texts[0].rstrip())  # spaces that end the context are scored with the rest
            size = len(texts[1].encode()) + len(texts[0][len(texts[0]) - moved :].encode())
            items.append(self._item(i, _name(request), context, continuation, size, self.compared(request)))
        scores = self.crew.do("score", items)
        self.answers += zip(self._requests, scores, strict=True)
        return [(score.loglikelihood, score.correct) for score in scores]

    def _item(
        self, index: int, name: str, context: list[int], continuation: list[int], size: int, compared: bool
    ) -> Item:
        if not continuation:
            raise UserError(f"{name}: its continuation adds no token to the context; change the prompt or drop it")
        if len(continuation) > self.max_length:
            raise UserError(
                f"{name}: its continuation has {len(continuation)} tokens, the model takes {self.max_length}; drop it"
            )
        context = context or [self.prefix_token_id]  # of a context of spaces nothing is left; lm-eval's backend stops
        # The last token is a target only, so max_length + 1 fit.
        tokens = (context + continuation)[-(self.max_length + 1) :]
        self.truncated += len(tokens) < len(context) + len(continuation)
        return Item(index, tuple(tokens), len(tokens) - len(continuation), size, compared)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of every request's whole text, after the prefix token, in windows of max_length.

        Raises:
            UserError: a text is empty.
        """
        items: list[Item] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            before = len(items)
            for context, continuation in map(make_disjoint_window, windows):
                items.append(self._item(len(items), _name(request), context, continuation, 0, self.compared(request)))
                owners.append(i)
            if len(items) == before:
                raise UserError(f"{_name(request)}: its text is empty; drop it")
        scores = self.crew.do("score", items)
        parts: list[list[Score]] = [[] for _ in requests]
        for owner, score in zip(owners, scores, strict=True):
            parts[owner].append(score)
        whole = [joined(part, len(request.args[0].encode())) for part, request in zip(parts, requests, strict=True)]
        self.answers += zip(requests, whole, strict=True)
        return [score.loglikelihood or 0.0 for score in whole]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The model's text after every request's context, up to a stop string.

        Raises:
            UserError: the task asks for a way of generating that is not supported, or leaves no room for a context.
        """
        prompts = [self._prompt(i, request) for i, request in enumerate(requests)]
        self.prompts = {prompt.index: prompt for prompt in prompts}
        outputs = self.crew.do("generate", prompts)
        self.answers += zip(requests, outputs, strict=True)
        return [self.text(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def text(self, prompt: Prompt, output: Output) -> str:
        """An output without its stop string and what follows it."""
        return postprocess_generated_text(output.text, list(prompt.stops), None)

    def _prompt(self, index: int, request: Instance) -> Prompt:
        context, settings = _args(request)
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings))
        unknown = wanted.keys() - GENERATION_KEYS
        if unknown:
            raise UserError(
                f"{_name(request)}: generation_kwargs {', '.join(sorted(unknown))}: not supported; "
                f"use {', '.join(sorted(GENERATION_KEYS))}"
            )
        limit = wanted["max_gen_toks"]
        room = self.max_length - limit
        if limit < 0 or room < 1:
            raise UserError(
                f"{_name(request)}: max_gen_toks = {limit}: the model takes {self.max_length} tokens in all; lower it"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(tokens) > room
        temperature = float(wanted.get("temperature", 0.0))
        if wanted["do_sample"] and temperature <= 0:
            raise UserError(f"{_name(request)}: do_sample without a temperature above 0; give one, or do_sample: false")
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = tuple(stop for stop in handle_stop_sequences(wanted["until"], eos) if stop)
        return Prompt(index, tuple(tokens[-room:]), limit, stops, temperature, self.seed)


def joined(parts: Sequence[Score], size: int) -> Score:
    """The score of a text from those of its windows; KL and agreement are means over all compared positions."""
    first = parts[0]
    weights = [len(part.kl_at or []) for part in parts]
    at = [kl for part in parts for kl in part.kl_at or []] or None
    agreement = None
    if at is not None:
        agreement = sum((p.agreement or 0.0) * w for p, w in zip(parts, weights, strict=True)) / len(at)
    return Score(
        item=first.item,
        loglikelihood=sum(part.loglikelihood or 0.0 for part in parts),
        tokens=sum(part.tokens or 0 for part in parts),
        bytes=size,
        correct=all(part.correct for part in parts),
        content=digest([part.content for part in parts]),
        kl=None if at is None else sum(at) / len(at),
        agreement=agreement,
        kl_at=at,
        output=first.output,
    )


def _args(request: Instance) -> tuple[Any, ...]:
    """Prompt and what goes with it; lm-eval's annotation says that there is nothing."""
    return request.args


def _name(request: Instance) -> str:
    return f"task {request.task_name}, item {request.doc_id}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and its tasks print now and then; a run prints one line per stage."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
