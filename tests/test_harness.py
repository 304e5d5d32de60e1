"""Our adapter against lm-eval's own Hugging Face backend on the same weights, request by request, in every layout."""

import json
import runpy
from pathlib import Path

import pytest

WORKERS = Path(__file__).with_name("workers")
LONG = "It was a dark night, and the wind blew over the hills. " * 24
"""More tokens than tiny's context of 256."""
PAIRS = [
    ("The cat sat on the", " mat"),
    ("", "The first words of a text"),
    ("A space ends this context ", "word and another"),
    ("Spaces end this one   ", "word"),
    ("unicode", " codé ünï 漢字🙂 ₂"),
    ("half of a wor", "d that merges over the border"),
    ("two\n", "\nlines"),
    (LONG, " the end"),
    ("short", " " + LONG[:400]),
    ("q", "a"),
]
TEXTS = ["One short text.", "漢字🙂", LONG, "x"]
CONTEXTS = ["Once upon a time", "A", "The quick brown fox jumps over", "漢字 and", LONG, "once more,\n"]
EXACT = 1e-4


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):
    """(folder with the requests, lm-eval's own answers)."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("harness")
    (folder / "model").symlink_to(tiny_model)
    hf = HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=3)
    asked = runpy.run_path(str(WORKERS / "harness.py"))["asked"]
    free = [[context, {"until": [], "max_gen_toks": 16, "do_sample": False}] for context in CONTEXTS]
    texts = hf.generate_until(asked("generate_until", free), disable_tqdm=True)
    # Stop strings out of the middle of what the model says: they begin and end inside tokens.
    stopped = [
        [context, {"until": ["\n\n\n", text[5:8]], "max_gen_toks": 20, "temperature": 0.0}]
        for context, text in zip(CONTEXTS, texts, strict=True)
    ]
    requests = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [[text] for text in TEXTS],
        "generate_until": free + stopped,
    }
    (folder / "requests.json").write_text(json.dumps(requests))
    return folder, {
        kind: getattr(hf, kind)(asked(kind, arguments), disable_tqdm=True) for kind, arguments in requests.items()
    }


@pytest.fixture(scope="module")
def together(reference, forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "found.json"
    forks.script(WORKERS / "harness.py", reference[0], out, ranks=2)
    return json.loads(out.read_text())


def agree(found: dict, expected: dict) -> None:
    for mine, theirs in zip(found["loglikelihood"], expected["loglikelihood"], strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=EXACT, rel=1e-6)
        assert mine[1] == theirs[1]
    assert found["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=EXACT, rel=1e-6)
    assert found["generate_until"] == expected["generate_until"]
    assert found["truncated"] == 3  # of the pairs one, of the prompts one, twice


def test_the_requests_can_tell_a_wrong_adapter(reference):
    _, expected = reference
    texts = expected["generate_until"]
    assert len(set(texts[: len(CONTEXTS)])) == len(CONTEXTS)
    assert all(len(cut) < len(whole) for whole, cut in zip(texts[: len(CONTEXTS)], texts[len(CONTEXTS) :], strict=True))
    values = [value for value, _ in expected["loglikelihood"]]
    assert len({round(value, 2) for value in values}) == len(PAIRS)


@pytest.mark.slow
def test_one_process_answers_as_lm_evals_own_backend(reference):
    folder, expected = reference
    world = runpy.run_path(str(WORKERS / "world.py"))
    worker = runpy.run_path(str(WORKERS / "harness.py"))
    with world["world_of_one"]() as opened:
        agree(worker["answers"](folder, worker["LAYOUTS"][1]["tp1"], opened), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_uneven", "dp2"])
def test_two_processes_answer_as_lm_evals_own_backend(reference, together, layout):
    agree(together[layout], reference[1])
    decoded = together[layout]["decoded"]
    assert decoded["cached"] == decoded["plain"]
    assert decoded["same_everywhere"]
    assert len({tuple(tokens) for tokens in decoded["plain"]}) == len(decoded["plain"])


@pytest.mark.slow
def test_an_error_on_rank_0_reaches_every_rank(together):
    first, second = together["failures"]
    assert first == ["UserError: the task file is wrong", "ZeroDivisionError: no items"]
    assert second == ["UserError: the task file is wrong", "UserError: rank 0: no items"]
