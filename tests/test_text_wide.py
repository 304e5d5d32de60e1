"""The wide training text: what its readers take from made-up packages, and what the filter drops."""

import gzip
import json
import struct
import zlib
from importlib import resources
from pathlib import Path

import pytest

from halfbyte.bench import text, text_readers, text_sources, text_wide
from halfbyte.bench.text_sources import Source
from halfbyte.training.jsonl import read_jsonl

PROSE = (
    "The keeper of the light had seen the ship that was lost in the storm, and he told us of it as we sat by the fire."
)
OTHER = (
    "It was the first of the days on which the people of the valley had to carry their boats over the hill to the sea."
)
NAMES = ("one", "two")


def test_html_keeps_inline_elements_and_ends_at_blocks(tmp_path):
    file = tmp_path / "a.html"
    file.write_text(
        "<p>The <code>ls</code> command<pre>ls -l</pre>no<p>two &amp; three<div class='para'>four</div>five"
    )
    assert text_readers.html(file) == ["The ls command", "two & three", "four"]


def test_markup_loses_its_marks_and_literal_blocks(tmp_path):
    file = tmp_path / "a.rst.gz"
    rst = "Title\n=====\n\nSee :ref:`the guide <guide>` and ``ls``,\nor C<perl -e>.\n\n"
    rst += "   literal\n\n* item\n\n.. note:: no\n"
    file.write_bytes(gzip.compress(rst.encode()))
    assert text_readers.markup(file) == ["Title\n=====", "See the guide  and ls,\nor perl -e."]


def test_stories_of_games(tmp_path):
    file = tmp_path / "a.cfg"
    file.write_text('`"Help," she says.`\nname "x"\nmessage= _ "To arms!"\ndesc = _([[One.\n\nTwo.]])\n')
    assert text_readers.quoted(file) == ['"Help," she says.', "To arms!", "One.", "Two."]


def test_boolq_gives_each_passage_once_without_question(tmp_path):
    file = tmp_path / "requests.jsonl"
    queries = [f"Sea -- Salt water.\nQuestion: is it {word}?\nAnswer:" for word in ("wet", "dry")]
    file.write_text("".join(json.dumps({"doc": {"query": query}}) + "\n" for query in queries))
    assert text_readers.boolq(file) == ["Salt water."]


def test_sword_blocks_in_order_without_notes(tmp_path):
    texts = ['<div type="x"/>In the <hi>beginning</hi><note>no</note>', "<p>And (<reference>x</reference>)God"]
    packed = [zlib.compress(part.encode()) for part in texts]
    sizes = [(0, len(packed[0]), len(texts[0])), (0, 0, 0), (len(packed[0]), len(packed[1]), len(texts[1]))]
    (tmp_path / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *size) for size in sizes))
    (tmp_path / "ot.bzz").write_bytes(b"".join(packed))
    assert text_readers.sword(tmp_path / "ot.bzs") == ["", "In the beginning", "And God"]


@pytest.mark.parametrize(
    "dropped",
    [
        "The keeper of the light.",
        PROSE.removesuffix("."),
        "Der Wärter des Turms hatte das Schiff gesehen, das im Sturm verloren ging, und erzählte uns am Feuer davon.",
        "for (i = 0; i < n; i++) { a[i] = b[i] + c[i]; } /* of the */ return the_sum(a, n) == 0 ? is_it : or_not; to.",
        "Apples, pears, plums, cherries, peaches, apricots, grapes, lemons, oranges, limes, figs, dates, berries.",
    ],
)
def test_what_is_no_prose(dropped):
    assert not text_readers.is_prose(dropped)
    assert text_readers.is_prose(PROSE)


def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: dict[str, str]) -> Path:
    """A folder of two packages and nothing of the narrow text."""
    for name, page in pages.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page)
    sources = tuple(Source(name, f"{name}=1", "", text_readers.html, f"{name}/**/*.html") for name in ("one", "two"))
    monkeypatch.setattr(text_wide, "SOURCES", sources)
    monkeypatch.setattr(text, "documents", lambda folder: iter([("narrow", "Old.")]))
    return tmp_path


def test_documents_are_ordered_new_and_not_held_out(tmp_path, monkeypatch):
    with resources.as_file(resources.files("halfbyte.recipes") / "data" / "english_heldout.jsonl.gz") as file:
        held_out = next(record["text"] for _, record in read_jsonl(file)).splitlines()[0][:600]
    pages = {
        "two/a.html": f"<p>{PROSE.upper()}<p>{OTHER}",
        "one/b/c.html": f"<p>{PROSE}<p>{PROSE}<p>It is said: {held_out}.",
    }
    folder = _folder(tmp_path, monkeypatch, pages)
    assert text_wide.main([str(folder), str(tmp_path / "out.jsonl.gz")]) == 0
    records = [json.loads(line) for line in gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()]
    found = [(record["source"], record["text"]) for record in records]
    assert found == [("narrow", "Old."), ("one/c.html", PROSE), ("two/a.html", OTHER)]


def test_a_package_that_is_not_there(tmp_path, monkeypatch, capsys):
    folder = _folder(tmp_path, monkeypatch, {"one/a.html": f"<p>{PROSE}"})
    assert text_wide.main([str(folder), str(tmp_path / "out.jsonl.gz")]) == 2
    assert capsys.readouterr().err == f"error: {folder}: the text of two is not there; unpack its package there first\n"
    assert text_wide.main([str(folder)]) == 2
    assert "usage: python -m halfbyte.bench.text_wide" in capsys.readouterr().err


def test_the_commands_pin_every_package(capsys):
    assert text_wide.main([]) == 0
    words = capsys.readouterr().out.split()
    for source in text_sources.SOURCES:
        for package in source.package.split():
            assert "=" in package
            assert words.count(package) == 1
