"""Decoding with a cache against forward passes without one, and against transformers' generate."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch

from halfbyte.training import generate, quantize
from halfbyte.training.config import Recipe
from halfbyte.training.fast_path import weights_once
from halfbyte.training.generate import Decoder, Prompt
from halfbyte.training.schedule import collect, token_batch

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
END = 63


def letters(tokens: list[int]) -> str:
    """Token n is a letter; 10 tokens are one half of a two-token stop."""
    return "".join(chr(ord("a") + token % 26) for token in tokens)


@pytest.fixture(scope="module")
def opened():
    with WORLD["world_of_one"]() as opened:
        yield opened


@pytest.fixture(scope="module")
def gpt(opened):
    shape = dataclasses.replace(WORLD["SHAPE"], max_positions=64)
    return WORLD["random_model"](opened, Recipe(), shape=shape).double().eval()


def prompts(*lengths: int, limit: int = 12, **settings) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 60, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(i, tuple(row), limit, **settings) for i, row in enumerate(rows)]


def without_cache(gpt, prompt: Prompt, ends=(END,)) -> list[int]:
    tokens = list(prompt.tokens)
    for _ in range(prompt.limit):
        (logits,) = collect(gpt, [token_batch(torch.tensor([tokens]))], lambda out, index: out)
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt.tokens) :]


def decoder(gpt, ends=(END,)) -> Decoder:
    return Decoder(gpt, torch.device("cpu"), frozenset(ends), letters)


def test_a_batch_of_unequal_prompts_says_what_each_says_without_a_cache(gpt):
    batch = prompts(7, 1, 19, 3, 4)
    found = decoder(gpt)(batch)
    assert [output.index for output in found] == [0, 1, 2, 3, 4]
    for output, prompt in zip(found, batch, strict=True):
        assert list(output.tokens) == without_cache(gpt, prompt)
        assert output.text == letters(output.tokens)
    assert len({output.tokens for output in found}) == 5  # the model does not say the same to all


def test_rows_that_have_ended_leave_the_batch_and_the_others_go_on(gpt):
    limits = zip(prompts(3, 5, 8, 2, 9), (1, 14, 2, 0, 6), strict=True)
    batch = [dataclasses.replace(prompt, limit=limit) for prompt, limit in limits]
    for output, prompt in zip(decoder(gpt)(batch), batch, strict=True):
        assert list(output.tokens) == without_cache(gpt, prompt)
        assert output.cut
    nothing = decoder(gpt)(batch[3:4])
    assert nothing == [generate.Output(3, (), "", True)]


def test_end_tokens_and_stop_strings_end_an_output(gpt):
    (prompt,) = prompts(7)
    whole = without_cache(gpt, prompt)
    (ended,) = decoder(gpt, ends=(whole[4],))([prompt])
    first = whole.index(whole[4])
    assert (list(ended.tokens), ended.cut) == (whole[: first + 1], False)
    stop = letters(whole[2:5])  # straddles three tokens
    (stopped,) = decoder(gpt)([dataclasses.replace(prompt, stops=("?", stop))])
    assert stopped.text.endswith(stop)
    assert not stopped.cut
    assert len(stopped.tokens) == letters(whole).index(stop) + 3


def test_sampling_depends_on_the_seed_and_not_on_the_batch(gpt):
    batch = prompts(7, 3, 5, temperature=1.5, seed=3)
    found = decoder(gpt)(batch)
    assert decoder(gpt)(batch) == found
    assert [output for prompt in batch for output in decoder(gpt)([prompt])] == found
    assert decoder(gpt)([dataclasses.replace(prompt, seed=4) for prompt in batch]) != found
    greedy = decoder(gpt)([dataclasses.replace(prompt, temperature=0.0) for prompt in batch])
    cold = decoder(gpt)([dataclasses.replace(prompt, temperature=1e-6) for prompt in batch])
    assert [a.tokens for a in cold] == [a.tokens for a in greedy]


def test_samples_follow_the_distribution(gpt):
    (prompt,) = prompts(4, limit=1, temperature=1.0)
    (logits,) = collect(gpt, [token_batch(torch.tensor([prompt.tokens]))], lambda out, index: out)
    probability = logits[0, -1].softmax(-1)
    drawn = [output.tokens[0] for output in decoder(gpt)([dataclasses.replace(prompt, index=i) for i in range(2000)])]
    counts = torch.bincount(torch.tensor(drawn), minlength=64).double()
    chi_square = float(((counts - 2000 * probability) ** 2 / (2000 * probability)).sum())
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5


def test_decoding_leaves_the_model_as_it_was(gpt):
    tokens = [token_batch(torch.arange(24).reshape(2, 12))]
    before = collect(gpt, tokens, lambda out, index: out)[0]
    with pytest.raises(ZeroDivisionError):
        Decoder(gpt, torch.device("cpu"), (), lambda tokens: letters([1 // 0]))(prompts(3, stops=("x",)))
    assert torch.equal(collect(gpt, tokens, lambda out, index: out)[0], before)
    assert all(layer.self_attention.core_attention.cache is None for layer in gpt.decoder.layers)


def test_with_quantizers_on_the_cache_changes_nothing(opened):
    recipe = Recipe()
    shape = dataclasses.replace(WORLD["SHAPE"], max_positions=64)
    gpt = WORLD["random_model"](opened, recipe, shape=shape).double().eval()
    batch = prompts(7, 1, 19)
    before = [without_cache(gpt, prompt) for prompt in batch]
    windows = [token_batch(torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(2)))]
    quantize.quantize(gpt, recipe, lambda stage: collect(stage, windows, None))
    with weights_once(gpt):
        found = [list(output.tokens) for output in decoder(gpt)(batch)]
    assert found == [without_cache(gpt, prompt) for prompt in batch]
    assert found != before  # the quantizers are on
