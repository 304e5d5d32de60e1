"""The page itself: valid, self-contained, accessible, and right in a browser, wide and narrow, light and dark."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_tools import browse, parse

from halfbyte.launch import report_html
from halfbyte.launch.report_plots import Plot, Series, draw

CSS = (Path(report_html.__file__).parent / "report.css").read_text()


@pytest.fixture(scope="module")
def page(reported_run) -> str:
    return (reported_run / "report.html").read_text()


# Markup -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_is_one_file_without_scripts_or_addresses(page):
    tree = parse(page)
    assert page.startswith("<!DOCTYPE html>")
    for node in tree.walk():
        assert node.tag not in ("script", "link", "iframe", "img", "object", "base")
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "src", "xlink:href") or str(value).startswith("#")
            assert "://" not in str(value)
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", str(value)))
    style = "".join(node.text() for node in tree.all("style"))
    assert len(tree.all("style")) == 1
    assert not re.search(r"url\(|@import|http", style)


@pytest.mark.slow
def test_names_and_labels(page):
    tree = parse(page)
    ids = [node.attributes["id"] for node in tree.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in tree.walk():
        for name in ("aria-labelledby", "href"):
            for target in str(node.attributes.get(name) or "").removeprefix("#").split():
                assert target in ids
    for target in re.findall(r"url\(#([^)]+)\)", page):
        assert target in ids
    for table in tree.all("table"):
        assert table.all("caption")[0].text().strip()
        assert all(cell.attributes["scope"] in ("col", "row", "rowgroup") for cell in table.all("th"))
        widths = set()
        for line in table.all("tr"):
            widths.add(sum(int(cell.attributes.get("colspan") or 1) for cell in line.all("th") + line.all("td")))
        assert len(widths) == 1, table.all("caption")[0].text()
    for drawing in tree.all("svg"):
        assert drawing.attributes["role"] == "img"
        assert drawing.all("title")[0].text()
        assert drawing.all("desc")[0].text()


def test_drawings_take_the_pages_colours_and_fonts():
    figure = draw(Plot("a b", "A & <b>", "d", "x", "y", [Series("$m$", [0, 1], [1, 2], low=[0, 1], high=[2, 3])]))
    assert not re.search(r"#[0-9a-f]{6}\b|rgb\(|font-family|xmlns|http", figure.svg)
    for color in ("currentColor", "var(--grid)", "var(--after)"):
        assert color in figure.svg
    assert "A &amp; &lt;b&gt;" in figure.svg
    assert "$m$" in figure.svg
    assert (
        draw(Plot("a b", "A & <b>", "d", "x", "y", [Series("$m$", [0, 1], [1, 2], low=[0, 1], high=[2, 3])])) == figure
    )


def palettes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.S)
    return {name: dict(re.findall(r"--([\w-]+): (#\w{6})", text)) for name, text in (("light", light), ("dark", dark))}


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio of two sRGB colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast(mode):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    color = palettes()[mode]
    for ground in ("bg", "panel"):
        for text in ("text", "muted"):
            assert contrast(color[text], color[ground]) >= 4.5
    for verdict in ("pass", "fail", "inconclusive"):
        assert contrast(color[verdict], color[f"{verdict}-bg"]) >= 4.5
        assert contrast(color[verdict], color["bg"]) >= 4.5
        assert contrast(color["text"], color[f"{verdict}-bg"]) >= 4.5
    for curve in ("before", "after"):
        assert contrast(color[curve], color["bg"]) >= 3  # WCAG 1.4.11, graphics


# Browser ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(page, tmp_path, width, dark):
    seen = browse(page, tmp_path, width=width, dark=dark)
    assert seen["console"] == []
    assert seen["overflow"] == []
    assert seen["scroll"] == 0
    assert seen["height"] > 3000
    gray = np.asarray(Image.open(seen["picture"]).convert("L"))[:1600, :width]
    ground = np.median(gray)
    assert ground < 40 if dark else ground > 240
    text = gray > 200 if dark else gray < 80
    assert 0.005 < text.mean() < 0.2  # text that stands out from its ground, not a filled page
    green = np.asarray(Image.open(seen["picture"]).convert("HSV"))[:600, :width]
    assert ((abs(green[..., 0].astype(int) - 110) < 25) & (green[..., 1] > 100)).sum() > 500  # "pass" in its colour


@pytest.mark.slow
def test_long_words_and_missing_parts_do_not_widen_the_page(reported_run, tmp_path):
    from halfbyte.launch import report
    from halfbyte.training.resolve import load

    run = shutil.copytree(reported_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "cache"))
    for name in ("verify.json", "gate.json"):
        (run / name).write_text("W" * 500)
    lines = (run / "evaluate" / "qat.lambada.jsonl").read_text()
    (run / "evaluate" / "qat.lambada.jsonl").write_text(
        re.sub(r'"output": ".*?[^\\]"', f'"output": "{"W" * 900}"', lines)
    )
    report.write(load(run / "resolved.yaml", [f"run.dir={run}", f"run.name={'W' * 200}"]), run)
    seen = browse((run / "report.html").read_text(), tmp_path / "browser", width=390, dark=False)
    assert (seen["overflow"], seen["scroll"], seen["console"]) == ([], 0, [])


@pytest.mark.slow
def test_the_browser_check_sees_what_it_should(tmp_path):
    bad = "<!doctype html><div style='width:2000px'>wide</div><script>console.error('broken')</script>"
    seen = browse(bad, tmp_path, width=390, dark=False)
    assert len(seen["overflow"]) == 1
    assert seen["scroll"] > 1000
    assert any("broken" in line for line in seen["console"])
