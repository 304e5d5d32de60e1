"""The report's content: a real run, runs that ended early, damaged files, and texts that try to break out."""

import copy
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from report_tools import parse, section
from safetensors import safe_open

from halfbyte.launch import cli, report, report_curves
from halfbyte.launch.report_blocks import visible
from halfbyte.launch.report_markdown import inline
from halfbyte.launch.report_plots import Figure
from halfbyte.launch.report_run import RunFiles
from halfbyte.training.config import TaskKind
from halfbyte.training.errors import FAILED, OK, USAGE, UserError
from halfbyte.training.resolve import load

pytestmark = pytest.mark.slow  # the run that all of it reads
NASTY = (
    "</dd><script>alert(1)</script>",
    "a | b || c \\| d \\",
    "first\nsecond\r\nthird\rfourth",
    "`tick` ``` fence ```\n```",
    "\x00\x07\x1b[31mred\x7f\x85 \u202eright to left\u2066 \ud800 end",
    "<!-- &amp; &lt; {{ 7 * 7 }} {% raw %} ]]> <svg onload=x> \"'",
    "# head\n- list\n1. one\n| a |\n|---|\n[l](http://example.com) www.example.com me@example.com ![i](x) *e* _e_ ~s~",
    "$\\frac$ $x$ " + "w" * 5000,
)


@pytest.fixture
def run(reported_run, tmp_path) -> Path:
    """A copy of the run without what a report does not read."""
    return shutil.copytree(reported_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "cache"))


@pytest.fixture
def undrawn(monkeypatch):
    """Plots cost most of a report's time; here they are not what is looked at."""
    monkeypatch.setattr(report_curves, "draw", lambda plot: Figure(plot.name, plot.title, plot.description, "", b""))


def write(folder: Path, *overrides: str) -> list:
    recipe = load(folder / "resolved.yaml", [f"run.dir={folder}", *overrides])
    return report.write(recipe, folder)


def page(folder: Path):
    return parse((folder / "report.html").read_text())


def read(path: Path):
    return json.loads(path.read_text())


def rows(folder: Path, stage: str, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluate" / f"{stage}.{task}.jsonl").read_text().splitlines()]


def put(path: Path, content) -> None:
    """Write JSON, or JSON lines for a list of scores; a lone surrogate passes as an escape."""
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))


# A complete run ---------------------------------------------------------------------------------------------------


def test_the_pipeline_ends_with_a_complete_report(reported_run):
    text = (reported_run / "report.md").read_text()
    assert "missing" not in text.lower()
    assert "<script" not in (reported_run / "report.html").read_text()
    assert not (reported_run / "wandb").exists()  # disabled
    pictures = re.findall(r"\]\((report/[^)]+\.png)\)", text)
    assert len(pictures) == len(set(pictures)) == 9  # loss, 4 kinds of linears, 2 of scales, 2 tasks
    for picture in pictures:
        assert (reported_run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_bytes(reported_run, run, monkeypatch):
    """Written by another process, in another folder, and once more."""
    names = ["report.html", "report.md", *(f"report/{path.name}" for path in (reported_run / "report").iterdir())]
    there = {name: (reported_run / name).read_bytes() for name in names}
    monkeypatch.chdir(run.parent)
    for _ in range(2):
        for name in names:
            (run / name).unlink()
        assert write(Path("run")) == []
        assert there == {name: (run / name).read_bytes() for name in names}


def test_the_revision_is_the_one_that_was_found_last(run):
    log = run / "experiment" / "git-info.log"
    log.write_text("".join(f"commit hash: {digit * 40}diff --git a/x b/x\n" for digit in "abc"))
    write(run)
    assert "c" * 40 in section(page(run), "versions-and-hashes").text()
    log.unlink()
    write(run)
    assert "not recorded" in section(page(run), "versions-and-hashes").text()


def test_the_verdict_comes_first(run):
    headings = [node.text() for node in page(run).walk() if node.tag in ("h1", "h2")]
    assert headings[:2] == ["tiny", "Gate pass"]
    assert (run / "report.md").read_text().splitlines()[4] == "## Gate: PASS"


def test_every_score_is_the_one_in_evaluate_json(run):
    """Exact values behind the digits, the digits themselves, and nothing left out."""
    scores = read(run / "evaluate.json")
    scores["qat"]["lambada"]["accuracy"] = 0.2345678
    scores["qat"]["english"]["f1"] = 0.512345
    scores["qad"] = copy.deepcopy(scores["ptq"])
    put(run / "evaluate.json", scores)
    write(run)
    labels = {"accuracy": "accuracy, %", "kl": "KL to BF16, nats", "bits_per_byte": "bits per byte", "f1": "f1, %"}
    labels |= {"agreement": "top-1 agreement, %", "perplexity": "perplexity"}
    table = section(page(run), "scores").all("table")[0]
    stages = [node.text() for node in table.all("thead")[0].all("th")][1:5]
    assert stages == ["BF16", "PTQ", "QAT", "QAD"]
    seen = set()
    for body in table.all("tbody"):
        task = body.all("tr")[0].text().partition(" (")[0]
        for line in body.all("tr")[1:]:
            metric = next(name for name, label in labels.items() if label == line.all("th")[0].text())
            for stage, cell in zip(scores, line.all("td"), strict=False):
                value = scores[stage][task].get(metric)
                if value is None:
                    assert cell.text() == "–"
                    continue
                seen.add((stage, task, metric))
                (data,) = cell.all("data")
                assert float(data.attributes["value"]) == value
                shown, factor = data.text().replace("−", "-"), 100 if "%" in labels[metric] else 1
                digits = len(shown.partition(".")[2].partition("e")[0])
                scale = 10.0 ** (int(shown.partition("e")[2] or 0) - digits)
                assert abs(float(shown) - value * factor) <= 0.5001 * scale
    assert seen == {(s, t, m) for s, ts in scores.items() for t, ms in ts.items() for m in ms if m != "n"}


def test_the_gates_intervals_are_the_ones_in_gate_json(run):
    entry = {"statistic": "perplexity", "unit": "ratio", "candidate": 7.0, "baseline": 6.0, "bound": 1.01}
    ratio = entry | {"delta": 1.1640625, "interval": [0.8125, None]}
    loss = {"unit": "pp", "baseline": 0.25, "delta": -1.25, "interval": [-3.5, 0.75], "bound": -0.2}
    bound = {"unit": "nats", "baseline": None, "delta": 0.3, "interval": [0.2, 0.4], "bound": 0.5}
    share = {"unit": "share", "baseline": None, "delta": 0.875, "interval": [0.75, 1.0], "bound": 0.5}
    english = {
        "measures": {"perplexity": "fail", "kl_bound": "pass"},
        "numbers": {"perplexity": ratio, "kl_bound": bound},
    }
    lambada = {"accuracy": "inconclusive", "agreement_bound": "pass"}
    lambada = {"measures": lambada, "numbers": {"accuracy": loss, "agreement_bound": share}}
    ruling = {"verdict": "fail", "reasons": ["one: fail"], "tasks": {"english": english, "lambada": lambada}}
    ptq = {"english": {"measures": {"kl": "pass"}, "numbers": {"kl": bound | {"baseline": 0.5, "delta": -0.2}}}}
    gate = read(run / "gate.json") | {
        "rule": "better_than_ptq",
        "baseline": "ptq",
        "tasks": ptq,
        "against_bf16": ruling,
    }
    gate |= {"judges": "exported", "confidence": 0.95, "corrected_confidence": 0.99, "intervals": 5}
    put(run / "gate.json", gate)
    write(run)
    table = section(page(run), "scores").all("table")[0]
    assert [node.text() for node in table.all("thead")[0].all("th")][-2:] == ["against BF16", "against PTQ"]
    cells = {
        (body.all("tr")[0].text().partition(" (")[0], row.all("th")[0].text()): [cell.text() for cell in row.all("td")]
        for body in table.all("tbody")
        for row in body.all("tr")[1:]
    }
    assert cells["english", "perplexity"][-2:] == ["1.1641 × [0.8125, ∞] ✕fail", ""]
    assert cells["english", "KL to BF16, nats"][-2:] == [
        "0.3000 [0.2000, 0.4000] ✓pass",
        "−0.2000 [+0.2000, +0.4000] ✓pass",
    ]
    assert cells["lambada", "accuracy, %"][-2:] == ["−1.25 pp [−3.50, +0.75] ?inconclusive", ""]
    assert cells["lambada", "top-1 agreement, %"][-2:] == ["87.50 % [75.00, 100.00] ✓pass", ""]
    assert {"1.1640625", "-1.25", "0.3", "0.875", "-0.2"} <= {data.attributes["value"] for data in table.all("data")}
    text = page(run).text()
    for shown in ("Accuracy against BF16−1.25 pp lambada", "95 % for all 5 together, 99.000 % each", "exported files"):
        assert shown in text
    for reason in (*gate["reasons"], "one: fail"):
        assert reason in text


def test_the_worst_items_are_the_worst(run):
    every = [(-row["kl"], task, row["item"]) for task in ("lambada", "english") for row in rows(run, "qat", task)]
    listed = [node.all("h3")[0].text() for node in section(page(run), "worst-items").all("article")]
    assert listed == [f"{task}, item {item}" for _, task, item in sorted(every)[:20]]
    assert len(listed) == 20


def test_worst_by_loss_of_log_likelihood_where_nothing_has_kl(run):
    for stage in ("bf16", "qat", "ptq"):
        for task in ("lambada", "english"):
            put(run / "evaluate" / f"{stage}.{task}.jsonl", [row | {"kl": None} for row in rows(run, stage, task)])
    write(run)
    lost = []
    for task in ("lambada", "english"):
        before = {row["item"]: row["loglikelihood"] for row in rows(run, "bf16", task)}
        lost += [(row["loglikelihood"] - before[row["item"]], task, row["item"]) for row in rows(run, "qat", task)]
    listed = [node.all("h3")[0].text() for node in section(page(run), "worst-items").all("article")]
    assert listed == [f"{task}, item {item}" for _, task, item in sorted(lost)[:20]]
    assert "log-likelihood against BF16" in section(page(run), "worst-items").text()


def test_an_example_shows_its_prompt_gold_answer_and_both_outputs(run):
    task = load(run / "resolved.yaml").evaluate.tasks[0]
    with gzip.open(task.data, "rt") as file:
        requests = [json.loads(line)["request"] for line in file]
    kept = {stage: {row["item"]: row["output"] for row in rows(run, stage, "lambada")} for stage in ("bf16", "qat")}
    found = 0
    for article in section(page(run), "worst-items").all("article"):
        name, _, item = article.all("h3")[0].text().partition(", item ")
        if name == "lambada":
            found += 1
            terms, texts = [node.text() for node in article.all("dt")], [node.text() for node in article.all("dd")]
            shown = dict(zip(terms, texts, strict=True))
            assert shown["Gold"] == requests[int(item)]["continuation"].strip()
            assert shown["Prompt"].removeprefix("…")[-50:] == requests[int(item)]["context"][-50:]
            for label, stage in (("BF16", "bf16"), ("QAT", "qat")):
                assert shown[label] == (visible(kept[stage][int(item)].strip(" ")) or "(empty)")
    assert found


def test_scale_histograms_agree_with_safetensors(run):
    counts, second, values = report_curves._codes(run / "export" / "hf")
    expected, scale_2 = np.zeros(256, np.int64), []
    with safe_open(run / "export" / "hf" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.endswith("weight_scale"):
                stored = file.get_tensor(name)
                codes = stored.view(torch.uint8).numpy()
                assert (values[codes] == stored.float().numpy()).all()
                expected += np.bincount(codes.reshape(-1), minlength=256)
            elif name.endswith("weight_scale_2"):
                scale_2.append(float(file.get_tensor(name)))
    assert (counts == expected).all()
    assert sorted(second["weights"]) == sorted(scale_2)
    plot = report_curves._block_plot(counts, values, "")
    widths = np.diff(np.array(plot.series[0].x))
    assert math.isclose(float((widths * np.array(plot.series[0].y)).sum()), 100.0)


def test_kl_by_position_is_the_mean_over_items_in_each_bin(run):
    """33 tokens, 8 positions, bins of 3 tokens: the positions are 2, 6, 10, 14, 18, 22, 26, 30 (counted from 0)."""
    made = [
        {"item": i, "tokens": 33, "loglikelihood": -9.0, "kl": 1.0, "kl_at": [i + k / 8 for k in range(8)]}
        for i in range(3)
    ]
    put(run / "evaluate" / "qat.english.jsonl", made)
    recipe = load(run / "resolved.yaml", [f"run.dir={run}"])
    recipe.evaluate.kl_positions = 8
    curve = report_curves._positions(RunFiles(recipe, run), "qat", "english", "after")
    starts = [2, 6, 10, 14, 18, 22, 26, 30]
    width = math.ceil(31 / report_curves.BINS)
    assert curve.x == [start // width * width + (width + 1) / 2 for start in starts]
    assert np.allclose(curve.y, [1 + k / 8 for k in range(8)])
    assert np.allclose(np.array(curve.high) - curve.y, 1.96 / math.sqrt(3))


def test_tasks_of_lm_eval_have_their_kl_along_what_bf16_said(run):
    """Generated answers have no gold tokens; texts of several windows have no single order of positions."""
    said = {"loglikelihood": None, "tokens": None, "kl": 1.0, "metrics": {"exact_match": 0.0}, "cut": True}
    put(run / "evaluate" / "bf16.english.jsonl", [said | {"item": 0, "output_tokens": 4, "output": "four"}])
    after = said | {"item": 0, "output_tokens": 9, "output": "nine", "kl_at": [1.0, 2.0, 3.0, 4.0]}
    put(run / "evaluate" / "qat.english.jsonl", [after])
    recipe = load(run / "resolved.yaml", [f"run.dir={run}"])
    recipe.evaluate.tasks[1].kind = TaskKind.lm_eval
    files = RunFiles(recipe, run)
    curve = report_curves._positions(files, "qat", "english", "after")
    assert (curve.x, curve.y) == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0])
    for stage in ("ptq", "qat"):
        put(run / "evaluate" / f"{stage}.english.jsonl", [after | {"kl_at": [1.0] * 7}])
    assert report_curves._positions(files, "qat", "english", "after") is None
    missing = report.write(recipe, run)
    assert [part.what for part in missing if part.damaged] == []
    text = page(run).text()
    assert "Without KL by position: english." in text
    for shown in ("exact_match BF16 0, QAT 0", "made by lm-eval", "cut at the limit"):
        assert shown in text


def test_weight_errors_before_and_after_training(run):
    train, layers = read(run / "train.json"), read(run / "quantize.json")["layers"]
    train["weight_relative_rms_error"] = dict.fromkeys(layers, 0.25)
    put(run / "train.json", train)
    write(run)
    assert "25.00 % to 25.00 % after" in section(page(run), "quantization").text()
    train["weight_relative_rms_error"] = {"decoder.layers.99.mlp.linear_fc1": 0.25}
    put(run / "train.json", train)
    assert [part.damaged for part in write(run)] == [True]


def test_a_control_stands_beside_the_others_only_if_it_is_named(run, tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    trained = {"lambada": {"n": 16, "accuracy": 0.123456}}
    put(control / "evaluate.json", {"bf16": {}, "bf16_trained": trained})
    put(run / "gate.json", read(run / "gate.json") | {"control": {"run": str(control), "differs": ["x = 1"]}})
    assert write(run) == []
    assert "trained otherwise: x = 1" in page(run).text()
    assert "0.123456" in {node.attributes["value"] for node in page(run).all("data")}
    (control / "evaluate.json").unlink()
    assert [part.what for part in write(run)] == ["Scores of the BF16 control"]


# Parts that are missing or damaged --------------------------------------------------------------------------------

GONE = {
    "gate.json": ["Verdict", "The gate's intervals"],
    "evaluate.json": ["The table of scores", "KL by position", "The worst items"],
    "train.json": ["The loss curve", "Throughput"],
    "quantize.json": ["The weight errors"],
    "verify.json": ["Verification"],
    "export/export.json": ["Sizes"],
    "export/hf/halfbyte.json": ["Versions and hashes"],
    "export/hf": ["The histograms of scales", "Sizes", "Verification", "Versions and hashes"],
    "evaluate/qat.lambada.jsonl": ["KL by position", "The worst items"],
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_missing_is_named_with_its_reason(run, undrawn, name):
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    missing = write(run)
    assert [part.what for part in missing] == GONE[name]
    for text in (page(run).text(), (run / "report.md").read_text().replace("\\", "")):
        for part in missing:
            assert f"{part.what}: missing." in text
            assert part.reason in text
    if name == "gate.json":
        assert "## Gate: NO VERDICT" in (run / "report.md").read_text()


def test_a_gate_that_does_not_pass_is_the_reason_for_no_export(run):
    put(run / "gate.json", read(run / "gate.json") | {"verdict": "inconclusive"})
    shutil.rmtree(run / "export")
    assert {part.reason for part in write(run)} == {
        "no exported checkpoint: the gate says inconclusive (--allow-failed-gate overrides)"
    }


def test_other_methods(run):
    (run / "train.json").unlink()
    scores = read(run / "evaluate.json")
    put(run / "evaluate.json", {stage: scores[stage] for stage in ("bf16", "ptq")})
    missing = write(run, "method=ptq")
    assert {part.reason for part in missing} == {"method ptq trains nothing"}
    assert not any(part.damaged for part in missing)
    put(run / "evaluate.json", {"bf16": scores["bf16"], "bf16_trained": scores["bf16"]})
    for task in ("lambada", "english"):
        put(run / "evaluate" / f"bf16_trained.{task}.jsonl", rows(run, "bf16", task))
    reasons = {part.what: part.reason for part in write(run, "method=bf16")}
    assert reasons["The weight errors"] == "method bf16 quantizes nothing"


def test_an_empty_run_folder_has_a_report(run, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(run / "resolved.yaml", tmp_path / "empty")
    missing = write(tmp_path / "empty")
    assert len(missing) == 11  # the intervals belong to the table of scores
    assert not any(part.damaged for part in missing)
    page(tmp_path / "empty")


FILES = ("gate.json", "evaluate.json", "train.json", "quantize.json", "verify.json", "export/export.json")
FILES += ("export/hf/halfbyte.json", "evaluate/qat.lambada.jsonl", "evaluate/bf16.english.jsonl")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["[]", "{}", "\x00\xff"])
def test_a_damaged_file_is_one_clear_line(run, undrawn, name, content):
    path = run / name
    path.write_bytes(content.encode("latin-1"))
    missing = write(run)
    assert any(part.damaged and path.name in part.reason for part in missing), missing
    assert all("\n" not in part.reason for part in missing)
    page(run)


@pytest.mark.parametrize("name", FILES)
def test_no_value_of_a_wrong_type_breaks_the_report(run, name):
    """Leaves here and there become something else: the report is written, and says so where it cannot use it."""
    path = run / name
    lines = path.suffix == ".jsonl"
    original = [json.loads(line) for line in path.read_text().splitlines()] if lines else read(path)
    leaves = list(_leaves(original[:1] if lines else original))
    for number, place in enumerate(leaves[:: max(1, len(leaves) // 3)]):
        content = copy.deepcopy(original)
        _set(content, place, [None, "<q>|", [], {"a": 1}, -1e400][number % 5])
        put(path, content)
        write(run)
        assert "<q>" not in (run / "report.html").read_text()


def _leaves(value, place=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield place
    else:
        for key, inner in items:
            yield from _leaves(inner, (*place, key))


def _set(value, place, new):
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


def test_a_flipped_file_of_the_export_is_named(run):
    weights = run / "export" / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (part,) = write(run)
    assert part.damaged
    assert "model.safetensors" in part.reason


# Texts that try to break out --------------------------------------------------------------------------------------


def test_nasty_texts_survive_in_both_files(run):
    """Every text comes out as itself, seen by an HTML parser and by markdown-it, a parser of its own."""
    changed = [
        row | {"output": NASTY[i % len(NASTY)], "kl": 99.0 - i} for i, row in enumerate(rows(run, "qat", "lambada"))
    ]
    put(run / "evaluate" / "qat.lambada.jsonl", changed)
    gate = read(run / "gate.json")
    gate["reasons"] = list(NASTY)
    gate["checkpoint"] = NASTY[0]
    put(run / "gate.json", gate)
    assert write(run) == []
    tree = page(run)
    shown = [dict(zip(*([n.text() for n in a.all(t)] for t in ("dt", "dd")), strict=True)) for a in tree.all("article")]
    for nasty, example in zip(NASTY, shown, strict=False):
        assert example["QAT"] == _expected(nasty)
    assert not tree.all("script")
    assert len(tree.all("svg")) == 9
    reasons = next(node for node in tree.all("ul") if node.attributes.get("class") == "reasons")
    assert [node.all("span")[-1].text() for node in reasons.all("li")] == [visible(text) for text in NASTY]

    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render((run / "report.md").read_text())
    tree = parse(rendered)
    assert not tree.all("script")
    assert not [node for node in tree.all("a") if "example.com" in str(node.attributes)]
    table = next(t for t in tree.all("table") if t.all("th")[1].text() == "item")
    head = [node.text() for node in table.all("th")]
    lines = table.all("tbody")[0].all("tr")
    assert {len(line.all("td")) for line in lines} == {len(head)}
    for nasty, line in zip(NASTY, lines, strict=False):
        flat = _expected(nasty).replace("\n", "⏎ ").replace("\t", " ").strip()
        assert line.all("td")[head.index("QAT")].text() == flat


def _expected(text: str) -> str:
    text = text.strip(" ")
    return visible(text if len(text) <= 400 else f"{text[:400]}…")


@pytest.mark.parametrize(
    "text", ["1. one", "2) two", "- a", "+ b", "--- ", "===", "# h", "    code", "-1.5 pp", "0.25"]
)
def test_a_line_means_only_itself_in_markdown(text):
    (line,) = parse(MarkdownIt("commonmark").enable("table").render(inline(text))).children[:1]
    assert (line.tag, line.text()) == ("p", text.strip())


def test_numbers_stay_readable_in_markdown():
    assert inline("0.25 nats") == "0.25 nats"
    assert inline("+1.5") == "+1.5"


def test_visible_hides_nothing_and_changes_nothing_else():
    assert visible("a\x00b\x1b\x7f\u202e\ud800\ue000") == "a␀b␛⟨U+007F⟩⟨U+202E⟩⟨U+D800⟩⟨U+E000⟩"
    plain = "Ünïcödé 漢字 🙂 \n\t|<>&`"
    assert visible(plain) == plain


# The command and W&B ----------------------------------------------------------------------------------------------


def test_the_command(run, tmp_path, capsys):
    assert cli.main(["report", str(run)]) == OK
    assert capsys.readouterr().out == f"{run}/report.html: complete\n"
    (run / "train.json").write_text("{")
    assert cli.main(["report", str(run)]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") and "train.json: damaged" in line for line in lines)
    assert cli.main(["report", str(tmp_path)]) == USAGE


def test_a_folder_that_cannot_be_written_is_one_line(run):
    shutil.rmtree(run / "report")
    (run / "report").write_text("")
    with pytest.raises(UserError, match="the report cannot be written"):
        write(run)


def test_wandb_gets_the_same_in_the_runs_own_run(run, halfbyte):
    old = run / "wandb" / "offline-run-20200101_000000-abcd1234"
    old.mkdir(parents=True)
    (run / "wandb" / "offline-run-20210101_000000-other").mkdir()
    done = halfbyte("report", str(run), "run.wandb=offline")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (new,) = set((run / "wandb").glob("offline-run-*-abcd1234")) - {old}
    pictures = sorted(path.read_bytes() for path in (new / "files" / "media" / "images" / "report").glob("*.png"))
    assert len(pictures) == 9
    (table,) = (new / "files" / "media" / "table" / "report").glob("scores*.json")
    accuracy = next(line for line in read(table)["data"] if line[1] == "accuracy, %")
    assert accuracy[0] == "lambada (16 items)"
    assert b"report/verdict" in (new / "run-abcd1234.wandb").read_bytes()
    folders = sorted((run / "wandb").iterdir())
    assert write(run, "run.wandb=offline") == []
    assert sorted((run / "wandb").iterdir()) == folders  # the same content is not logged twice


def test_wandb_out_of_reach_is_one_line(run, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"run.wandb = online: W&B refused the report \(no route\); use offline"):
        write(run, "run.wandb=online")
    assert (run / "report.html").exists()
    assert not (run / "report" / "wandb.json").exists()
