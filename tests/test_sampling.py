"""Training text in the model's own words: what is sampled, in which file, after a stop, under another layout."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from halfbyte.launch import cli
from halfbyte.launch.generate import prepare
from halfbyte.training import model, sampling
from halfbyte.training.blocks import Blocks
from halfbyte.training.config import Data, DataFormat, Model, Recipe
from halfbyte.training.config_commands import Generate
from halfbyte.training.corpus import tokenize_corpus
from halfbyte.training.errors import USAGE, RecipeError, UserError
from halfbyte.training.evaluate import Examination
from halfbyte.training.resolve import resolve
from halfbyte.training.shape import read_shape

pytestmark = pytest.mark.slow  # imports Megatron-Core
TEXTS = ["Once upon a time", "The", "A longer text than the others, with a comma", "The", "Yes", "and"]


def jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Bench:
    """The tiny model in float64, so that a text does not depend on what is computed beside it."""

    def __init__(self, runtime, folder: Path, place: Path):
        self.recipe = Recipe(model=Model(path=str(folder)))
        self.shape = read_shape(folder / "config.json")
        gpt = model.build(self.shape, self.recipe, runtime)
        model.import_hf(gpt, folder, self.shape, runtime)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.exam = Examination.load(self.recipe, runtime, place, self.tokenizer, self.shape.max_positions)
        self.answer = self.exam.passes(gpt.double().eval()).generate

    def requests(self, path: Path, data: Data | None = None, **settings) -> list[sampling.Request]:
        settings = {"max_tokens": 12, "temperature": 1.0} | settings
        self.recipe.generate = Generate(prompts=str(path), **settings)
        self.recipe.data = data or Data()
        return sampling.load_requests(self.tokenizer, self.recipe, self.shape.max_positions, self.shape.vocab)

    def sample(self, path: Path, data: Data | None = None, **settings) -> list[dict]:
        requests = self.requests(path, data, **settings)
        return [line for block in sampling.sample(requests, self.answer, self.recipe.data) for line in block]


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory):
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:
        yield Bench(runtime, tiny_model, tmp_path_factory.mktemp("bench"))


# ---- what is sampled


def test_a_sample_belongs_to_its_prompt_whatever_stands_around_it(bench, tmp_path):
    found = bench.sample(jsonl(tmp_path / "p", [{"text": text} for text in TEXTS]))
    assert [line["text"].startswith(text) for line, text in zip(found, TEXTS, strict=True)] == [True] * len(TEXTS)
    backwards = bench.sample(jsonl(tmp_path / "b", [{"text": text} for text in [*TEXTS[::-1], "new"]]))
    assert sorted(line["text"] for line in backwards[:-1]) == sorted(line["text"] for line in found)
    assert found[1]["text"] != found[3]["text"]  # the same prompt twice: two samples
    assert bench.sample(tmp_path / "p") == found
    other = bench.sample(tmp_path / "p", seed=1)
    assert all(a["text"] != b["text"] for a, b in zip(found, other, strict=True))


def test_without_temperature_equal_prompts_get_equal_answers(bench, tmp_path):
    found = bench.sample(jsonl(tmp_path / "p", [{"text": text} for text in TEXTS]), temperature=0.0)
    assert found[1] == found[3]
    assert all(line["generated_tokens"] == 12 for line in found if line["cut"])


def test_the_answer_ends_where_the_model_does(bench, tmp_path):
    (request,) = bench.requests(jsonl(tmp_path / "p", [{"text": "a few words"}]), max_tokens=10**6)
    assert len(request.prompt.tokens) + request.prompt.limit == bench.shape.max_positions


def test_samples_of_text_are_training_text(bench, tmp_path):
    found = bench.sample(jsonl(tmp_path / "p", [{"body": text} for text in TEXTS]), Data(text_key="body"))
    out = jsonl(tmp_path / "out.jsonl", found)
    assert tokenize_corpus(out, bench.tokenizer, Data(text_key="body"), 16).report.documents == len(TEXTS)


def test_samples_of_conversations_are_training_conversations(bench, tmp_path):
    asked = [[{"role": "user", "content": text}] for text in TEXTS]
    found = bench.sample(jsonl(tmp_path / "p", [{"messages": turns} for turns in asked]))
    assert [line["messages"][:-1] for line in found] == asked
    assert {line["messages"][-1]["role"] for line in found} == {"assistant"}
    prompt = bench.tokenizer.apply_chat_template(asked[0], tokenize=False, add_generation_prompt=True)
    request = bench.requests(tmp_path / "p")[0]
    assert bench.tokenizer.decode(request.prompt.tokens) == prompt  # what serving sends
    out = jsonl(tmp_path / "out.jsonl", found)
    assert tokenize_corpus(out, bench.tokenizer, Data(), 64).loss_mask.sum() > 0


@pytest.mark.parametrize(
    ("record", "data", "says"),
    [
        ({"txt": "x"}, Data(), r"p:2: no key 'text'"),
        ({"text": "x " * 3000}, Data(), r"p:2: the prompt has \d+ tokens, the model takes \d+; shorten it"),
        ({"messages": []}, Data(format=DataFormat.chat), "p:1: 'messages' is not a list of turns"),
    ],
)
def test_bad_prompts_are_one_line(bench, tmp_path, record, data, says):
    with pytest.raises(UserError, match=says):
        bench.requests(jsonl(tmp_path / "p", [{"text": "fine"}, record]), data)


def test_a_conversation_that_is_answered_already_is_refused(bench, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"p:1: ends with the assistant's turn, which is to be generated; take it out"):
        bench.requests(jsonl(tmp_path / "p", [{"messages": turns}]))


# ---- the file


def test_a_stopped_file_goes_on_and_becomes_the_same(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 2)
    path = jsonl(tmp_path / "p", [{"text": text} for text in TEXTS])
    asked = []

    def written(out: str, answer) -> Path:
        requests, blocks = bench.requests(path), Blocks(tmp_path / out, sampling.BLOCK)
        for block in sampling.sample(requests[blocks.open(made_by) :], answer, bench.recipe.data):
            blocks.add(block)
        blocks.finish()
        return blocks.out

    def fails_at_the_third(prompts):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return bench.answer(prompts)

    bench.requests(path)
    made_by = sampling.identity(bench.recipe)
    straight = written("straight", bench.answer)
    with pytest.raises(KeyboardInterrupt):
        written("stopped", fails_at_the_third)
    partial = Blocks(tmp_path / "stopped", 2).partial
    assert not (tmp_path / "stopped").exists()
    assert len(lines(partial)) == 4
    with partial.open("a") as file:  # killed in mid-write: a line and a half of the next block
        file.write('{"text": "lost"}\n{"te')
    assert written("stopped", fails_at_the_third).read_bytes() == straight.read_bytes()
    assert asked == [2, 2, 2, 2]
    assert not partial.exists()
    assert written("stopped", fails_at_the_third).read_bytes() == straight.read_bytes()
    assert asked == [2, 2, 2, 2]  # nothing was left to do
    with pytest.raises(UserError, match=r"stopped: was made with seed = 1234, not 5; keep that value or choose"):
        Blocks(tmp_path / "stopped", 2).open(made_by | {"seed": 5})
    path.write_text(path.read_text() + '{"text": "more"}\n')
    with pytest.raises(UserError, match=r"was made with prompts_sha256 = "):
        Blocks(tmp_path / "stopped", 2).open(sampling.identity(bench.recipe))
    other = shutil.copytree(bench.recipe.model.path, tmp_path / "model")
    assert sampling.identity(replace(bench.recipe, model=Model(path=str(other)))) == sampling.identity(bench.recipe)
    (other / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"was made with model_sha256 = "):
        Blocks(tmp_path / "stopped", 2).open(sampling.identity(replace(bench.recipe, model=Model(path=str(other)))))


def test_a_file_that_it_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"mine\.jsonl: already there, and made by something else; choose another file"):
        Blocks(tmp_path / "mine.jsonl", 2).open({})
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


# ---- the command


def test_what_cannot_be_generated_is_one_line(tmp_path, capsys):
    recipe, path = resolve("tiny", []), jsonl(tmp_path / "p.jsonl", [{"text": "x"}])
    for prompts, out, says in (
        ("nowhere", "o.jsonl", "generate.prompts = nowhere: no such file"),
        (str(path), str(path), "is the file of the prompts"),
        (str(path), "o.jsonl.gz", "drop the .gz"),
    ):
        with pytest.raises(RecipeError, match=says):
            prepare(recipe, prompts, out)
    assert cli.main(["generate", "tiny", str(path), "o", "generate.max_tokens=0", "generate.temperature=-1"]) == USAGE
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == ["generate.max_tokens = 0", "generate.temperature = -1.0"]


def test_two_tensor_parallel_ranks_write_the_same_lines(bench, halfbyte, tiny_model, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"text": text} for text in TEXTS])
    options = ("parallel.tensor=2", "parallel.sequence=true", "train.dtype=float64", "generate.max_tokens=12")
    done = halfbyte("generate", "tiny", path, "out.jsonl", f"model.path={tiny_model}", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"6 prompts, {sum(line['generated_tokens'] for line in lines(tmp_path / 'out.jsonl'))} tokens" in done.stdout
    assert lines(tmp_path / "out.jsonl") == bench.sample(path)
