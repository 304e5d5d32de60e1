"""Training text in the model's own words: prompts in, the same records with what the model says after them out.

Distillation works best on text that the model itself would write (arXiv 2306.13649). What is sampled for a prompt is a
function of seed, prompt, and how often the prompt stood in the file before: a file may grow or be sorted anew, and a
prompt that stands there three times gives three samples. Lines are written block by block, so that a stopped command
goes on after the last whole block, with the very batches that it would have had.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from halfbyte.training import config
from halfbyte.training.errors import UserError
from halfbyte.training.generate import Output, Prompt
from halfbyte.training.jsonl import read_jsonl, text_field
from halfbyte.training.model_identity import fingerprint, joined
from halfbyte.training.packing import is_chat, turns_of
from halfbyte.training.tasks import prefix_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK = 1024
"""Prompts that are answered between two writes: enough to fill the batches of many data-parallel ranks."""


@dataclass(frozen=True)
class Request:
    """One line of the prompts.

    Attributes:
        prompt: Its tokens and how to continue them; Prompt.index is a hash that names it.
        text: What to continue, of a text line.
        turns: The turns so far, of a chat line; else None.
    """

    prompt: Prompt
    text: str
    turns: list[dict[str, str]] | None


def load_requests(
    tokenizer: "PreTrainedTokenizerFast", recipe: config.Recipe, max_length: int, vocab: int
) -> list[Request]:
    """Read and tokenize the prompts: texts behind BOS (EOS if there is none), conversations by the chat template.

    Args:
        tokenizer: Fast tokenizer of the model.
        recipe: `generate` says which file, and temperature, seed and limit of the answers; `data` the keys of a line.
        max_length: Tokens that the model takes, the answer included.
        vocab: Rows of the model's embedding.

    Raises:
        UserError: the file or a line (named) is unusable: another key, an assistant's turn at the end, too long.
    """
    generate, data = recipe.generate, recipe.data
    path = Path(generate.prompts or "")
    records = read_jsonl(path)
    first = next(records)
    chat = is_chat(first[1], data)
    if chat and tokenizer.chat_template is None:
        raise UserError(f"{path}: chat prompts, but the tokenizer has no chat template; use an instruct model")
    before: Counter[tuple[int, ...]] = Counter()
    requests = []
    for line, record in (first, *records):
        where = f"{path}:{line}"
        text, conversation, tokens = (_chat if chat else _text)(tokenizer, data, record, where)
        if len(tokens) >= max_length:
            raise UserError(f"{where}: the prompt has {len(tokens)} tokens, the model takes {max_length}; shorten it")
        if max(tokens) >= vocab:
            raise UserError(
                f"{where}: token id {max(tokens)} is outside the model's vocabulary of {vocab}; tokenizer and weights "
                "in model.path do not belong together"
            )
        limit = min(generate.max_tokens, max_length - len(tokens))
        name = _name(tokens, before[tokens])
        before[tokens] += 1
        prompt = Prompt(name, tokens, limit, temperature=generate.temperature, seed=generate.seed)
        requests.append(Request(prompt, text, conversation))
    return requests


def _text(tokenizer: Any, data: config.Data, record: dict[str, Any], where: str) -> tuple[str, None, tuple[int, ...]]:
    text = text_field(record, data.text_key, where)
    return text, None, (prefix_token(tokenizer), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chat(tokenizer: Any, data: config.Data, record: dict[str, Any], where: str) -> tuple[str, list, tuple[int, ...]]:
    conversation = turns_of(record, data.chat_key, where)
    if conversation[-1]["role"] == "assistant":
        raise UserError(f"{where}: ends with the assistant's turn, which is to be generated; take it out")
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template rejects the conversation ({error}); fix its turns") from error
    return "", conversation, tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _name(tokens: tuple[int, ...], before: int) -> int:
    """A 56-bit hash of a prompt and of how often it stood in the file before."""
    return int.from_bytes(hashlib.sha256(f"{tokens} {before}".encode()).digest()[:7])


def record(request: Request, output: Output, data: config.Data) -> dict[str, Any]:
    """A line that data.train takes, with the length of the answer in tokens and whether it ended at its limit."""
    if request.turns is None:
        content: dict[str, Any] = {data.text_key: request.text + output.text}
    else:
        content = {data.chat_key: [*request.turns, {"role": "assistant", "content": output.text}]}
    return {**content, "generated_tokens": len(output.tokens), "cut": output.cut}


def identity(recipe: config.Recipe) -> dict[str, Any]:
    """What decides about the lines of an output file, but for the rounding of another layout.

    Raises:
        UserError: the prompts cannot be read, or a weight file is damaged.
    """
    generate, path = recipe.generate, Path(recipe.generate.prompts or "")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return {
        "model_sha256": joined(fingerprint(Path(recipe.model.reference or recipe.model.path))),
        "prompts_sha256": digest,
        "data": {key: str(asdict(recipe.data)[key]) for key in ("format", "text_key", "chat_key")},
        "max_tokens": generate.max_tokens,
        "temperature": generate.temperature,
        "seed": generate.seed,
    }


def sample(
    requests: Sequence[Request], answer: Callable[[Sequence[Prompt]], list[Output]], data: config.Data
) -> Iterator[list[dict[str, Any]]]:
    """The lines of the output, in the prompts' order, a block at a time.

    Args:
        requests: What is still to do.
        answer: Passes.generate of the model; collective.
        data: The keys of a line.
    """
    for start in range(0, len(requests), BLOCK):
        block = requests[start : start + BLOCK]
        outputs = {output.index: output for output in answer([request.prompt for request in block])}
        yield [record(request, outputs[request.prompt.index], data) for request in block]
