import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.training import scoring, tasks
from halfbyte.training.config import Task, TaskKind
from halfbyte.training.errors import UserError
from halfbyte.training.tasks import Item, Score


def tokenizer_with(*merges: tuple[str, str], bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with just these merges, so that what joins the boundary is known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<b>", "<e>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<b>" if bos else None, eos_token="<e>")


def load(tmp_path, tokenizer, *records, max_length=100, **task):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tasks.load_items(Task(name="t", data=str(path), **task), tokenizer, max_length)


def pieces(tokenizer, item):
    return [tokenizer.decode([token]) for token in item.tokens]


def items_of(*lengths: int) -> list[Item]:
    return [Item(i, tuple(range(1, n + 1)), 1, n) for i, n in enumerate(lengths)]


# Items


def test_spaces_that_end_the_context_go_to_the_continuation(tmp_path):
    tokenizer = tokenizer_with(("Ġ", "b"))
    (item,) = load(tmp_path, tokenizer, {"context": "a ", "continuation": "b"})
    assert pieces(tokenizer, item) == ["a", " b"]
    assert (item.first_target, item.bytes) == (1, 2)
    (same,) = load(tmp_path, tokenizer, {"context": "a", "continuation": " b"})
    assert same == item


def test_the_continuation_is_what_the_whole_has_beyond_the_context(tmp_path):
    tokenizer = tokenizer_with(("b", "c"))  # "ab" + "cd": the whole is a|bc|d, the context a|b
    (item,) = load(tmp_path, tokenizer, {"context": "ab", "continuation": "cd"})
    assert pieces(tokenizer, item) == ["a", "bc", "d"]
    assert item.first_target == 2
    with pytest.raises(UserError, match=r"items\.jsonl:1: 'continuation' adds no token"):
        load(tmp_path, tokenizer, {"context": "ab", "continuation": "c"})


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_becomes_the_first_special_token(tmp_path, context):
    for bos, token in ((True, "<b>"), (False, "<e>")):
        tokenizer = tokenizer_with(bos=bos)
        (item,) = load(tmp_path, tokenizer, {"context": context, "continuation": "hé"})
        assert pieces(tokenizer, item)[0] == token
        assert item.first_target == 1
        assert item.bytes == len(context) + 3


def test_dotted_keys_first_and_limit(tmp_path):
    tokenizer = tokenizer_with()
    records = [{"request": {"context": "c", "continuation": str(i)}} for i in range(6)]
    keys = {"context_key": "request.context", "continuation_key": "request.continuation"}
    found = load(tmp_path, tokenizer, *records, first=2, limit=3, **keys)
    assert [(item.index, pieces(tokenizer, item)[1]) for item in found] == [(2, "2"), (3, "3"), (4, "4")]
    assert len(load(tmp_path, tokenizer, *records, first=2, **keys)) == 4
    for empty in ({"first": 6}, {"limit": 0}):
        with pytest.raises(UserError, match="task t: no items"):
            load(tmp_path, tokenizer, *records, **empty, **keys)
    with pytest.raises(UserError, match=r"items\.jsonl:1: no key 'context' \(no 'context' among: request\)"):
        load(tmp_path, tokenizer, *records)


def test_an_item_that_is_too_long_is_named(tmp_path):
    records = [{"context": "c" * 5, "continuation": "d"}, {"context": "c" * 9, "continuation": "d"}]
    with pytest.raises(UserError, match=r"items\.jsonl:2: the item has 10 tokens, the model takes 9"):
        load(tmp_path, tokenizer_with(), *records, max_length=9)
    assert len(load(tmp_path, tokenizer_with(), *records, max_length=10)) == 2


def test_a_text_is_cut_in_tokens_and_its_bytes_are_those_scored(tmp_path):
    tokenizer = tokenizer_with(("a", "b"))
    text = {"kind": TaskKind.text}
    (whole,) = load(tmp_path, tokenizer, {"text": "abé x"}, **text)
    assert pieces(tokenizer, whole)[:2] == ["<b>", "ab"]
    assert (len(whole.tokens), whole.first_target, whole.bytes) == (6, 1, 6)
    (cut,) = load(tmp_path, tokenizer, {"text": "abé x"}, max_tokens=3, **text)
    assert (len(cut.tokens), cut.bytes) == (4, 4)
    (short,) = load(tmp_path, tokenizer, {"text": "abé x"}, max_tokens=3, max_length=2, **text)
    assert (len(short.tokens), short.bytes) == (2, 2)
    with pytest.raises(UserError, match=r"items\.jsonl:1: 'text' is empty"):
        load(tmp_path, tokenizer, {"text": ""}, **text)


# Batches


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(1, 100))
def test_batches_hold_every_item_once_within_the_limit(lengths, limit):
    items = items_of(*lengths)
    batches = tasks.bucketed(items, limit)
    assert sorted(item.index for batch in batches for item in batch) == list(range(len(items)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(item.tokens) for item in batch) <= limit
    assert batches == tasks.bucketed(items[::-1], limit)


def test_padding_fills_the_right_end():
    padded = tasks.pad(items_of(2, 5), pad_id=9, multiple=4)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [[1, 2, 9, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]


# Scores


@given(st.integers(1, 300), st.integers(0, 40), st.integers(1, 5))
def test_kl_positions_are_spread_evenly(scored, positions, first):
    item = Item(0, tuple(range(first + scored)), first, 1)
    rows = tasks.kl_rows(item, positions)
    assert len(rows) == min(scored, positions)
    assert all(0 <= row < scored for row in rows)
    gaps = [b - a for a, b in itertools.pairwise(rows)]
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
    if positions >= scored:
        assert rows == list(range(scored))


def test_scores_agree_with_sums_in_python_floats():
    torch.manual_seed(0)
    batch = [Item(7, (1, 2, 3, 4), 2, 5), Item(3, (4, 0), 1, 2)]
    logits = torch.randn(2, 5, 6, dtype=torch.float64)
    scores = tasks.score_batch(logits, batch, reference=None, kl_positions=0)
    for row, (item, score) in enumerate(zip(batch, scores, strict=True)):
        total = 0.0
        greedy = []
        for position in range(item.first_target, len(item.tokens)):
            before = logits[row, position - 1].tolist()
            total += before[item.tokens[position]] - math.log(math.fsum(map(math.exp, before)))
            greedy.append(before.index(max(before)) == item.tokens[position])
        assert score.loglikelihood == pytest.approx(total, abs=1e-5)
        assert score.correct == all(greedy)
        assert (score.item, score.tokens, score.bytes) == (item.index, len(greedy), item.bytes)
        assert score.content == item.content
        assert score.kl is score.agreement is None


def test_items_of_equal_size_are_told_apart():
    item = Item(0, (1, 23, 4), 1, 5)
    others = [Item(0, (1, 24, 4), 1, 5), Item(0, (1, 23, 4), 2, 5), Item(0, (12, 3, 4), 1, 5)]
    assert item.content == Item(9, (1, 23, 4), 1, 6).content
    assert len({item.content, *(other.content for other in others)}) == 4


def test_correct_needs_every_token():
    item = Item(0, (0, 1, 2), 1, 1)
    for picks, correct in (((1, 2), True), ((1, 0), False), ((0, 2), False)):
        logits = torch.zeros(1, 3, 4)
        for position, token in enumerate(picks):
            logits[0, position, token] = 1.0
        assert tasks.score_batch(logits, [item], reference=None, kl_positions=0)[0].correct is correct


def test_kl_and_agreement_against_an_independent_formula():
    torch.manual_seed(1)
    item = Item(4, tuple(range(12)), 3, 1)
    ours, theirs = torch.randn(1, 12, 50) * 3, torch.randn(1, 12, 50) * 3
    theirs[0, 5:] = ours[0, 5:] + 0.01 * theirs[0, 5:]  # some positions agree
    reference = tasks.reference_rows(theirs, [item], 4)
    (score,) = tasks.score_batch(ours, [item], reference=reference, kl_positions=4)
    picked = [position + 2 for position in tasks.kl_rows(item, 4)]
    p, q = theirs[0, picked].double().log_softmax(-1), ours[0, picked].double().log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    ).mean()
    assert score.kl == pytest.approx(float(expected), rel=1e-3)
    assert score.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < score.agreement < 1


def test_a_model_agrees_with_itself():
    torch.manual_seed(2)
    logits = torch.randn(1, 40, 3000) * 4
    logits[0, :, 11] = logits[0, :, 10] = logits.amax() + 1  # a near tie, which FP16 log-probabilities would merge
    logits[0, :, 11] += 1e-4
    item = Item(0, tuple(range(40)), 1, 1)
    reference = tasks.reference_rows(logits, [item], 16)
    assert reference[0].dtype == torch.float16
    assert reference[0].shape == (16, 3000)
    (score,) = tasks.score_batch(logits, [item], reference=reference, kl_positions=16)
    assert score.agreement == 1.0
    assert 0 <= score.kl < 1e-5


def test_a_reference_of_another_evaluation_is_refused():
    item = Item(4, tuple(range(9)), 1, 1)
    logits = torch.randn(1, 9, 20)
    reference = tasks.reference_rows(logits, [item], 4)
    with pytest.raises(UserError, match="item 4: its BF16 reference is of shape"):
        tasks.score_batch(logits, [item], reference=reference, kl_positions=5)
    with pytest.raises(UserError, match="item 4: its BF16 reference is missing"):
        tasks.score_batch(logits, [item], reference={}, kl_positions=4)


def test_scores_equal_the_loss_of_transformers_whatever_the_batch():
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()
    items = [Item(i, tuple(torch.randint(0, 64, (n,)).tolist()), 1, n) for i, n in enumerate((9, 4, 17, 12))]
    with torch.no_grad():
        together = tasks.score_batch(model(tasks.pad(items, 5, 8)).logits, items, reference=None, kl_positions=0)
        for item, score in zip(items, together, strict=True):
            tokens = torch.tensor([item.tokens])
            loss = model(tokens, labels=tokens).loss
            assert -score.loglikelihood / score.tokens == pytest.approx(float(loss), rel=1e-5)


# Summaries


def rows(*values: tuple[float, int, int, bool], kl=None) -> list[Score]:
    return [Score(i, *value, f"item {i}", kl=kl, agreement=kl) for i, value in enumerate(values)]


def test_a_continuation_task_sums_up():
    task = Task(name="t", data="")
    summary = tasks.summarize(task, rows((-2.0, 2, 3, True), (-4.0, 1, 5, False), kl=0.5))
    assert summary == {
        "n": 2,
        "accuracy": 0.5,
        "perplexity": pytest.approx(math.exp(3)),
        "bits_per_byte": pytest.approx(6 / math.log(2) / 8),
        "kl": 0.5,
        "agreement": 0.5,
    }


def test_a_text_task_counts_per_token():
    summary = tasks.summarize(Task(name="t", data="", kind=TaskKind.text), rows((-2.0, 4, 3, True), (-4.0, 2, 5, True)))
    assert summary == {"n": 2, "perplexity": pytest.approx(math.e), "bits_per_byte": pytest.approx(6 / math.log(2) / 8)}


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    item = Item(0, tuple(range(8)), 1, 7)
    scores = tasks.score_batch(torch.zeros(1, 8, 64), [item], reference=None, kl_positions=0)
    summary = tasks.summarize(Task(name="t", data="", kind=TaskKind.text), scores)
    assert summary["perplexity"] == pytest.approx(64)
    assert summary["bits_per_byte"] == pytest.approx(6)


def test_nothing_and_nonsense_are_refused():
    task = Task(name="t", data="")
    with pytest.raises(UserError, match="task t: no scores"):
        tasks.summarize(task, [])
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="task t: item 1 has loglikelihood"):
            tasks.summarize(task, rows((-1.0, 1, 1, True), (value, 1, 1, True)))
    with pytest.raises(UserError, match=r"item 0 has loglikelihood -1\.0 and kl nan"):
        tasks.summarize(task, rows((-1.0, 1, 1, True), kl=math.nan))
    with pytest.raises(UserError, match="only 1 of 2 items"):
        tasks.summarize(task, [*rows((-1.0, 1, 1, True), kl=0.1), *rows((-1.0, 1, 1, True))])
    assert math.isfinite(tasks.summarize(task, rows((-5000.0, 900, 900, False)))["perplexity"])


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 0), min_size=1, max_size=5))
def test_scores_come_back_to_the_last_digit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("s") / "evaluate" / "bf16.t.jsonl"
    scores = rows(*[(value, 1, 2, True) for value in values], kl=0.1)
    tasks.write_scores(path, scores)
    assert [Score(**row) for row in tasks.read_scores(path)] == scores
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_missing_scores_are_named(tmp_path):
    with pytest.raises(UserError, match=r"ptq\.t\.jsonl: not there"):
        tasks.read_scores(tmp_path / "ptq.t.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tasks.write_scores(tmp_path / "file" / "x.jsonl", [])


def test_scores_do_not_depend_on_how_many_rows_are_computed_at_once(monkeypatch):
    torch.manual_seed(5)
    sizes = [(9, 1), (4, 3), (7, 2), (9, 8), (3, 1)]
    batch = [Item(i, tuple(range(n)), first, n) for i, (n, first) in enumerate(sizes)]
    logits, other = torch.randn(5, 9, 30), torch.randn(5, 9, 30)
    found = []
    for rows in (1, 6, 7, 1024):
        monkeypatch.setattr(scoring, "ROWS", rows)
        reference = tasks.reference_rows(other, batch, 4)
        found.append(tasks.score_batch(logits, batch, reference=reference, kl_positions=4, decode=str))
    assert all(scores == found[0] for scores in found)
    assert [score.item for score in found[0]] == [0, 1, 2, 3, 4]


def test_items_that_are_not_compared_have_no_kl():
    torch.manual_seed(6)
    batch = [Item(0, (1, 2, 3), 1, 1, compared=False), Item(1, (4, 5, 6), 1, 1), Item(2, (7, 8), 1, 1, compared=False)]
    logits, other = torch.randn(3, 3, 30), torch.randn(3, 3, 30)
    reference = tasks.reference_rows(other, batch, 4)
    assert list(reference) == [1]
    scores = tasks.score_batch(logits, batch, reference=reference, kl_positions=4)
    assert [score.kl is None for score in scores] == [True, False, True]
    (alone,) = tasks.score_batch(logits[1:2], batch[1:2], reference=reference, kl_positions=4)
    assert scores[1] == alone


def slots(group: list[list[Item]], stages: int) -> int:
    """Padded tokens that each stage of the pipeline waits for while a group goes through."""
    rows, length = max(map(len, group)), max(len(item.tokens) for batch in group for item in batch)
    return (len(group) + stages - 1) * rows * length


@given(st.lists(st.integers(2, 40), min_size=1, max_size=24), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_groups_for_the_pipeline_take_the_least_time_of_all_ways_to_cut_the_list(lengths, stages):
    from halfbyte.training.passes import GROUP, grouped

    items = [Item(i, tuple(range(n)), 1, n) for i, n in enumerate(lengths)]
    batches = tasks.bucketed(items, 40)[:9]
    groups = grouped(batches, stages)
    assert [batch for group in groups for batch in group] == batches
    ways = itertools.product((False, True), repeat=len(batches) - 1)  # a cut before each batch but the first
    edges = ([0, *(i + 1 for i, cut in enumerate(way) if cut), len(batches)] for way in ways)
    least = min(sum(slots(batches[a:b], stages) for a, b in itertools.pairwise(edge)) for edge in edges)
    assert sum(slots(group, stages) for group in groups) == least
    if stages == 1:
        assert all(len(group) == 1 for group in groups)
    assert max(map(len, grouped(batches * 8, 4))) <= GROUP
