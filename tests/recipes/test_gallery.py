"""Every shipped recipe, as a user starts from it: the text of the file, beside a small random model of its family and made-up
rows, with nothing changed but where things are and how large they are."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from miniatures import save_hf, save_own_model, save_rows, save_timm
from sweeps import swept

from calibrate.errors import UserError
from compress.anatomy import find
from compress.checks import check_exporters
from compress.datasets import load_data
from compress.preparation import model_of
from compress.recipe import read
from compress.rehearsal import rehearse
from compress.report import Report
from compress.run import apply
from compress.shipped import recipes_folder, shipped_recipes
from compress.yaml_positions import parse
from export.graph import Traceable
from export.to_onnx import OnnxExporter

for library, extra in (
    ("transformers", "hf"),
    ("timm", "timm"),
    ("PIL", "hf"),
    ("pyarrow", "hf"),
    ("onnxruntime", "onnx"),
    ("coremltools", "coreml"),
    ("tensorrt_rtx", "tensorrt-rtx"),
    ("nncf", "nncf"),
    ("ot", "fusion"),
):
    pytest.importorskip(library, reason=f"needs the extra {extra}")

MAY_CHANGE = (
    *("model", "model.source", "model.checkpoint", "data.columns*", "data.*.path", "data.*.rows", "data.tokens"),
    "passes.*.mixed.size_ratio",  # of a small random model most bytes are in its tables
    "passes.*.binarize.repair",  # steps
    "passes.*.binarize.count",  # of the few that a small model has
    "passes.*.quantize.rounding_steps",
    "passes.*.quantize.range_rows",
    "passes.*.replace_norms.steps",
    "passes.*.fuse_models.tune",
    *(f"passes.*.hash_attention.{option}" for option in ("anchors", "keep", "steps")),  # a small model has few tokens and blocks
)

SLOW = {
    "what-pays", "fewer-image-tokens", "int8-vision", "int8-weights-only", "nvidia-text-encoder", "image-features",
    "modernbert-skip", "portable-onnx", "dynamic-int8", "hard-attention", "drop-layers-then-int8", "max-drop", "gpt2-int8",
    "nested-text-encoder", "one-bit-text-encoder", "fused-image-tokens", "narrow-text-encoder", "fuse-language-model",
    "accuracy-driven", "int4-text-encoder", "ranges-by-gradients", "drop-attention", "sentence-embeddings", "linear-attention",
    "float16", "mixed-bits", "fused-hybrid", "mobile-hybrid", "cut-from-nested", "fuse-wide-and-narrow", "one-bit-digits",
    "no-norms", "nncf-text-encoder", "reconstructed-two-bits", "fewer-text-tokens", "language-model-int8",
    "image-classifier-channels", "power-of-two-text-encoder",
}  # fmt: skip
"""Recipes whose passes and files other recipes, or tests of their own, have too: they are only rehearsed each time."""


@dataclass(frozen=True)
class Case:
    """A recipe with a model for it.

    Attributes:
        family: of ``miniatures``, ``timm:name``, or empty where the recipe brings its model.
        changes: (text of the recipe, what takes its place).
        evaluate: whether the files are run; without, they are written and their integers read back.
        least_db, most_db: of every file against float.
        after: the recipe of which it needs a finished run.
        beside: (family, folder) of other models that it names.
    """

    recipe: str
    family: str
    changes: tuple[tuple[str, str], ...] = ()
    evaluate: bool = True
    least_db: float = 18
    most_db: float = 90
    after: str = ""
    beside: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.recipe}, {self.family}"


CASES = [
    # Padding alone goes: its rows are shorter than what is kept.
    Case("fewer-text-tokens", "bert", (("rows: 256", "rows: 64"),)),
    Case(
        "fewer-image-tokens",
        "timm:test_vit",
        (("timm:deit_tiny_patch16_224", "timm:test_vit"), ("rows: 256", "rows: 16"), ("rows: 1000", "rows: all")),
        evaluate=False,
    ),
    Case("fused-image-tokens", "vit", (("rows: 1000", "rows: all"),), least_db=3),
    Case("int8-text-encoder", "bert"),
    Case("nncf-text-encoder", "bert", (("rows: 128", "rows: 16"),)),
    Case("float16", "distilbert", (("rows: 128", "rows: 32"),), least_db=50),
    Case("dynamic-int8", "distilbert"),
    Case("int8-weights-only", "roberta", least_db=30),
    Case("smallest-text-encoder", "bert", evaluate=False),
    Case("sentence-embeddings", "minilm"),
    Case("modernbert-skip", "modernbert", (("tokens: 512", "tokens: 64"), ("rows: 500", "rows: all"))),
    Case("nvidia-text-encoder", "roberta"),
    Case("nvidia-fp8-text-encoder", "bert", least_db=20),
    Case("what-pays", "distilbert"),
    # Two of five random layers out: nothing of the output is left, as nobody expects.
    Case("drop-layers-then-int8", "bert of five layers", least_db=-10),
    Case("drop-attention", "bert of five layers", least_db=-10),
    Case("accuracy-driven", "bert of five layers", (("rows: 256", "rows: 64"), ("rows: 512", "rows: 64")), least_db=-10),
    Case("hard-attention", "bert of five layers", (("rows: 256", "rows: 64"), ("rows: 512", "rows: 64"))),
    # Attention of random layers is what codes are worst at: nothing is learnt in it.
    Case("linear-attention", "vit", (("keep: 2", "anchors: 8, steps: 2, keep: 1"), ("rows: 1000", "rows: all")), least_db=-10),
    # As far as few steps bring it.
    Case(
        "no-norms", "vit", (("rows: 20000", "rows: 64"), ("steps: 10000", "steps: 40"), ("rows: 1000", "rows: all")), least_db=0
    ),
    # Nothing in two random models is alike.
    Case(
        "fuse-wide-and-narrow",
        "vit",
        (("rows: 20000", "rows: 64"), ("tune: 2000", "tune: 4"), ("rows: 1000", "rows: all")),
        least_db=-10,
        beside=(("wide vit", "path/to/wide"),),
    ),
    # Random layers have no heads or neurons to spare.
    Case("narrow-text-encoder", "bert", least_db=0),
    # The same function: sums in another order.
    Case("nested-text-encoder", "bert", least_db=100, most_db=160),
    Case("cut-from-nested", "bert", least_db=0, after="nested-text-encoder"),
    Case("mixed-bits", "bert", (("size_ratio: 0.2}", "size_ratio: 0.27}"),), least_db=8),
    Case("reconstructed-two-bits", "bert", (("rows: 512", "rows: 64"), ("_steps: 200", "_steps: 20")), least_db=0),
    Case(
        "three-bit-text-encoder",
        "bert",
        (("rows: 512", "rows: 64"), ("batch_size: 16", "rounding_steps: 20\n      batch_size: 16")),
        least_db=5,
    ),
    Case("int4-text-encoder", "bert of 64 columns", (("rows: 400", "rows: 64"),), least_db=8),
    Case("power-of-two-text-encoder", "bert of 64 columns", (("rows: 400", "rows: 64"),), least_db=8),
    Case("ranges-by-gradients", "vit", (("rows: 1000", "rows: all"),)),
    Case("image-classifier-channels", "vit", (("rows: 1000", "rows: all"),)),
    Case("max-drop", "bert", (("rows: 256", "rows: 64"), ("rows: 512", "rows: 64"))),
    Case("int4-weights", "llama", (("rows: 256", "rows: 32"),), least_db=9),
    Case("gpt2-int8", "gpt2", least_db=30),
    # Of random gated layers eight bits leave less than of trained ones, and there are no massive activations.
    Case("language-model-int8", "llama", (("rows: 64", "rows: 16"),), least_db=9),
    # One of two random layers out.
    Case("fuse-language-model", "llama", (("rows: 256", "rows: 32"),), least_db=-10),
    Case(
        "int8-vision",
        "timm:test_vit3",
        (("timm:deit_tiny_patch16_224", "timm:test_vit3"), ("rows: 256", "rows: 16"), ("rows: 1000", "rows: all")),
        evaluate=False,
    ),
    Case("image-features", "dinov2", (("rows: 256", "rows: 32"),)),
    Case("image-tower-phone", "clip", (("rows: 256", "rows: 32"),)),
    Case("image-tower-phone", "siglip", (("rows: 256", "rows: 32"),), evaluate=False),
    Case("mobile-hybrid", "mobilevit", (("rows: 500", "rows: all"),), evaluate=False),
    Case("mobile-hybrid-int8", "mobilevit", (("rows: 256", "rows: 16"), ("rows: 1000", "rows: all"), ("_rows: 64", "_rows: 4"))),
    Case(
        "fused-hybrid", "timm:test_byobnet", (("timm:fastvit_t8", "timm:test_byobnet"), ("rows: 500", "rows: all")), least_db=20
    ),
    Case("portable-onnx", "vit", (("rows: 1000", "rows: all"),)),
    Case("own-model", "own"),
    # Signs of random weights, hardly trained.
    Case("one-bit-text-encoder", "bert", (("repair: 200", "repair: 20"), ("count: 24", "count: 8")), least_db=-3),
    Case("one-bit-digits", "", (("repair: 400", "repair: 20"),), evaluate=False),
]
ELSEWHERE = {"quickstart"}
"""Run by the test of the README's commands, and in ``tests/contract/test_apply.py``."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    save_rows(folder)
    return folder


@pytest.fixture(autouse=True)
def _the_files_alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The page and the cards have tests of their own; OpenVINO compiles every file anew, and runs the one that is meant for
    it."""
    monkeypatch.setattr("compress.page.write", lambda *_: None)
    monkeypatch.setattr("compress.cards.write", lambda *_: [])
    if "portable" not in request.node.name:
        monkeypatch.setattr(OnnxExporter, "wants_openvino", False)


def place(case: Case, rows: Path, folder: Path, *more: tuple[str, str]) -> Path:
    """A copy of the recipe with its model and its rows beside it."""
    (folder / "path/to").mkdir(parents=True)
    for source in [*rows.iterdir(), *(rows / "path/to").iterdir()]:
        if source.name != "path":
            (folder / source.relative_to(rows)).symlink_to(source)
    if case.family == "own":
        save_own_model(folder)
    elif case.family.startswith("timm:"):
        save_timm(case.family.removeprefix("timm:"), folder / "path/to/model.safetensors")
    elif case.family:
        save_hf(case.family, folder / "path/to/model")
    for family, name in case.beside:
        save_hf(family, folder / name)
    text = (recipes_folder() / f"{case.recipe}.yaml").read_text()
    for old, new in (*case.changes, *more):
        assert old in text, old
        text = text.replace(old, new)
    path = folder / f"{case.recipe}.yaml"
    path.write_text(text)
    return path


def values(text: str) -> Any:
    root = parse(text).root
    assert root is not None
    return root.data()


def leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if not isinstance(data, dict | list):
        yield ".".join(path), data
    for step, value in inner:
        yield from leaves(value, (*path, str(step)))


def changed(before: Any, after: Any) -> set[str]:
    """Places at which two recipes differ."""
    first, second = dict(leaves(before)), dict(leaves(after))
    return {path for path in first.keys() | second.keys() if first.get(path) != second.get(path)}


@pytest.mark.parametrize(
    "case", swept(CASES, [case for case in CASES if case.recipe not in SLOW and case.family != "siglip"]), ids=str
)
def test_it_runs_on_a_small_model_of_its_family(case: Case, rows: Path, tmp_path: Path) -> None:
    path = place(case, rows, tmp_path)
    if case.after:
        first = tmp_path / f"{case.after}.yaml"
        first.write_text((recipes_folder() / first.name).read_text())
        apply(read(first), tmp_path / "runs" / case.after, evaluate=False)
    recipe = read(path)
    made = apply(recipe, tmp_path / "out", trust=case.recipe == "own-model", evaluate=case.evaluate)
    judged = made.rows[1:] if case.evaluate else made.rows
    assert {row.format for row in judged} == {exporter.format for exporter in recipe.export}
    for row in judged:
        assert row.audit is not None
        assert row.audit.layers == row.audit.equal
        assert bool(row.audit.layers) == any(step.name in ("quantize", "binarize") for step in recipe.passes)
        assert (tmp_path / "out" / row.path).exists()
        if case.evaluate:
            assert row.validated in ("runtime", "interpreter", "proxy")
            assert row.sqnr_db is not None
            assert case.least_db < row.sqnr_db < case.most_db, "close to float, and not float"
            assert all(check.passed is not False for check in row.checks), row.checks
    if case.evaluate:
        contract_is_judged(path, made)
    if recipe.measure.when == "each_pass":
        assert len(made.steps) == 3
        assert all(step.worth for step in made.steps), "what each pass brought"


@pytest.mark.parametrize("case", [case for case in CASES if case.recipe in SLOW and not case.after], ids=str)
def test_every_pass_finds_its_places_and_every_format_carries_them(case: Case, rows: Path, tmp_path: Path) -> None:
    recipe = read(place(case, rows, tmp_path))
    source = model_of(recipe, trust=case.recipe == "own-model")
    data = load_data(recipe, source, evaluation=False)
    roles = {str(role): paths for role, paths in recipe.model.roles.items()}
    rehearsal = rehearse(recipe, source, find(source.model, source.signature, data.example, roles), data.example)
    check_exporters(recipe, Traceable(source.model, source.signature, data.example))
    assert len(rehearsal.steps) == len(recipe.passes)
    assert all(step.targets for step in rehearsal.steps)


def contract_is_judged(path: Path, made: Report) -> None:
    """Every line under ``accept`` is one that the verdict speaks of, for every file that it holds for."""
    accept = values(path.read_text())["accept"]
    told = {(limit.line, limit.artifact) for limit in made.limits}
    formats = {row.format for row in made.rows[1:]}
    for line, limit in accept.items():
        if isinstance(limit, dict):
            assert {(f"accept.{inner}", line) for inner in limit} <= told
        elif line != "unvalidated":
            assert {(f"accept.{line}", name) for name in formats} <= told
    failed = [limit.says for limit in made.limits if not limit.line.startswith("accept.")]
    assert not failed, "a small random model may be large and slow, but its files are sound"


def test_every_recipe_is_run_and_nothing_but_places_and_sizes_is_changed() -> None:
    assert {case.recipe for case in CASES} | ELSEWHERE == {one.name for one in shipped_recipes()}
    for case in CASES:
        text = (recipes_folder() / f"{case.recipe}.yaml").read_text()
        mine = text
        for old, new in case.changes:
            mine = mine.replace(old, new)
        for where in changed(values(text), values(mine)):
            assert any(fnmatch.fnmatch(where, pattern) for pattern in MAY_CHANGE), (case, where)


def test_what_may_be_changed_does_not_hide_a_pass() -> None:
    text = (recipes_folder() / "int8-text-encoder.yaml").read_text()
    for old, new in (("weights: 8", "weights: 4"), ("- onnx", "- coreml"), ("metric_drop: 0.005", "metric_drop: 0.5")):
        (where,) = changed(values(text), values(text.replace(old, new)))
        assert not any(fnmatch.fnmatch(where, pattern) for pattern in MAY_CHANGE)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("weights: 8", "wieghts: 8", "Did you mean weights?"),
        ("activations: static", "activations: statik", "Did you mean static?"),
        ("static, embeddings: 8", "static, sites: [attention.qurey]", "attention.query"),
        ("- onnx", "- onxx", "Did you mean onnx?"),
        ("text: sentence", "text: phrase", "sentence"),
        ("metric_drop", "metric_dorp", "Did you mean metric_drop?"),
    ],
)
def test_a_recipe_that_names_what_does_not_exist_fails_here(old: str, new: str, says: str, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        apply(read(place(CASES[0], rows, tmp_path, (old, new))), tmp_path / "out", evaluate=False)
    assert says in str(refused.value)
    assert re.match(r"\S+\.(yaml|tsv):\d+", str(refused.value)), "the place of the mistake"
    assert not (tmp_path / "out" / "report.json").exists()


def test_no_recipe_is_a_near_duplicate() -> None:
    """What a recipe does, without its data's names and its limits, is different from that of every other."""
    seen: dict[str, str] = {}
    for one in shipped_recipes():
        said = values(one.path.read_text())
        model = said["model"] if isinstance(said["model"], dict) else {}
        known = (said["data"]["format"], model.get("task"), said["passes"], said["export"], said.get("measure"))
        assert seen.setdefault(repr(known), one.name) == one.name
