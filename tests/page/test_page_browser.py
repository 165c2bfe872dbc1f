"""``report.html`` in headless Chromium: drawn, quiet, legible in light and dark, and no wider than a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from page_reports import HOSTILE, folder, full, latency, manifest, plain, rows
from test_page import hostile, hostile_manifest

from compress import page
from compress.report import Report

playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright (extra test)")

_PLACES = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

_CONTRAST = """
() => {
  const channels = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const light = (colour) => {
    const [r, g, b] = colour.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(channels(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || !box.height || element.closest("script, style, noscript, .hidden")) continue;
    const style = getComputedStyle(element);
    const inside = element instanceof SVGElement;
    const colour = channels(inside ? style.fill : style.color);
    const under = behind(inside ? element.ownerSVGElement.parentElement : element);
    const [bright, dim] = [light(over(colour, under)), light(under)].sort((a, b) => b - a);
    found.push([(bright + 0.05) / (dim + 0.05), element.textContent.trim().slice(0, 40), inside]);
  }
  return found;
}
"""
"""WCAG 2.1 contrast of every text that is seen, from the colours as rendered: [ratio, text, whether it is in a plot]."""

_SIDEWAYS = "() => [document.scrollingElement.scrollWidth, document.scrollingElement.clientWidth]"
_SNUG = """() => [...document.querySelectorAll('.plot')].every(
  (one) => one.querySelector('.main-svg').getBoundingClientRect().width === one.clientWidth
)"""
"""Whether each plot is exactly as wide as its place; plotly follows a change of the window a moment later."""
_UNFOLD = "() => document.querySelectorAll('details').forEach((one) => { one.open = true; })"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for path in map(shutil.which, _PLACES) if path), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=_FLAGS)
        yield opened
        opened.close()


class Told:
    """What a page asked for and complained of."""

    def __init__(self, shown: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        shown.on("request", lambda request: self.requests.append(request.url))
        shown.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        shown.on("pageerror", lambda error: self.complaints.append(str(error)))
        shown.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))


@contextmanager
def opened(browser: Any, path: Path, scheme: str = "light", width: int = 1200) -> Iterator[tuple[Any, Told]]:
    """The page of a file as someone sees it, and what it did meanwhile."""
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        told = Told(shown)
        shown.goto(path.as_uri())
        yield shown, told
    finally:
        shown.close()


def written(place: Path, made: Report, **more: Any) -> Path:
    return page.write(folder(place, made, **more))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("run"), full(), told=manifest(), validation=full())


@pytest.mark.parametrize(("scheme", "width", "then"), [("light", 390, 1200), ("dark", 1200, 390)])
def test_it_is_quiet_drawn_and_fits(browser: Any, everything: Path, scheme: str, width: int, then: int) -> None:
    with opened(browser, everything, scheme, width) as (shown, told):
        assert shown.locator(".plot .main-svg").count() > 0
        assert len(shown.query_selector_all(".plot")) == len(shown.query_selector_all(".plot .svg-container")) == 3
        for unfold in (False, True):
            if unfold:
                shown.evaluate(_UNFOLD)
            scrolled, seen = shown.evaluate(_SIDEWAYS)
            assert scrolled <= seen
        shown.wait_for_function(_SNUG, timeout=5000)
        shown.set_viewport_size({"width": then, "height": 900})
        shown.wait_for_function(_SNUG, timeout=5000)
        scrolled, seen = shown.evaluate(_SIDEWAYS)
        assert scrolled <= seen == then
        assert told.requests == [everything.as_uri()]
        assert told.complaints == []


def test_a_page_that_complains_asks_or_is_too_wide_is_seen(browser: Any, everything: Path, tmp_path: Path) -> None:
    text = everything.read_text("utf-8")
    worse = text.replace("<main>", '<main><div style="width:3000px">x</div><img src="other.png"><script>window.hurt=1</script>')
    (tmp_path / "worse.html").write_text(worse, "utf-8")
    with opened(browser, tmp_path / "worse.html") as (shown, told):
        scrolled, seen = shown.evaluate(_SIDEWAYS)
        assert scrolled > seen
        assert len([line for line in told.complaints if "Content Security Policy" in line]) >= 2, "the image and the script"
        assert shown.evaluate("() => window.hurt") is None
    (tmp_path / "open.html").write_text('<img src="other.png"><script>console.error("x"); window.hurt=1</script>', "utf-8")
    with opened(browser, tmp_path / "open.html") as (shown, told):
        assert len(told.requests) == 2
        assert "error: x" in told.complaints
        assert shown.evaluate("() => window.hurt") == 1


def points(shown: Any, name: str) -> int:
    return int(shown.locator(f"#{name} .scatterlayer .points path.point").count())


def test_as_many_points_are_drawn_as_rows_were_measured(browser: Any, everything: Path, tmp_path: Path) -> None:
    measured = json.loads((everything.parent / "report.json").read_text())["rows"]
    with opened(browser, everything) as (shown, _):
        for batch in (1, 8):
            timed = [one for row in measured for one in row["latency"] if one["batch"] == batch and one["ratio"] is not None]
            assert points(shown, f"plot-batch-{batch}") == len(timed) == 2
            for axis in ("xerror", "yerror"):
                assert shown.locator(f"#plot-batch-{batch} .errorbars path.{axis}").count() == 2
            names = shown.locator(f"#plot-batch-{batch} .textpoint").all_text_contents()
            assert sorted(name.strip() for name in names) == ["onnx", "openvino"]
        blocks = full().blocks
        assert points(shown, "plot-blocks") == sum(
            len([one for one in found if one.sqnr_db is not None]) for found in every_block()
        )
        assert f"block {min(blocks, key=lambda block: block.sqnr_db or 0).index}" in shown.locator("#plot-blocks").inner_text()
    more = full(
        rows=[rows()[0], rows()[1].model_copy(update={"latency": [latency(size, 5.0, 0.4, "onnx") for size in (1, 2, 4)]})]
    )
    with opened(browser, written(tmp_path / "more", more)) as (shown, _):
        assert [points(shown, f"plot-batch-{size}") for size in (1, 2, 4)] == [1, 1, 1]
    still = full(rows=[row.model_copy(update={"latency": []}) for row in rows()])
    with opened(browser, written(tmp_path / "still", still)) as (shown, told):
        assert points(shown, "plot-quality") == len(rows())
        assert told.complaints == []


def every_block() -> list[Any]:
    return [full().steps[0].blocks, full().steps[1].blocks, full().blocks]


def test_every_figure_of_the_table_is_that_of_the_report(browser: Any, everything: Path) -> None:
    told = json.loads((everything.parent / "report.json").read_text())
    with opened(browser, everything) as (shown, _):
        lines = shown.evaluate(
            "() => [...document.querySelector('#figures .final tbody').rows]"
            ".map((row) => [...row.cells].map((cell) => cell.innerText))"
        )
    for row, cells in zip(told["rows"], lines, strict=True):
        label, quality, drop, agreement, sqnr, first, second, size, validated = (cell.strip() for cell in cells)
        assert label == row["label"]
        assert quality == f"{row['metric']['value']:.4f}\n[{row['metric']['low']:.3f}, {row['metric']['high']:.3f}]"
        assert size.split()[0] == f"{row['size_bytes'] / 1e6:.2f}"
        assert row["runtime"] in validated
        times = {one["batch"]: one for one in row["latency"]}
        for cell, batch in ((first, 1), (second, 8)):
            if batch in times:
                assert cell.split()[0] == f"{times[batch]['median_ms']:.3g}"
                if times[batch]["ratio"] is not None:
                    assert cell.split()[1] == f"{times[batch]['ratio']:.2f}x"
            else:
                assert cell == "not measured"
        if row["validated"] == "reference":
            assert drop == agreement == sqnr == ""
            continue
        assert drop == f"{row['drop']['value']:+.4f}\n[{row['drop']['low']:+.3f}, {row['drop']['high']:+.3f}]"
        assert agreement == f"{row['agreement']['value']:.2%}"
        assert sqnr == ("equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}")
        assert size.split()[-1] == f"{row['size_ratio']:.2f}x"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(browser: Any, everything: Path, scheme: str) -> None:
    with opened(browser, everything, scheme) as (shown, _):
        shown.evaluate(_UNFOLD)
        found = shown.evaluate(_CONTRAST)
        assert len([text for _, text, inside in found if inside]) > 30, "the texts of the plots are among them"
        assert len(found) > 300
        assert [(round(ratio, 2), text) for ratio, text, _ in found if ratio < 4.5] == []


def test_text_that_is_too_faint_is_seen(browser: Any, tmp_path: Path) -> None:
    page_of = "<body style='background:#fff'><p style='color:#777'>faint</p><p style='color:#767676'>just enough</p></body>"
    (tmp_path / "faint.html").write_text(page_of)
    with opened(browser, tmp_path / "faint.html") as (shown, _):
        faint, enough = (ratio for ratio, *_ in shown.evaluate(_CONTRAST))
    assert faint == pytest.approx(4.48, abs=0.005)
    assert enough == pytest.approx(4.54, abs=0.005)


def colours(shown: Any) -> dict[str, str]:
    """Colours of the page and of two plots, after two more frames: a change of the medium is told before a frame."""
    shown.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return dict(
        shown.evaluate(
            """() => ({
              paper: getComputedStyle(document.body).backgroundColor,
              tick: getComputedStyle(document.querySelector('#plot-blocks .xtick text')).fill,
              point: getComputedStyle(document.querySelector('#plot-batch-1 path.point')).fill,
            })"""
        )
    )


def test_the_plots_follow_when_light_and_dark_change_and_when_it_is_printed(browser: Any, everything: Path) -> None:
    with opened(browser, everything, "light") as (shown, told):
        light = colours(shown)
        shown.emulate_media(color_scheme="dark")
        dark = colours(shown)
        assert light["paper"] == "rgb(255, 255, 255)"
        assert all(light[name] != dark[name] for name in light)
        shown.emulate_media(media="print", color_scheme="dark")
        assert colours(shown) == light
        shown.emulate_media(media="screen", color_scheme="light")
        assert colours(shown) == light
        assert told.complaints == []


def test_hostile_text_does_nothing(browser: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "run", hostile(), told=hostile_manifest(), validation=hostile())
    with opened(browser, path, width=390) as (shown, told):
        shown.evaluate(_UNFOLD)
        for place in shown.query_selector_all("#plot-batch-1 path.point, #plot-blocks path.point")[:3]:
            place.dispatch_event("mousemove")
        assert shown.evaluate("() => window.hurt") is None
        assert HOSTILE in shown.locator("h1").inner_text()
        assert shown.locator("main img").count() == 0
        assert told.requests == [path.as_uri()]
        assert told.complaints == []
        scrolled, seen = shown.evaluate(_SIDEWAYS)
        assert scrolled <= seen


def test_the_hostile_text_would_do_something(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "naive.html").write_text(f"<h1>{HOSTILE}</h1>")
    with opened(browser, tmp_path / "naive.html") as (shown, _):
        assert shown.evaluate("() => window.hurt") == 1


def test_on_a_phone_each_row_of_the_table_is_a_card(browser: Any, everything: Path) -> None:
    with opened(browser, everything, width=390) as (shown, _):
        boxes = [shown.locator("#figures .final tbody tr").nth(number).bounding_box() for number in range(5)]
        assert all(box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        heading = shown.evaluate(
            "() => getComputedStyle(document.querySelector('#figures .final td.is-size'), '::before').content"
        )
        assert heading == '"size"'
        assert not shown.locator("#figures .final thead").is_visible()


def test_the_plainest_report_is_quiet_too(browser: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "run", plain())
    for width in (390, 1200):
        with opened(browser, path, width=width) as (shown, told):
            scrolled, seen = shown.evaluate(_SIDEWAYS)
            assert scrolled <= seen
            assert told.requests == [path.as_uri()]
            assert told.complaints == []
            assert shown.locator(".absent").count() >= 6
