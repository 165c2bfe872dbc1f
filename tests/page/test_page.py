"""``report.html`` without a browser: what it says, that it says it always in the same bytes, and that text stays text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_reports import HOSTILE, drop, file_row, folder, full, latency, manifest, metric, plain, rows

from calibrate.errors import UserError
from compress import cli, page
from compress.page import block_plot, outcome, sizes, story, trade_off, wording
from compress.page.folder import Found
from compress.page.judged import HOW
from compress.page.steps import steps
from compress.report import Report, RoleBytes, Row, StepRecord, table

_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """The elements of a page with their attributes, its text by section, and the rows of its first table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.section, self.sections = "header", {"header": ""}
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.elements.append((tag, known))
        if tag == "section":
            self.section = known["id"]
            self.sections[self.section] = ""
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.sections[self.section] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def parsed(report: Report, **more: Any) -> Parsed:
    return Parsed(page.render(Found(report, **more)))


def numbers(text: str) -> list[str]:
    return re.findall(r"[+-]?\d[\d.]*", text)


def test_the_page_is_a_pure_function_of_the_folder(tmp_path: Path) -> None:
    place = folder(tmp_path / "run", full(), manifest(), full())
    program = "import sys; from pathlib import Path; from compress import page; page.write(Path(sys.argv[1]))"
    written = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(place)], check=True, env=environment)
        written.append((place / "report.html").read_bytes())
    assert written[0] == written[1]
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "report.html", "report.json", "validation.json"]
    folder(place, full(name="another"))
    assert page.write(place).read_bytes() != written[0]


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    place = folder(tmp_path / "run", plain())
    (place / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        page.write(place)
    assert sorted(path.name for path in place.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize("made", [full(), plain(), full(rows=rows()[:2]), full(rows=[])], ids=["full", "plain", "two", "none"])
def test_the_table_has_every_figure_of_the_terminals_table(made: Report) -> None:
    shown = parsed(made).tables[0][1:]
    told = table(made)
    wanted = list(zip(*(column.cells for column in told.columns), strict=True))
    assert len(shown) == len(wanted) == len(made.rows)
    for cells, expected in zip(shown, wanted, strict=True):
        assert len(cells) == len(expected)
        for cell, text in zip(cells[1:-1], expected[1:-1], strict=True):
            found = numbers(cell)
            assert [number for number in numbers(str(text)) if number not in found] == []
            assert ("not measured" in cell) == ("not" in str(text))
        assert cells[0].strip() == expected[0]


def test_a_wrong_figure_in_the_table_is_seen() -> None:
    shown = parsed(full()).tables[0][2]
    changed = full(rows=[rows()[0], rows()[1].model_copy(update={"drop": drop(0.0211)}), *rows()[2:]])
    wanted = list(zip(*(column.cells for column in table(changed).columns), strict=True))[1]
    assert [number for number in numbers(str(wanted[2])) if number not in numbers(shown[2])]


@pytest.mark.parametrize(
    ("changes", "tone", "says"),
    [
        ({}, "missed", "onnx: latency_ratio 0.387, at most 0.35: missed by 0.037"),
        ({"met": True, "exit_code": 0, "limits": full().limits[::2]}, "met", "All 2 lines of the contract hold."),
        ({"met": True, "exit_code": 0, "limits": []}, "unchecked", "no accept section"),
    ],
)
def test_the_verdict_is_on_top(changes: dict[str, Any], tone: str, says: str) -> None:
    made = full(**changes)
    found = outcome.verdict(made)
    shown = parsed(made).text("header")
    assert found.tone == tone
    assert found.word in shown
    assert says in shown
    assert shown.index(found.word) < shown.index(full().warnings[0])


def test_a_missed_line_is_marked_where_its_figure_stands_and_nowhere_else() -> None:
    lines = outcome.table(full()).lines
    marked = [(line.label, cell.heading, cell.missed) for line in lines for cell in line.cells if cell.missed]
    assert marked == [("onnx", "ms, batch 1", "wanted ≤ 0.35"), ("onnx", "ms, batch 8", "wanted ≤ 0.35")]
    faster = rows()[1].model_copy(update={"latency": [rows()[1].latency[0], latency(8, 30.0, 0.3, "onnx")]})
    lines = outcome.table(full(rows=[rows()[0], faster])).lines
    assert [cell.heading for line in lines for cell in line.cells if cell.missed] == ["ms, batch 1"]


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"latency": [latency(1, 5.0, 0.5, "onnx")]}, "3.9 times smaller (90.22 MB → 23.14 MB), 2 times faster at batch 1; "),
        ({"latency": [latency(1, 5.0, 1.6, "onnx")]}, "(90.22 MB → 23.14 MB), 1.6 times slower at batch 1"),
        ({"size_ratio": 1.58}, "1.6 times larger (14.65 MB → 23.14 MB); "),
        ({"latency": [latency(1, 5.0, 1.0, "onnx")]}, "as fast as float at batch 1"),
        (
            {"latency": [latency(1, 5.0, 0.17, "onnx").model_copy(update={"ratio_low": 0.14, "ratio_high": 0.57})]},
            "1.8 to 7.1 times faster at batch 1",
        ),
        (
            {"latency": [latency(1, 5.0, 1.05, "onnx").model_copy(update={"ratio_low": 0.38, "ratio_high": 3.1})]},
            "; time at batch 1 within noise of float; ",
        ),
        ({"drop": drop(0.02)}, "drop +0.0200 [+0.013, +0.027]; 98.97% of predictions as float; time not measured."),
        ({"drop": drop(0.001)}, "drop +0.0010 [-0.006, +0.008], which includes no loss; "),
        ({"validated": "none", "drop": None, "agreement": None, "note": "no such device"}, "; not run: no such device."),
    ],
)
def test_one_sentence_says_what_a_file_gained_at_what_cost(known: dict[str, Any], wanted: str) -> None:
    gain = outcome.gains(full(rows=[rows()[0], file_row("onnx", **known)]))[0]
    sentence = "".join(text for text, _ in gain.sentence)
    assert wanted in sentence
    assert sentence.endswith(".")


def test_every_measured_time_is_a_point_and_every_other_file_is_named() -> None:
    made = full()
    _, plots = trade_off.trade_off(made)
    points = {(plot.heading, trace["x"][0], trace["y"][0]) for plot in plots for trace in plot.data}
    measured = {
        (f"batch {latency.batch}", latency.ratio, row.metric.value)
        for row in made.rows
        for latency in row.latency
        if latency.ratio is not None and row.metric
    }
    assert points == measured
    assert len(measured) == 4
    for plot in plots:
        for trace in plot.data:
            for axis, bars in (("x", trace["error_x"]), ("y", trace["error_y"])):
                assert bars["array"][0] > 0, axis
                assert bars["arrayminus"][0] > 0, axis
    assert [label for label, _ in trade_off.untimed(made)] == ["coreml", "tensorrt"]
    shown = parsed(made).text("trade-off")
    assert "coreml" in shown
    assert "tensorrt" in shown


def test_without_times_the_metric_stands_alone_and_without_a_metric_the_agreement() -> None:
    still = [row.model_copy(update={"latency": []}) for row in rows()]
    made = full(rows=still)
    assert trade_off.trade_off(made)[1] == []
    plot = trade_off.quality(made)
    assert plot is not None
    assert [trace["x"][0] for trace in plot.data] == [row.metric.value for row in reversed(still) if row.metric]
    assert "no plot against time" in parsed(made).text("trade-off")
    assert "up is better" in parsed(full()).text("trade-off")
    words = full(rows=[row.model_copy(update={"metric": metric(21.3, "perplexity")}) for row in rows()])
    assert "down is better" in parsed(words).text("trade-off")
    half = full(rows=[*rows()[:2], rows()[2].model_copy(update={"metric": None})])
    assert trade_off.untimed(half) == [("openvino", "timed, but without accuracy")]
    unlabelled = full(rows=[row.model_copy(update={"metric": None, "drop": None}) for row in rows()])
    name, plots = trade_off.trade_off(unlabelled)
    assert name == "agreement with float"
    assert len(plots) == 2
    assert plots[0].data[0]["y"] == [0.9897]
    assert "Agreement with float against time" in parsed(unlabelled).text("trade-off")


def coloured(value: Any) -> Any:
    """A figure with its CSS variables replaced by what they stand for, for plotly's own checks."""
    if isinstance(value, dict):
        return {key: "Arial" if key == "family" else coloured(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [coloured(entry) for entry in value]
    return "#123456" if isinstance(value, str) and value.startswith("var(--") else value


def figures(made: Report) -> list[Any]:
    alone = trade_off.quality(made)
    blocks = block_plot.blocks(made)
    return [*trade_off.trade_off(made)[1], *([alone] if alone else []), *([blocks] if blocks else [])]


def test_plotly_itself_accepts_every_figure() -> None:
    from plotly.graph_objects import Figure

    found = figures(full())
    assert len(found) == 4
    for plot in found:
        Figure(data=coloured(plot.data), layout=coloured(plot.layout))
        with pytest.raises(ValueError, match="colour"):
            Figure(data=coloured(plot.data), layout=coloured({**plot.layout, "colour": "x"}))


def test_every_colour_of_a_figure_is_a_variable_of_the_style() -> None:
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text("utf-8")
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")[:2]
    text = json.dumps([[plot.data, plot.layout] for plot in figures(full())])
    used = set(re.findall(r"var\((--[\w-]+)\)", text + style)) - {"--tone"}  # of the verdict alone, which sets it
    assert len(used) > 20
    for name in used:
        assert f"{name}: " in light, name
        if name not in ("--font", "--mono"):
            assert f"{name}: " in dark.split("\n}\n")[0], name


def test_the_worst_block_is_named_and_gone_blocks_are_marked() -> None:
    made = full()
    plot = block_plot.blocks(made)
    assert plot is not None
    worst = min(made.blocks, key=lambda block: block.sqnr_db or 0.0)
    assert plot.says.startswith(f"Block {worst.index} ({worst.path}) keeps least: {worst.sqnr_db:.1f} dB.")
    assert [trace["name"] for trace in plot.data] == ["after 1. quantize", "after 2. drop_layers (taken back)", "at the end"]
    gone = full(blocks=made.steps[1].blocks, steps=[])
    plot = block_plot.blocks(gone)
    assert plot is not None
    assert "Taken out: block 4." in plot.says
    assert [shape["x0"] for shape in plot.layout["shapes"]] == [3.6]
    assert dict(zip(plot.data[-1]["x"], plot.data[-1]["y"], strict=True))[4] is None, "a gap in the line"
    assert block_plot.by_need(gone.blocks)[-1].index == 4
    equal = full(blocks=[block.model_copy(update={"sqnr_db": None, "gone": False}) for block in made.blocks], steps=[])
    assert block_plot.blocks(equal) is None
    assert "Nothing differs in any of the 12 blocks" in parsed(equal).text("blocks")
    shorter = [block.model_copy(update={"note": "its output is [4, 16, 64] instead of [4, 17, 64]"}) for block in equal.blocks]
    told = parsed(equal.model_copy(update={"blocks": shorter})).text("blocks")
    assert "Nothing differs" not in told
    assert "Not compared: block 0: its output is [4, 16, 64]" in told


def test_bytes_by_role_and_by_element_type_add_up() -> None:
    made = full()
    bars = sizes.roles(made)
    assert bars[0].role == "embedding"
    assert bars[-1].role == "all"
    assert bars[-1].before == wording.size(sum(role.before for role in made.roles))
    assert {bar.role: bar.after for bar in bars}["attention.out"] == "gone"
    assert {bar.role: bar.ratio for bar in bars}["other"] == "new"
    files = sizes.files(made)
    assert [file.path for file in files] == ["onnx/model.onnx", "coreml/model.mlpackage", "tensorrt/model.engine"]
    for file in files:
        assert sum(part.share for part in file.parts) == pytest.approx(100, abs=0.01)
        assert file.parts[-1].name == "everything else"
        assert file.width < file.float_width <= 100
    tones = [tone for _, tone in sizes.legend(made)]
    assert tones[-1] == 0
    assert {name: tone >= 4 for name, tone in sizes.legend(made)}["float32"]


def test_a_step_says_what_it_was_asked_changed_and_brought() -> None:
    shown = parsed(full())
    text = shown.text("steps")
    for wanted in ("weights: 8", "90.86 MB → 23.07 MB", "206", "3.3 s", "paid", "taken back", "brought neither size nor speed"):
        assert wanted in text, wanted
    assert "the head shares the codes of its table" in text
    assert "bert.pooler.dense: named under skip" in text
    first = steps(full())[0]
    assert first.sites is not None
    assert first.sites.sorted_by == "weight_sqnr_db"
    figures = [float(values[0]) for _, values in first.sites.rows]
    assert figures == sorted(figures)
    assert len(set(figures)) > 5
    assert first.sites.columns == ("weight_sqnr_db", "activation clipped_percent")
    assert ("scale", "0.00087 … 0.0025") in first.sites.same
    assert first.worth is not None
    assert first.worth.rows[1][2][-1] == ("–", ""), "a file without a time has a dash under it"


def test_every_way_of_validation_is_explained() -> None:
    shown = parsed(full()).text("validation")
    for how in ("runtime", "interpreter", "proxy"):
        assert HOW[how] in shown
    assert "40 of 40 quantized layers hold exactly the integers of the model (22,682,112 codes compared)" in shown
    assert "row alone equals row in a batch: does not apply the file takes exactly 1 row" in shown
    assert "computes in float, though the file holds integers: bert.pooler.dense" in shown


SECTIONS = ("header", "figures", "trade-off", "size", "blocks", "steps", "validation", "cost", "record")


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ("header", "Nothing was run on evaluation rows"),
        ("trade-off", "Absent: nothing was run on evaluation rows"),
        ("size", "Absent: this report has no bytes by role"),
        ("blocks", "Absent: this report has no figures per block"),
        ("steps", "No pass"),
        ("validation", "Not run. Its contents were read back, no more. (evaluation was switched off)"),
        ("cost", "Absent: the report has no times"),
        ("record", "Absent: there is no manifest.json"),
    ],
)
def test_what_is_absent_is_said_in_its_place(section: str, why: str) -> None:
    shown = parsed(plain())
    assert tuple(shown.sections) == SECTIONS
    assert why in shown.text(section)
    assert "Absent" not in " ".join(parsed(full(), manifest=manifest()).sections.values())


def test_a_page_without_plots_carries_no_program() -> None:
    text = page.render(Found(plain()))
    assert "<script" not in text
    policies = [known["content"] for _, known in Parsed(text).elements if known.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "script-src 'none'" in policies[0]
    assert len(text) < 60_000


@pytest.mark.parametrize(
    "empty", ["rows", "steps", "blocks", "roles", "limits", "warnings", "model", "data", "machine", "seconds"]
)
def test_any_part_may_be_missing(empty: str) -> None:
    known = full()
    shown = parsed(full(**{empty: type(getattr(known, empty))()}), manifest={})
    assert tuple(shown.sections) == SECTIONS


def test_an_old_report_is_read(tmp_path: Path) -> None:
    """The first version wrote none of the later fields."""
    place = folder(tmp_path / "run", full())
    told = json.loads((place / "report.json").read_text())
    for late in ("blocks", "roles", "warnings", "resumed"):
        del told[late]
    for step in told["steps"]:
        for late in ("rows", "worth", "paid", "undone", "says", "blocks", "sites"):
            step.pop(late, None)
    (place / "report.json").write_text(json.dumps(told))
    assert "Absent: this report has no figures per block" in Parsed(page.write(place).read_text("utf-8")).text("blocks")


def test_a_later_validation_is_shown_beside_the_run() -> None:
    later = full(met=True, exit_code=0, limits=[], data={"validated_on": "all 872 evaluation rows"})
    shown = parsed(full(), validation=later)
    assert "Validated again on all 872 evaluation rows (AMD EPYC, 1 thread): no contract was checked." in shown.text("header")
    assert "Contract missed" in shown.text("header")
    assert len([table for table in shown.tables if len(table) == 6 and "float" in table[1][0]]) == 2


def hostile() -> Report:
    """A report in which every text that can come from a recipe, a path or a library is hostile."""
    files = [
        row.model_copy(
            update={
                "label": HOSTILE + str(number),
                "path": f"javascript:{HOSTILE}/{number}",
                "runtime": HOSTILE,
                "note": HOSTILE,
                "details": {HOSTILE: HOSTILE},
                "metric": row.metric.model_copy(update={"name": HOSTILE}) if row.metric else None,
                "latency": [latency.model_copy(update={"runtime": HOSTILE}) for latency in row.latency],
            }
        )
        for number, row in enumerate(rows())
    ]
    step = full().steps[0]
    told = {"sites": {HOSTILE: {HOSTILE: HOSTILE}}, "skipped": {HOSTILE: HOSTILE}, "ties": [HOSTILE], HOSTILE: HOSTILE}
    blocks = [block.model_copy(update={"path": HOSTILE}) for block in step.blocks]
    hurt = {"name": HOSTILE, "options": {HOSTILE: HOSTILE}, "report": told, "says": HOSTILE, "blocks": blocks, "worth": []}
    return full(
        name=HOSTILE,
        rows=files,
        steps=[step.model_copy(update=hurt), full().steps[1].model_copy(update=hurt)],
        blocks=blocks[:-1],
        roles=[RoleBytes(role=HOSTILE, before=2, after=1)],
        warnings=[HOSTILE],
        limits=[limit.model_copy(update={"artifact": HOSTILE, "line": HOSTILE, "says": HOSTILE}) for limit in full().limits],
        model={"name": HOSTILE, "task": HOSTILE, "notes": [HOSTILE]},
        data={"evaluation": {"path": HOSTILE, "rows": HOSTILE, "chosen": HOSTILE}},
        machine={"processor": HOSTILE, "threads": HOSTILE, "system": HOSTILE},
        seconds={HOSTILE: 1.0},
    )


def hostile_manifest() -> dict[str, Any]:
    inside = {"sha256": HOSTILE, "bytes": 1}
    return manifest(base=HOSTILE, recipe=HOSTILE, files={f"javascript:{HOSTILE}": inside}, versions={HOSTILE: HOSTILE})


def test_text_of_a_recipe_stays_text() -> None:
    shown = parsed(hostile(), manifest=hostile_manifest(), validation=hostile(), beside=("javascript:x/y.md",))
    assert shown.text("header").count("window.hurt=1") > 5
    assert {tag for tag, _ in shown.elements} & {"img", "iframe", "object", "embed", "base", "form"} == set()
    assert len([tag for tag, _ in shown.elements if tag == "script"]) == 3, "the figures, plotly and the page's own"
    attributes = [(name, value) for _, known in shown.elements for name, value in known.items()]
    assert [name for name, _ in attributes if name.startswith("on")] == []
    addresses = [value for name, value in attributes if name in ("href", "src", "action")]
    assert len(addresses) > 5
    assert [address for address in addresses if not address.startswith(("#", "./", "data:,"))] == []


def test_no_text_leaves_the_data_of_the_plots() -> None:
    text = page.render(Found(hostile()))
    start = text.index('<script type="application/json" id="plots-data">')
    data = text[start : text.index("</script>", start)].split(">", 1)[1]
    assert "<" not in data
    told = json.dumps(json.loads(data))
    assert "&lt;script&gt;" in told, "plotly reads its texts as markup"
    assert "<script>" not in told


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.md", "a/../../b", ""])
def test_a_link_never_leaves_the_folder(path: str) -> None:
    assert story.link(path) == ""


def test_a_link_is_relative_whatever_the_path_looks_like() -> None:
    assert story.link("onnx/a b.md") == "./onnx/a%20b.md"
    assert story.link("javascript:alert(1)").startswith("./")


def test_ids_are_unique_and_labels_lead_somewhere() -> None:
    shown = parsed(full(), validation=full())
    ids = [known["id"] for _, known in shown.elements if "id" in known]
    assert len(ids) == len(set(ids))
    inside = [known["href"][1:] for _, known in shown.elements if known.get("href", "").startswith("#")]
    assert inside
    assert set(inside) <= set(ids)


def test_cards_and_programs_next_to_the_files_are_linked(tmp_path: Path) -> None:
    place = folder(tmp_path / "run", full())
    (place / "onnx").mkdir()
    for name in ("README.md", "run.py", "model.onnx"):
        (place / "onnx" / name).write_text("x")
    assert page.read(place).beside == ("onnx/README.md", "onnx/run.py")
    shown = Parsed(page.write(place).read_text("utf-8"))
    assert "./onnx/README.md" in [known.get("href") for _, known in shown.elements]


def test_the_command_that_runs_it_again_is_safe_to_paste() -> None:
    told = story.again(Found(full(), manifest(base="../my recipes; rm x", recipe="a'b", model={"source": "mine.py:make"})))
    assert "compress apply '../my recipes; rm x/a'\"'\"'b.yaml' --out ../a-b-again --trust" in told
    assert "--trust" not in story.again(Found(full(), manifest()))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("report.json", "{", "is not a report that this version can read"),
        ("report.json", '{"version": 2}', "is not a report that this version can read"),
        ("report.json", "[]", "is not a report that this version can read"),
        ("manifest.json", "{", "cannot be read as JSON"),
        ("manifest.json", "[]", "is not a manifest"),
        ("manifest.json", '{"files": []}', "is not a manifest"),
        ("manifest.json", '{"files": {"x": 1}}', "is not a manifest"),
        ("manifest.json", '{"machine": {"memory_bytes": "much"}}', "is not a manifest"),
        ("validation.json", "{}", "is not a report that this version can read"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    place = folder(tmp_path / "run", plain(), manifest(), plain())
    (place / name).write_text(content)
    with pytest.raises(UserError) as caught:
        page.write(place)
    assert caught.value.where == str(place / name)
    assert says in caught.value.what
    assert "\n" not in caught.value.what
    assert not (place / "report.html").exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_the_command_prints_the_table_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder(tmp_path / "run", full())
    assert command(monkeypatch, "report", str(place)) == 0
    printed = capsys.readouterr().out
    assert "0.8727" in printed
    assert "missed: accept.latency_ratio" in printed
    assert printed.splitlines()[-1] == str(place / "report.html")
    assert (place / "report.html").is_file()


@pytest.mark.parametrize("data", [{}, {"evaluation": {}}])
def test_the_command_needs_nothing_that_a_report_may_lack(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "report", str(folder(tmp_path / "run", plain(data=data)))) == 0
    assert "no contract was checked" in capsys.readouterr().out


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file", "a run that is not finished"])
def test_a_folder_without_a_report_is_one_line_and_exit_code_2(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    if there == "a folder":
        place.mkdir()
    elif there == "a file":
        place.write_text("x")
    elif there == "a run that is not finished":
        place.mkdir()
        (place / "recipe.yaml").write_text("model: x")
    assert command(monkeypatch, "report", str(place)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[0].startswith(f"{place}: ")
    assert len(told.err.splitlines()) == 2, "one line and the way out"
    assert ("not finished" in told.err) == there.startswith("a run")
    assert not (place / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "–"),
        (True, "yes"),
        (0.088530005, "0.08853"),
        (12_345, "12,345"),
        ([0.00087, 0.0025], "0.00087 … 0.0025"),
        (["a", 1], "a, 1"),
        ({"a": 1, "b": {"c": None}}, "a 1, b c –"),
    ],
)
def test_any_value_is_told_in_one_line(value: Any, told: str) -> None:
    assert wording.plain(value) == told


def odd() -> st.SearchStrategy[Any]:
    """Any JSON, as another version or another program may have left it where the report is free in form."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    inner = lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=6), part, max_size=3)  # noqa: E731
    return st.recursive(leaves, inner, max_leaves=8)


KEYS = st.sampled_from(
    [
        "sites",
        "skipped",
        "ties",
        "calibration_rows",
        "notes",
        "name",
        "task",
        "float_bytes",
        "evaluation",
        "validated_on",
        "processor",
        "threads",
        "run_in_float",
        "rows",
        "path",
        "base",
        "recipe",
        "model",
        "seed",
        "data",
    ]
)


@settings(max_examples=30)
@given(st.dictionaries(KEYS, odd(), max_size=8))
def test_whatever_the_free_parts_of_a_report_hold_there_is_a_page(told: dict[str, Any]) -> None:
    step = full().steps[0].model_copy(update={"report": told, "options": told})
    files = [row.model_copy(update={"details": told}) for row in rows()[:2]]
    made = full(rows=files, steps=[step], model=told, data=told, machine=told)
    known = {name: value for name, value in told.items() if name not in ("data", "machine")}
    shown = parsed(made, manifest=known, validation=made)
    assert tuple(shown.sections) == SECTIONS


def test_a_pass_that_reports_nothing_known_is_shown_all_the_same() -> None:
    step = StepRecord(
        name="own", options={}, seconds=0.1, bytes_before=0, bytes_after=0, changed=0, report={"sites": [1], "x": 2}
    )
    shown = parsed(full(steps=[step])).text("steps")
    assert "own" in shown
    assert "nothing but its defaults" in shown


def test_roles_that_share_a_layer_say_once_what_they_have_in_common() -> None:
    assert wording.roles("attention.query, attention.key, attention.value") == "attention.query, key, value"
    assert wording.roles("mlp.up, attention.key") == "mlp.up, attention.key"
    assert wording.roles("embedding, head") == "embedding, head"


@pytest.mark.parametrize(
    ("value", "told"), [(0.004, "4 ms"), (0.5, "0.50 s"), (3.31, "3.3 s"), (119.9, "119.9 s"), (179.9, "2 min 59 s")]
)
def test_times_of_parts(value: float, told: str) -> None:
    assert wording.seconds(value) == told


def test_rows_of_one_label_share_a_mark_and_float_has_its_own() -> None:
    found = outcome.marks([*rows(), Row(label="onnx", format="onnx", validated="none")])
    assert found == {"float": 0, "onnx": 1, "openvino": 2, "coreml": 3, "tensorrt": 4}
    assert metric(0.5).low == pytest.approx(0.4785)
