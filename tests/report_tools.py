"""Readers of a report that share nothing with what writes it: an HTML tree, its tables, and a headless browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list = field(default_factory=list)

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str) -> list["Node"]:
        return [node for node in self.walk() if node.tag == tag]

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)


class Tree(HTMLParser):
    """A tree of the page; an end tag that closes anything but the innermost element is an error."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.root = Node("document", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], f"never closed: {[node.tag for node in self.open[1:]]}"

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs), f"an attribute of <{tag}> twice"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    return Tree(page).root


def section(page: Node, anchor: str) -> Node:
    return next(node for node in page.all("section") if node.attributes.get("id") == anchor)


def browse(page: str, folder: Path, *, width: int, dark: bool) -> dict:
    """Open a page in headless Chromium, in a frame of the given width.

    Returns:
        overflow (elements that stick out of the page to the right), height, console (lines), picture (a path).
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on PATH (apt-get install chromium)")
    folder.mkdir(parents=True, exist_ok=True)
    wrapper = folder / "frame.html"
    wrapper.write_text(_FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(page)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=4000"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1300,1600"]
    picture = folder / "page.png"
    shot = _run([chromium, *options, f"--screenshot={picture}", wrapper.as_uri()])
    dom = _run([chromium, *options, "--dump-dom", wrapper.as_uri()])
    found = re.search(r'<pre id="result">(.*?)</pre>', dom.stdout, re.S)
    assert found, f"the page did not load: {dom.stderr[-2000:]}"
    console = [line for line in (shot.stderr + dom.stderr).splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])) | {"console": console, "picture": picture}


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


_FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body{margin:0}iframe{border:0;width:WIDTHpx;height:1600px;display:block}</style>
<iframe srcdoc="PAGE"></iframe><pre id="result"></pre>
<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument.documentElement;
  const sticksOut = (element) => element.getBoundingClientRect().right > WIDTH + 1
    && !element.parentElement.closest(".scroll, pre, details:not([open])");
  document.querySelector("#result").textContent = JSON.stringify({
    overflow: [...page.querySelectorAll("body *")].filter(sticksOut).map((e) => e.outerHTML.slice(0, 80)),
    scroll: page.scrollWidth - WIDTH,
    height: page.scrollHeight,
  });
});
</script>
"""
