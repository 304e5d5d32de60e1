import gzip
import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.training import config, corpus, data
from halfbyte.training.config import DataFormat, TooLong
from halfbyte.training.corpus import PackedDataset
from halfbyte.training.errors import UserError
from halfbyte.training.jsonl import field, read_jsonl, text_field
from halfbyte.training.packing import PackingReport

SHIPPED = Path(__file__).parent.parent / "recipes" / "data"
PAD, BEGIN, END = 256, 257, 258
CHATML = (
    "{% for m in messages %}<b>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<b>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, so that every expectation can be written down; ids 256 pad, 257 <b>, 258 <e> (EOS)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<p>", "<b>", "<e>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<p>", bos_token="<b>", eos_token="<e>", chat_template=template
    )


TOKENIZER = byte_tokenizer()


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def turns(*contents: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


@pytest.fixture
def random_dataset() -> data.PackedDataset:
    tokens = np.arange(37 * 5, dtype=np.int32).reshape(37, 5)
    mask, segments = np.ones((37, 4), np.uint8), np.zeros((37, 4), np.int32)
    return data.PackedDataset(tokens, mask, segments, False, corpus.PackingReport(), Path("x"))


# JSON Lines


def test_lines_are_counted_and_blank_ones_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_jsonl(packed)) == list(read_jsonl(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"a": \n', r"bad\.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', r"bad\.jsonl:2: a JSON list, not an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"bad\.jsonl:2: not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, r"bad\.jsonl:1: not JSON that can be read \(maximum recursion depth"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"bad\.jsonl:1: not JSON that can be read \(.*4300 digits"),
        (b"\n\n", r"bad\.jsonl: holds no records"),
        (b"", r"bad\.jsonl: holds no records"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        list(read_jsonl(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("shape", "changed"), [((5, 3), (4, 2)), ((10_000, 3), (9_999, 0))])
def test_a_digest_tells_another_text(shape, changed):
    def packed(tokens):
        return PackedDataset(tokens, tokens[:, 1:], tokens[:, 1:], False, PackingReport(), Path("x.jsonl"))

    tokens = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    other = tokens.copy()
    other[changed] += 1
    assert packed(tokens).digest == packed(tokens.copy()).digest
    assert len({packed(some).digest for some in (tokens, other, tokens[:-1], tokens.reshape(-1, 1))}) == 4


@pytest.mark.parametrize("damage", ["cut", "plain", "flipped"])
def test_a_damaged_gzip_file_is_one_line(tmp_path, damage):
    whole = gzip.compress(b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(500)))
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0x55]) + whole[middle + 1 :]
    content = {"cut": whole[:middle], "plain": b'{"text": "a"}\n', "flipped": flipped}[damage]
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.jsonl\.gz"):
        list(read_jsonl(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_dotted_keys_reach_inside_and_name_what_is_there():
    record = {"a": {"b": "x"}, "c.d": "y", "n": 3, "half": "\ud800"}
    assert text_field(record, "a.b", "f:1") == "x"
    assert field(record, "c.d", "f:1") == "y"
    with pytest.raises(UserError, match=r"f:1: no key 'a\.z' \(no 'z' among: b\)"):
        field(record, "a.z", "f:1")
    with pytest.raises(UserError, match="among: a int"):
        field(record, "n.z", "f:1")
    with pytest.raises(UserError, match="'n' is a int, not a string"):
        text_field(record, "n", "f:1")
    with pytest.raises(UserError, match="half a surrogate pair"):
        text_field(record, "half", "f:1")


# Text


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1), length=st.integers(1, 9))
def test_text_windows_are_the_stream_cut_up(tmp_path_factory, texts, length):
    path = write(tmp_path_factory.mktemp("text") / "t.jsonl", [{"text": t} for t in texts])
    kept, lines = [ids(t) for t in texts if t], [line for line, t in enumerate(texts, 1) if t]
    stream = [token for document in kept for token in [*document, END]]
    owner = [i for i, document in enumerate(kept) for _ in range(len(document) + 1)]
    count = max(0, (len(stream) - 1) // length)
    if not count:
        with pytest.raises(UserError, match="less than one window"):
            data.tokenize_corpus(path, TOKENIZER, config.Data(), length)
        return
    packed = data.tokenize_corpus(path, TOKENIZER, config.Data(isolate_documents=True), length)
    assert len(packed) == count
    for i in range(count):
        cut = slice(i * length, i * length + length + 1)
        assert packed.tokens[i].tolist() == stream[cut]
        owners = owner[cut]
        assert packed.segments[i].tolist() == [o - owners[0] for o in owners[:-1]]
        assert packed.loss_mask[i].tolist() == [int(a == b) for a, b in itertools.pairwise(owners)]
        assert packed.lines(i) == [lines[o] for o in sorted(set(owners))]
        assert packed.filled(i) == len(packed.segments[i])
    assert packed.report.tokens == len(stream)
    assert packed.report.dropped == sum(not t for t in texts)


def test_all_labels_count_when_documents_are_not_isolated(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "ab"}, {"text": "cd"}])
    packed = data.tokenize_corpus(path, TOKENIZER, config.Data(), 5)
    assert packed.loss_mask.tolist() == [[1] * 5]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1]]


def test_a_token_outside_the_vocabulary_is_found_at_its_line(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "ab"}, {"text": "a<e>b"}])
    packed = data.tokenize_corpus(path, TOKENIZER, config.Data(), 2)
    packed.check_vocabulary(259)
    with pytest.raises(UserError, match="token id 258 is outside the model's vocabulary of 258"):
        packed.check_vocabulary(258)


def test_a_text_key_that_is_not_there_names_line_and_keys(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "abc"}, {"body": "abc"}])
    with pytest.raises(UserError, match=r"t\.jsonl:2: no key 'text' \(no 'text' among: body\)"):
        data.tokenize_corpus(path, TOKENIZER, config.Data(), 2)


# Chat


def chat_data(**changes) -> config.Data:
    return config.Data(**({"format": DataFormat.chat} | changes))


def test_only_answers_and_their_end_carry_loss(tmp_path):
    path = write(tmp_path / "c.jsonl", [turns("hi", "yo", "and", "so")])
    packed = data.tokenize_corpus(path, TOKENIZER, config.Data(), 80)  # format auto
    expected = []
    for text, learned in [
        ("<b>user\nhi<e>\n<b>assistant\n", 0),
        ("yo<e>\n", 1),
        ("<b>user\nand<e>\n<b>assistant\n", 0),
    ]:
        expected += [(token, learned) for token in ids(text)]
    expected += [(token, 1) for token in ids("so<e>\n")]
    filled = [*expected, *[(PAD, 0)] * (81 - len(expected))]
    assert packed.tokens[0].tolist() == [token for token, _ in filled]
    assert packed.loss_mask[0].tolist() == [learned for _, learned in filled[1:]]


def test_without_answer_only_everything_but_the_first_token_carries_loss(tmp_path):
    path = write(tmp_path / "c.jsonl", [turns("hi", "yo"), turns("hey", "you")])
    packed = data.tokenize_corpus(path, TOKENIZER, chat_data(answer_only=False), 120)
    lengths = [len(ids(f"<b>user\n{a}<e>\n<b>assistant\n{b}<e>\n")) for a, b in (("hi", "yo"), ("hey", "you"))]
    expected = [0, *[1] * (lengths[0] - 1), 0, *[1] * (lengths[1] - 1)]
    assert packed.loss_mask[0].tolist() == (expected + [0] * 121)[1:121]
    assert packed.segments[0].tolist() == ([0] * lengths[0] + [1] * lengths[1] + [2] * 121)[:120]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=90))
def test_conversations_are_packed_whole_and_once(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("chat") / "c.jsonl"
    write(path, [turns(f"{i}", "x" * size) for i, size in enumerate(sizes)])
    packed = data.tokenize_corpus(path, TOKENIZER, chat_data(), 99)
    found = []
    for window, (tokens, mask, segments) in enumerate(
        zip(packed.tokens, packed.loss_mask, packed.segments, strict=True)
    ):
        before = len(found)
        owner = [*segments, segments[-1]] if tokens[-1] != PAD else [*segments, -1]
        for segment in sorted(set(segments)):
            here = [i for i, s in enumerate(owner) if s == segment]
            text = TOKENIZER.decode(tokens[here])
            if set(tokens[here]) == {PAD}:
                assert not any(mask[i - 1] for i in here if i)
                continue
            match = re.fullmatch(r"<b>user\n(\d+)<e>\n<b>assistant\n(x*)<e>\n", text)
            assert match
            found.append((int(match[1]), len(match[2])))
            assert sum(mask[i - 1] for i in here if i) == len(match[2]) + 2  # and <e>, newline
        assert packed.lines(window) == [number + 1 for number, _ in found[before:]]
        assert packed.filled(window) == (tokens[:-1] != PAD).sum()
    assert sorted(found) == list(enumerate(sizes))
    # Best fit: no two windows could have been one, unless more stood open than are kept.
    filled = sorted(int((tokens != PAD).sum()) for tokens in packed.tokens)
    assert len(packed) > 32 or len(filled) < 2 or filled[0] + filled[1] > 100


def test_the_fullest_window_with_room_is_taken(tmp_path):
    frame = len(ids("<b>user\nu<e>\n<b>assistant\n<e>\n"))
    # Of 99: the first two open a window each; the third has room in both and belongs with the first.
    path = write(tmp_path / "c.jsonl", [turns("u", "x" * (size - frame)) for size in (60, 50, 38)])
    packed = data.tokenize_corpus(path, TOKENIZER, chat_data(), 98)
    assert sorted(int((row != PAD).sum()) for row in packed.tokens) == [50, 98]


def test_a_long_conversation_stops_is_cut_or_is_left_out(tmp_path):
    path = write(tmp_path / "c.jsonl", [turns("hi", "yo"), turns("hi", "y" * 100)])
    size = len(ids("<b>user\nhi<e>\n<b>assistant\n" + "y" * 100 + "<e>\n"))
    with pytest.raises(UserError, match=rf"c\.jsonl:2: the conversation has {size} tokens, a window 41 .*too_long"):
        data.tokenize_corpus(path, TOKENIZER, chat_data(), 40)
    cut = data.tokenize_corpus(path, TOKENIZER, chat_data(too_long=TooLong.truncate), 40)
    assert (len(cut), cut.report.truncated, cut.report.dropped) == (2, 1, 0)
    skipped = data.tokenize_corpus(path, TOKENIZER, chat_data(too_long=TooLong.skip), 40)
    assert (len(skipped), skipped.report.truncated, skipped.report.dropped) == (1, 0, 1)


def test_a_conversation_cut_before_its_answer_is_left_out(tmp_path):
    path = write(tmp_path / "c.jsonl", [turns("hi", "yo"), turns("u" * 100, "yo")])
    packed = data.tokenize_corpus(path, TOKENIZER, chat_data(too_long=TooLong.truncate), 40)
    assert (len(packed), packed.report.dropped) == (1, 1)
    assert packed.loss_mask.any(axis=1).all()


FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('turns must alternate') }}"


@pytest.mark.parametrize(
    ("template", "record", "said"),
    [
        (FORGETFUL, turns("a", "b", "c", "d"), r"c\.jsonl:1: the chat template changes earlier text at turn 2"),
        (REFUSING, turns("a", "b"), r"c\.jsonl:1: the chat template rejects the conversation \(turns must alternate\)"),
        (None, turns("a", "b"), "no chat template"),
        (CHATML, turns("a"), r"c\.jsonl:1: no assistant turn"),
        (CHATML, {"messages": [{"role": "assistant", "content": "a"}]}, "starts with an assistant turn"),
        (CHATML, {"messages": []}, "'messages' is empty; take the line out"),
        (CHATML, {"chat": [1]}, r"'messages' is not a list of turns \(keys: chat\)"),
        (CHATML, {"messages": ["a"]}, "turn 1 is a str"),
        (CHATML, {"messages": [{"role": "user", "content": None}]}, "turn 1: 'content' is a NoneType"),
    ],
)
def test_unusable_chat_is_named(tmp_path, template, record, said):
    path = write(tmp_path / "c.jsonl", [record])
    with pytest.raises(UserError, match=said):
        data.tokenize_corpus(path, byte_tokenizer(template), chat_data(), 40)


# Cache


def test_the_cache_holds_the_same_arrays_and_is_found_again(tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", [{"text": "word " * i} for i in range(1, 40)])
    direct = data.tokenize_corpus(path, TOKENIZER, config.Data(), 16)
    first = data.prepare(path, TOKENIZER, config.Data(), 16, tmp_path / "cache")
    monkeypatch.setattr(corpus, "_write_entry", lambda *_: pytest.fail("tokenized twice"))
    again = data.prepare(path, TOKENIZER, config.Data(), 16, tmp_path / "cache")
    for packed in (first, again):
        for name in (*corpus.ARRAYS, "documents"):
            stored = getattr(packed, name)
            assert isinstance(stored, np.memmap)
            assert stored.dtype == getattr(direct, name).dtype
            np.testing.assert_array_equal(stored, getattr(direct, name))
        assert packed.report == direct.report
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_notices_text_settings_and_tokenizer(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "word " * 40, "other": "more " * 40}])
    cache = tmp_path / "cache"
    data.prepare(path, TOKENIZER, config.Data(), 16, cache)
    data.prepare(path, TOKENIZER, config.Data(), 8, cache)
    data.prepare(path, TOKENIZER, config.Data(text_key="other"), 16, cache)
    data.prepare(path, TOKENIZER, config.Data(isolate_documents=True), 16, cache)
    data.prepare(path, byte_tokenizer("{{ 1 }}"), config.Data(), 16, cache)
    write(path, [{"text": "abcd " * 40, "other": "more " * 40}])
    changed = data.prepare(path, TOKENIZER, config.Data(), 16, cache)
    assert TOKENIZER.decode(changed.tokens[0]).startswith("abcd")
    assert len(list(cache.iterdir())) == 6


def test_a_failure_leaves_no_entry(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "word " * 400}) + "\n{\n")
    with pytest.raises(UserError, match=r"t\.jsonl:2"):
        data.prepare(path, TOKENIZER, config.Data(), 16, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "word " * 40}])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="token cache cannot be written"):
        data.prepare(path, TOKENIZER, config.Data(), 16, tmp_path / "file")
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        data.prepare(tmp_path / "none.jsonl", TOKENIZER, config.Data(), 16, tmp_path / "cache")


def test_two_writers_leave_one_complete_entry(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "word " * 40}])
    entry = tmp_path / "cache" / "entry"
    for _ in range(2):
        corpus._write_entry(entry, corpus.Packer(path, TOKENIZER, config.Data(), 16))
    assert sorted(p.name for p in entry.parent.iterdir()) == ["entry"]


# Order


def test_every_epoch_is_its_own_permutation():
    epochs = [[data.window_index(e * 50 + i, windows=50, seed=3) for i in range(50)] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != [data.window_index(i, windows=50, seed=4) for i in range(50)]


def test_the_order_does_not_depend_on_library_versions():
    # From an independent SplitMix64 in Python integers.
    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    for seed, epoch in ((0, 0), (1234, 2), (-1, 1)):
        key = mix(mix(seed % 2**64) + epoch)
        expected = sorted(range(11), key=lambda i: mix((key + i) % 2**64))
        assert [data.window_index(epoch * 11 + i, windows=11, seed=seed) for i in range(11)] == expected
    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0


def test_positions_are_spread_evenly_over_seeds():
    firsts = np.bincount([data.window_index(0, windows=8, seed=s) for s in range(4000)], minlength=8)
    assert (abs(firsts - 500) < 5 * np.sqrt(500)).all()


@settings(max_examples=60, deadline=None)
@given(
    step=st.integers(0, 40),
    data_size=st.sampled_from([1, 2, 3, 4]),
    micro_batch=st.sampled_from([1, 2, 3]),
    factor=st.integers(1, 3),
    seed=st.integers(0, 2**63),
)
def test_the_layout_decides_only_who_computes(step, data_size, micro_batch, factor, seed):
    tokens = np.arange(37 * 5, dtype=np.int32).reshape(37, 5)
    ones = np.ones((37, 4), np.uint8)
    dataset = data.PackedDataset(tokens, ones, ones.astype(np.int32), False, corpus.PackingReport(), Path("x"))
    size = data_size * micro_batch * factor
    parts = [
        data.rank_micro_batches(
            dataset, step, global_batch=size, micro_batch=micro_batch, data_rank=r, data_size=data_size, seed=seed
        )
        for r in range(data_size)
    ]
    assert all(len(part) == factor and all(len(b.tokens) == micro_batch for b in part) for part in parts)
    rows = torch.cat([batch.tokens for part in parts for batch in part])
    assert (rows[:, 0] // 5).tolist() == data.step_windows(dataset, step, global_batch=size, seed=seed)


def test_a_micro_batch_shifts_labels_and_keeps_types(random_dataset):
    (batch,) = data.rank_micro_batches(
        random_dataset, 0, global_batch=2, micro_batch=2, data_rank=0, data_size=1, seed=1
    )
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert batch.segments is None
    assert torch.equal(batch.labels, batch.tokens + 1)
    with pytest.raises(ValueError, match="no multiple"):
        data.rank_micro_batches(random_dataset, 0, global_batch=3, micro_batch=2, data_rank=0, data_size=1, seed=1)


def test_a_resumed_stream_is_the_rest_of_the_first(random_dataset):
    layout = {"global_batch": 4, "micro_batch": 2, "data_rank": 0, "data_size": 1, "seed": 9}
    whole = list(data.StepStream(random_dataset, 0, 30, **layout))
    rest = list(data.StepStream(random_dataset, 21, 30, **layout))
    assert len(whole) == 30
    assert len(data.StepStream(random_dataset, 21, 30, **layout)) == len(rest) == 9
    for a, b in zip(whole[21:], rest, strict=True):
        assert [m.tokens.tolist() for m in a] == [m.tokens.tolist() for m in b]


def test_calibration_windows_are_distinct_and_repeatable(random_dataset):
    def chosen(samples, seed):
        return data.calibration_windows(random_dataset, samples, seed).tokens

    windows = chosen(10, 5)
    assert windows.shape == (10, 4)
    assert windows.dtype == torch.int64
    assert len({row[0] for row in windows.tolist()}) == 10
    assert torch.equal(windows, chosen(10, 5))
    assert not torch.equal(windows, chosen(10, 6))
    assert len(chosen(100, 5)) == 37
    with pytest.raises(UserError, match="calibration_samples = 0"):
        chosen(0, 5)


@pytest.mark.parametrize("isolated", [False, True])
def test_calibration_sees_no_padding(tmp_path, isolated):
    path = write(tmp_path / "chat.jsonl", [turns("hello", "you"), turns("and a longer one", "yes"), turns("a", "b")])
    packed = data.tokenize_corpus(path, TOKENIZER, chat_data(isolate_documents=isolated), 70)
    windows = data.calibration_windows(packed, 9, seed=0)
    assert (packed.tokens == PAD).any(1).all()
    assert not windows.loss_mask.any()
    for window, tokens in zip(windows.tokens.tolist(), packed.tokens.tolist(), strict=True):
        own = tokens[: tokens.index(PAD)]
        assert window == (own * 70)[:70]
    if not isolated:
        assert windows.segments is None
        return
    assert windows.segments is not None
    for window, segments in zip(windows.segments.tolist(), packed.segments.tolist(), strict=True):
        own = segments[: segments.index(segments[-1])]
        assert window == [turn * (own[-1] + 1) + segment for turn in range(70) for segment in own][:70]


def test_calibration_attends_as_training_does(tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": word} for word in ("one two", "three", "four five six", "seven")])
    packed = data.tokenize_corpus(path, TOKENIZER, config.Data(isolate_documents=True), 8)
    assert len(packed) > 2
    parts = data.calibration_batches(data.calibration_windows(packed, len(packed), 0), 2, torch.device("cpu"))
    rows = data.window_batch(packed, range(len(packed)))
    assert rows.segments is not None
    assert rows.segments.max() > 0
    for batch, segments in zip([batch for part in parts for batch in part], rows.segments.split(2), strict=True):
        assert torch.equal(batch.segments, segments)


@pytest.mark.parametrize(("rows", "sizes"), [(3, [[3, 3], [1]]), (7, [[7]]), (100, [[7]]), (1, [[1] * 7])])
def test_calibration_takes_every_window_once(rows, sizes):
    windows = data.plain_batches(torch.arange(14).reshape(7, 2), 7, torch.device("cpu"))[0]
    batches = data.calibration_batches(windows, rows, torch.device("cpu"))
    assert [[len(batch.tokens) for batch in part] for part in batches] == sizes
    assert torch.equal(torch.cat([batch.tokens for part in batches for batch in part]), windows.tokens)


def test_plain_batches_are_of_one_size_and_cover_all():
    windows = torch.arange(14).reshape(7, 2)
    batches = data.plain_batches(windows, 3, torch.device("cpu"))
    assert [batch.tokens.shape for batch in batches] == [(3, 2)] * 3
    assert torch.equal(torch.cat([batch.tokens for batch in batches])[:7], windows)
    assert torch.equal(batches[2].tokens[1:], windows[:2])
    assert len(data.plain_batches(windows, 100, torch.device("cpu"))) == 1


# What ships


def test_the_shipped_samples_are_the_documented_ones_and_disjoint():
    readme = (SHIPPED / "README.md").read_text()
    sources, size = [], 0
    for name in ("english_sample.jsonl.gz", "english_heldout.jsonl.gz"):
        content = (SHIPPED / name).read_bytes()
        size += len(content)
        assert hashlib.sha256(content).hexdigest() in readme
        assert content[4:8] == bytes(4)  # no timestamp
        records = [record for _, record in read_jsonl(SHIPPED / name)]
        assert f"| {len(records)} (" in readme
        sources.append({record["source"] for record in records})
    assert size <= 2_000_000
    assert not sources[0] & sources[1]
    presidents = [{s.split("_", 1)[1] for s in part if s.startswith("sotu/")} for part in sources]
    assert not presidents[0] & presidents[1]
