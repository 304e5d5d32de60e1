"""Readers of the wide training text: paragraphs from the file formats of public packages. Torch-free."""

import gzip
import json
import re
import struct
import zlib
from html import unescape
from pathlib import Path

BLOCK = (
    "(?:p|address|aside|blockquote|body|d[dlt]|div|footer|h[1-6r]|head|header|li|nav|[ou]l|pre|script|section|style|"
    r"svg|table|tbody|t[dhr]|title)\b"
)
PARAGRAPH = re.compile(rf"<(?:p\b[^>]*|div class=[\"']para[\"'])>((?:[^<]|<(?!/?{BLOCK}))*)", re.I)
"""A paragraph of HTML ends where the next block starts or one ends; all other elements are parts of it."""
ODD = re.compile(r"[\d_]|[^\w ,.;'’\"“”-]")
"""Characters that prose has few of."""
COMMON = re.compile(
    r"\b(an?|and|are|as|at|be|but|by|for|from|has|have|he|his|if|i[nst]|not|o[fnr]|that|the|they|this|to|was|which|with|you)\b"
)
"""Words that make up a third of English running text, and little of lists, code and other languages."""
SHORTEST = 80
"""Characters of the shortest paragraph that is kept."""


def _text(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode(errors="replace")


def html(file: Path) -> list[str]:
    """Paragraphs of an HTML, XHTML or Mallard page: of each `<p>` and `<div class="para">`."""
    return [unescape(re.sub(r"<[^>]*>", "", found)) for found in PARAGRAPH.findall(_text(file))]


def blocks(file: Path) -> list[str]:
    """Runs of lines between blank lines, however they are indented."""
    return re.split(r"\n\s*\n", _text(file))


def markup(file: Path) -> list[str]:
    """Paragraphs of reStructuredText or POD that start in the first column: the others are literal blocks and lists."""
    stripped = [block.strip("\n") for block in blocks(file)]
    texts = [block for block in stripped if re.match(r"[\w\"'(]", block) and "\n " not in block]
    texts = [re.sub(r"[A-Z]<+\s?([^<>|]*\|)?([^<>]*?)\s?>+", r"\2", block) for block in texts]
    texts = [re.sub(r":[a-z:]+:`([^`<]*)(<[^`]*>)?`", r"\1", block) for block in texts]
    return [re.sub(r"``?|\*\*|`_+", "", block) for block in texts]


def quoted(file: Path) -> list[str]:
    """Story text of games: between backquotes (Endless Sky), or in `_"..."` and `_([[...]])`, which are translated."""
    found = re.findall(r'`([^`\n]+)`|_\s*\(?"([^"]+)"|_\(?\[\[(.+?)\]\]', _text(file), re.S)
    return [part for parts in found for part in "".join(parts).replace("\\n", "\n").split("\n\n")]


def boolq(file: Path) -> list[str]:
    """The passages of BoolQ's requests, each once; no question and no answer."""
    found = [json.loads(line)["doc"]["query"].partition("\nQuestion: ")[0] for line in _text(file).splitlines()]
    return [passage.partition(" -- ")[2] for passage in dict.fromkeys(found)]


def sword(file: Path) -> list[str]:
    """Paragraphs of a compressed SWORD module: its index of blocks, and beside it the blocks in zlib (.bzz or .czz).

    The index (.bzs or .czs) has three little-endian 32-bit numbers per block: offset, bytes, bytes once unpacked.
    """
    data = file.with_suffix(file.suffix[:-1] + "z").read_bytes()
    index = struct.iter_unpack("<III", file.read_bytes())
    unpacked = [zlib.decompress(data[start : start + size]) for start, size, _ in index if size]
    text = b"".join(unpacked).decode(errors="replace")
    text = re.sub(r"<note.*?</note>|<title.*?</title>|\(?<reference.*?</reference>\)?", "", text, flags=re.S)
    text = re.sub(r"<(div|chapter|lb|p|item|list)\b[^>]*>|</p>", "\n", text)
    return re.sub(r"<[^>]*>", "", text).split("\n")


def is_prose(text: str) -> bool:
    """Whether a paragraph with single spaces is English running text.

    It is long enough and ends as a sentence, has hardly any character that prose has not, and a fifth of its words are
    among COMMON.
    """
    if len(text) < SHORTEST or text[-1] not in ".?!:\"'”’)":
        return False
    words = re.findall(r"[a-z]+", text.lower())
    return len(ODD.findall(text)) * 20 <= len(text) and len(COMMON.findall(text.lower())) * 5 >= len(words)
