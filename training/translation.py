"""`halfbyte fetch en_de`: aligned English-German sentences from the help pages of LibreOffice, two Debian packages.

The pages of both languages number their paragraphs alike, so a paragraph and its translation have the same page and id.
Human translations under the MPL-2.0; the packages are libreoffice-help-en-us and libreoffice-help-de.
"""

import importlib.resources
import json
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from halfbyte.training.errors import UserError

HELP = Path("usr/share/libreoffice/help")
LENGTHS = range(20, 401)
"""Characters that a sentence may have on either side."""
TEST_SHARE = 20
"""One page in this many is for the test, the others are for training: no page is in both."""


class _Paragraphs(HTMLParser):
    """Id -> text of every `<p id=...>` of a page."""

    def __init__(self):
        super().__init__()
        self.texts: dict[str, str] = {}
        self.current: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.current = dict(attrs).get("id")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self.current = None

    def handle_data(self, data: str) -> None:
        if self.current:
            self.texts[self.current] = self.texts.get(self.current, "") + data


def fetch_pairs(directory: Path) -> Path:
    """Write en_de.jsonl (test: source, target), en_de_train.jsonl (text) and the task file en_de.yaml.

    Args:
        directory: Where to. The packages may be unpacked there (dpkg-deb -x PACKAGE DIRECTORY) instead of installed.

    Returns:
        `directory`.

    Raises:
        UserError: the help pages are found neither there nor where the packages install them, or the folder cannot be
            written.
    """
    roots = [root / HELP for root in (directory, Path("/"))]
    found = [root for root in roots if (root / "de" / "text").is_dir() and (root / "en-US" / "text").is_dir()]
    if not found:
        raise UserError(
            f"fetch en_de: no help pages under {roots[0]} or {roots[1]}; apt-get download libreoffice-help-en-us "
            f"libreoffice-help-de, and dpkg-deb -x each into {directory}"
        )
    test, train = [], []
    for page, source, target in _pairs(found[0]):
        if zlib.crc32(page.encode()) % TEST_SHARE == 0:
            test.append({"source": source, "target": target})
        else:
            train.append({"text": f"English: {source}\nGerman: {target}"})
    task = (importlib.resources.files("halfbyte.recipes") / "tasks" / "en_de.yaml").read_text()
    files = {"en_de.jsonl": _lines(test), "en_de_train.jsonl": _lines(train), "en_de.yaml": task}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); name another directory") from error
    return directory


def _lines(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _pairs(root: Path) -> Iterator[tuple[str, str, str]]:
    """(page, English, German) of every paragraph worth translating, each English text once."""
    seen = set()
    for german in sorted((root / "de" / "text").rglob("*.html")):
        page = str(german.relative_to(root / "de" / "text"))
        english = root / "en-US" / "text" / page
        if not english.is_file():
            continue
        sources, targets = _paragraphs(english), _paragraphs(german)
        for key in (key for key in sources if key in targets):
            source, target = sources[key], targets[key]
            if source not in seen and source != target and _is_sentence(source) and _is_sentence(target):
                seen.add(source)
                yield page, source, target


def _paragraphs(path: Path) -> dict[str, str]:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8"))
    return {key: " ".join(text.split()) for key, text in parser.texts.items()}


def _is_sentence(text: str) -> bool:
    """Words, not a formula or an identifier: three of them at least, and letters for the most part."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) in LENGTHS and len(text.split()) > 2 and letters > 0.8 * len(text)
