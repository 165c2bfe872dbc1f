"""That a model fused with itself in another order is itself, at any width; that shares are kept; and what is refused."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusing import doubled, parts, permuted, stored
from pydantic import ValidationError
from sweeps import swept
from torch import nn
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.algorithms.transport import Solver, averaged, head_plans, spread
from compress.anatomy import Anatomy, find
from compress.distillation.progressive import Road
from compress.distillation.training import OUTPUT
from compress.fusion.others import parameters_of
from compress.fusion.tuning import tune
from compress.identity import differences, identity
from compress.passes.contract import Context, Given
from compress.passes.fuse_models import FuseModels
from compress.passes.quantize import Quantize
from compress.recipe import parse_recipe, read
from compress.surgery import Surgery

pytest.importorskip("ot", reason="needs the extra fusion")


def disturbed() -> nn.Module:
    """The digits model in another order, its weights moved a little."""
    model, signature, rows = digits()
    other = permuted(model, parts(model, signature, rows)[1])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for one in other.parameters():
            one.add_(torch.randn(one.shape, generator=generator) * 0.02 * one.std())
    return other


_KEPT = tempfile.TemporaryDirectory()
_OTHER = stored(disturbed(), Path(_KEPT.name) / "other.safetensors")
EXAMPLE = FuseModels(others=_OTHER, samples=48)
METRICS = ["activations", "weights"]
FAMILIES = ["digits", "vit", "timm_vit", "bert", "bert_mlm", "distilbert", "modernbert", "gpt2"]
OFTEN = [("digits", "activations"), ("vit", "weights"), ("bert", "activations"), ("modernbert", "activations")]
WIDE = [("ViT", True, "activations"), ("ViT", False, "weights"), ("Bert", False, "activations")]
RESIDUALS = ["shared", "mean", "weighted_scalar", "weighted_matrix", "only_residual", "only_branch"]
Subject = tuple[nn.Module, Signature, list[Batch]]


_FOUND: list[tuple[Any, Anatomy]] = []


@pytest.fixture(autouse=True)
def _found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding the parts takes most of the time of a fusion of small models: those of one architecture have the same."""

    def known(model: nn.Module, signature: Signature, example: Batch, roles: Any = None) -> Anatomy:
        shapes = tuple((name, tuple(one.shape)) for name, one in model.named_parameters())
        key = shapes, signature, getattr(getattr(model, "config", None), "num_attention_heads", None)
        if not any(key == one for one, _ in _FOUND):
            _FOUND.append((key, find(model, signature, example, roles or {})))
        return next(anatomy for one, anatomy in _FOUND if one == key)

    for module in ("trial", "fusing", "compress.fusion.others"):
        monkeypatch.setattr(f"{module}.find", known)


def family(name: str) -> Subject:
    if name == "digits":
        return digits()
    from families import build

    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    return model, signature, [example]


def randomize(model: nn.Module, seed: int = 0) -> None:
    from families import randomize

    randomize(model, seed)


def fused(subject: Subject, folder: Path, *others: nn.Module, **options: Any) -> Trial:
    files = [stored(other, folder / f"{number}.safetensors") for number, other in enumerate(others)]
    return tried(FuseModels(others=tuple(files), **options), *subject)


def furthest(model: nn.Module, other: nn.Module) -> float:
    """Largest difference of any parameter, over the parameter's size."""
    pairs = zip(parameters_of(model).values(), parameters_of(other).values(), strict=True)
    return max(float((one - two).abs().max() / two.abs().max().clamp(min=1e-9)) for one, two in pairs)


@pytest.mark.parametrize(("name", "metric"), swept(itertools.product(FAMILIES, METRICS), OFTEN))
def test_a_model_and_itself_in_another_order_are_the_model(name: str, metric: str, tmp_path: Path) -> None:
    subject = family(name)
    other = permuted(subject[0], parts(*subject)[1])
    assert furthest(other, subject[0]) > 0.5, "the order does change"
    done = fused(subject, tmp_path, other, metric=metric)
    assert sqnr_db(done.outputs(done.before), done.outputs(other)) > 90, "the function does not"
    assert furthest(done.after, done.before) < 1e-6
    assert done.context.report["models"][0]["distance_matched"] < 1e-6 < done.context.report["models"][0]["distance_as_given"]
    plain = fused(subject, tmp_path, other, transport="none")
    assert plain.sqnr_db < 15, "the average without matching is another function"
    assert torch.equal(done.outputs(rebuilt(done)), done.outputs(done.after))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_way_of_joining_plans_gives_a_permuted_copy_back(residual: str, tmp_path: Path) -> None:
    subject = family("vit")
    other = permuted(subject[0], parts(*subject)[1])
    assert furthest(fused(subject, tmp_path, other, residual=residual).after, subject[0]) < 1e-6


def test_plans_are_not_joined_where_branches_are_scaled(tmp_path: Path) -> None:
    """A vector of LayerScale belongs to its branch, not to the stream behind the join."""
    model, signature, rows = family("dinov2")
    anatomy, layout = parts(model, signature, rows)
    assert len(layout.scales) == 2 * len(anatomy.blocks)
    assert not parts(*family("vit"))[1].scales, "another model of plain blocks has none"
    step = FuseModels(others=stored(model, tmp_path / "other.safetensors"))
    step.targets(model, anatomy)
    for residual in RESIDUALS[1:]:
        with pytest.raises(UserError, match="layer_scale1, which scales a branch"):
            step.model_copy(update={"residual": residual}).targets(model, anatomy)


@pytest.mark.parametrize("name", swept(["vit", "bert"], ["bert"]))
def test_alpha_one_is_the_model_and_alpha_zero_the_other_in_its_order(name: str, tmp_path: Path) -> None:
    """With exact transport and one plan for the stream, whatever the other is."""
    subject = family(name)
    other = copy.deepcopy(subject[0])
    randomize(other, seed=3)
    wanted = Trial(other, other, subject[1], parts(*subject)[0], Context(*[None] * 4), subject[2]).outputs(other)  # type: ignore[arg-type]
    kept = fused(subject, tmp_path, other, alpha=1)
    assert all(torch.equal(a, b) for a, b in zip(kept.after.parameters(), kept.before.parameters(), strict=True))
    for metric in ("activations", "weights"):
        moved = fused(subject, tmp_path, other, alpha=0, metric=metric)
        assert sqnr_db(wanted, moved.outputs(moved.after)) > 90
        assert furthest(moved.after, other) > 0.5, "in another order than it came in"
    joined = fused(subject, tmp_path, other, alpha=0, residual="mean")
    assert sqnr_db(wanted, joined.outputs(joined.after)) < 20, "plans that differ along the stream do not keep it"


def test_shares_are_those_that_were_asked_for(tmp_path: Path) -> None:
    """Everywhere: norms, embeddings, classifier too. The parts at alpha 0 and 1 mixed by hand are the fused model."""
    subject = family("vit")
    other = copy.deepcopy(subject[0])
    randomize(other, seed=3)
    ends = [parameters_of(fused(subject, tmp_path, other, alpha=alpha).after) for alpha in (0, 1)]
    mixed = parameters_of(fused(subject, tmp_path, other, alpha=0.3).after)
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.7 * ends[0][name] + 0.3 * ends[1][name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, ends[1][name])


def test_a_model_fused_with_itself_and_with_several_is_itself(tmp_path: Path) -> None:
    subject = family("bert")
    layout = parts(*subject)[1]
    assert furthest(fused(subject, tmp_path, subject[0]).after, subject[0]) < 1e-6
    done = fused(subject, tmp_path, *(permuted(subject[0], layout, seed) for seed in (1, 2, 3)))
    assert done.context.report["shares"] == [0.25] * 4
    assert furthest(done.after, subject[0]) < 1e-6


@pytest.mark.parametrize("transport", ["emd", "sinkhorn"])
@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (24, 12), (12, 24), (18, 12)])
def test_masses_are_uniform_at_any_width(transport: Any, rows: int, columns: int) -> None:
    plan = Solver(transport).plan(torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)))
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(plan.sum(1) * rows, one.expand(rows), rtol=0, atol=1e-6)
    torch.testing.assert_close(plan.sum(0) * columns, one.expand(columns), rtol=0, atol=1e-6)
    torch.testing.assert_close(averaged(plan).sum(0), one.expand(columns), rtol=0, atol=1e-9)
    torch.testing.assert_close(spread(plan).sum(1), one.expand(rows), rtol=0, atol=1e-9)
    ratio = (spread(plan).sum(0) * columns / rows).mean()
    assert float(ratio) == pytest.approx(1, abs=1e-6)
    assert transport == "sinkhorn" or int((plan > 0).sum()) < rows + columns, "a vertex of the polytope"


def test_plans_keep_heads_together() -> None:
    """Units that would rather go to another head than the one that theirs is matched with stay inside."""
    generator = torch.Generator().manual_seed(0)
    costs = tuple(torch.rand(12, 12, generator=generator) for _ in range(2))
    for plan in head_plans(costs, (3, 3), Solver()):
        blocks = (plan.reshape(3, 4, 3, 4).sum((1, 3)) > 1e-12).double()
        assert blocks.sum(0).tolist() == blocks.sum(1).tolist() == [1, 1, 1]
    crossing = Solver().plan(costs[0]).reshape(3, 4, 3, 4).sum((1, 3)) > 1e-12
    assert int(crossing.sum()) > 3, "a plan that does not know of heads crosses them"
    first, second = (plan.reshape(3, 4, 3, 4).sum((1, 3)) > 1e-12 for plan in head_plans(costs, (3, 3), Solver()))
    assert torch.equal(first, second), "one assignment for queries, keys and values"


@pytest.mark.parametrize(("name", "heads", "metric"), swept(itertools.product(["ViT", "Bert"], [True, False], METRICS), WIDE))
def test_a_model_twice_as_wide_with_every_unit_twice_is_the_narrow_one(
    name: str, heads: bool, metric: str, tmp_path: Path
) -> None:
    anchor, wide = saved(name, tmp_path / "narrow"), saved(name, tmp_path / "wide", wide=True, heads=4 if heads else 2)
    narrow, signature, example = opened(anchor)
    model, *_ = opened(wide)
    subject = narrow, signature, [example]
    layouts = parts(*subject)[1], parts(model, signature, [example])[1]
    doubled(narrow, model, layouts, heads)
    model = permuted(model, layouts[1])
    trial = Trial(narrow, model, signature, parts(*subject)[0], Context(*[None] * 4), [example])  # type: ignore[arg-type]
    assert trial.sqnr_db > 90, "the wide one computes the same"
    model.save_pretrained(wide)
    for alpha in (0, 0.5):
        done = tried(FuseModels(others=f"hf:{wide}", alpha=alpha, metric=metric), *subject)
        assert furthest(done.after, narrow) < 1e-5
    soft = tried(FuseModels(others=f"hf:{wide}", alpha=0, transport="sinkhorn", regularization=1.0), *subject)
    assert soft.sqnr_db < 20, "units that are blurred give it up"


def test_a_narrow_model_can_be_fused_into_a_wide_one(tmp_path: Path) -> None:
    anchor, other = saved("ViT", tmp_path / "wide", wide=True), saved("ViT", tmp_path / "narrow")
    model, signature, example = opened(anchor)
    for alpha in (0, 0.5):
        done = tried(FuseModels(others=f"hf:{other}", alpha=alpha), model, signature, [example])
        assert bool(done.outputs(done.after).isfinite().all())
        assert not torch.equal(done.outputs(done.after), done.outputs(done.before))


def saved(name: str, folder: Path, wide: bool = False, heads: int = 2, **changes: Any) -> Path:
    """A small model of transformers in a folder."""
    import transformers

    size = 32 if wide else 16
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_attention_heads": heads, "num_hidden_layers": 2}
    extra = {"image_size": 16, "patch_size": 8} if name == "ViT" else {"vocab_size": 60, "max_position_embeddings": 32}
    kind = "ForImageClassification" if name == "ViT" else "ForSequenceClassification"
    config = getattr(transformers, f"{name}Config")(**{**sizes, **extra, **changes})
    model = getattr(transformers, name + kind)(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> tuple[nn.Module, Signature, Batch]:
    from compress.sources import load_model

    source = load_model(f"hf:{folder}", base=Path())
    return source.model, source.signature, source.example()


def refused(step: FuseModels, *subject: Any) -> str:
    """What is said; before anything runs and as it runs the same."""
    model, signature, rows = subject
    anatomy, _ = parts(model, signature, rows)
    with pytest.raises(UserError) as early:
        step.targets(model, anatomy)
    assert early.value.hint
    with pytest.raises(UserError) as late:
        tried(step, model, signature, rows)
    assert str(late.value) == str(early.value)
    return str(early.value)


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "depth": ("ViT", {"num_hidden_layers": 3}, "has 3 entries in its lists of layers, the recipe's model 2"),
    "classes": ("ViT", {"num_labels": 5}, "classifier.weight has 5 classes, the recipe's model 2"),
    "picture": ("ViT", {"image_size": 32}, "takes pixel_values [batch, 3, 32, 32]; the recipe's model"),
    "patch": ("ViT", {"patch_size": 4}, "has 17 tokens, the recipe's model 5"),
    "vocabulary": ("Bert", {"vocab_size": 70}, "word_embeddings.weight has 70 entries (words, positions), the recipe's model 60"),
    "positions": ("Bert", {"max_position_embeddings": 40}, "position_embeddings.weight has 40 entries"),
    "architecture": ("Bert", {"add_cross_attention": True, "is_decoder": True}, "architecture"),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_models_that_cannot_be_matched_are_refused(case: str, tmp_path: Path) -> None:
    name, changes, says = CHANGES[case]
    model, signature, example = opened(saved(name, tmp_path / "anchor"))
    other = saved(name, tmp_path / "other", **changes)
    assert says in refused(FuseModels(others=f"hf:{other}"), model, signature, [example])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("change", [{}, {"heads": 4}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}])
def test_models_that_compute_differently_with_the_same_weights_are_refused(
    change: dict[str, Any], wide: bool, tmp_path: Path
) -> None:
    model, signature, example = opened(saved("ViT", tmp_path / "anchor"))
    step = FuseModels(others=f"hf:{saved('ViT', tmp_path / 'other', wide=wide, **change)}")
    anatomy = parts(model, signature, [example])[0]
    if not change or "heads" in change:
        step.targets(model, anatomy)
        return
    with pytest.raises(UserError, match=f"has {next(iter(change))}" if wide else "computes something else") as refusal:
        step.targets(model, anatomy)
    assert refusal.value.hint


def test_a_buffer_of_another_value_is_refused(tmp_path: Path) -> None:
    """The anchor's buffers stay in the fused model."""
    model, signature, rows = digits()
    model.register_buffer("scale", torch.tensor(2.0))
    model.register_forward_hook(lambda module, inputs, output: output * module.scale)
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    anatomy = parts(model, signature, rows)[0]
    from safetensors.torch import save_file

    for scale in (2.0, 3.0):
        save_file({**weights, "scale": torch.tensor(scale)}, tmp_path / f"{scale}.safetensors")
    FuseModels(others=f"{tmp_path}/2.0.safetensors").targets(model, anatomy)
    with pytest.raises(UserError, match="computes something else"):
        FuseModels(others=f"{tmp_path}/3.0.safetensors").targets(model, anatomy)


@pytest.mark.parametrize(
    ("name", "says"),
    [("llama", "4 heads of queries share 2"), ("swin", "changes its width"), ("albert", "projected"), ("beit", "another order")],
)
def test_families_whose_units_cannot_be_matched_are_refused(name: str, says: str, tmp_path: Path) -> None:
    model, signature, rows = family(name)
    step = FuseModels(others=stored(model, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=says):
        step.targets(model, find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()}))


def test_names_of_classes_and_pixels_have_to_agree(tmp_path: Path) -> None:
    labels = {0: "cat", 1: "dog"}
    anchor, other = saved("ViT", tmp_path / "a", id2label=labels), saved("ViT", tmp_path / "b", id2label={0: "dog", 1: "cat"})
    model, signature, example = opened(anchor)
    step = FuseModels(others=f"hf:{other}")
    step.targets(model, parts(model, signature, [example])[0])  # nothing is known of the recipe's model
    step._given = Given(labels=labels)
    assert "class 0 is 'dog', of the recipe's model 'cat'" in refused(step, model, signature, [example])
    step._given = Given(preprocessing={"mean": [0.0] * 3, "std": [1.0] * 3, "scale": 1 / 255})
    assert "reads pixels in another way: mean" in refused(step, model, signature, [example])


def test_wrong_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = digits()
    (tmp_path / "mine.py").write_text("def make():\n    raise SystemExit('ran')\n")
    assert "needs leave" in refused(FuseModels(others=f"{tmp_path}/mine.py:make"), *subject)
    assert refused(FuseModels(others="missing"), *subject).startswith("with: 'missing' names no source")
    assert "there is no such file" in refused(FuseModels(others=f"{tmp_path}/no.safetensors"), *subject)
    weights = {name: one.clone() for name, one in subject[0].state_dict().items()}
    from safetensors.torch import save_file

    for change, says in (({"more": torch.ones(1)}, "has the weight more"), ({"head.bias": torch.ones(3)}, r"head.bias is [3]")):
        save_file({**weights, **change}, tmp_path / "wrong.safetensors")
        assert says in refused(FuseModels(others=f"{tmp_path}/wrong.safetensors"), *subject)
    save_file({name: one for name, one in weights.items() if name != "pos_embed"}, tmp_path / "wrong.safetensors")
    assert "lacks the weight pos_embed" in refused(FuseModels(others=f"{tmp_path}/wrong.safetensors"), *subject)
    save_file({**weights, "head.bias": torch.full((10,), float("nan"))}, tmp_path / "wrong.safetensors")
    assert "NaN" in refused(FuseModels(others=f"{tmp_path}/wrong.safetensors"), *subject)
    quantized = tried(Quantize(activations="none"), *subject).after
    with pytest.raises(UserError, match="it is quantized"):
        tried(EXAMPLE, quantized, *subject[1:])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "ot" else find_spec(name, *rest))
    assert "pip install 'transformer-compress[fusion]'" in refused(EXAMPLE, *subject)
    tried(FuseModels(others=_OTHER, transport="none"), *subject)  # needs no transport


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    for options, says in (
        ({"others": ()}, "with names no model"),
        ({"others": "a", "metric": "weights", "residual": "weighted_matrix"}, "weighs activations"),
        ({"others": "a", "alpha": 1.5}, "less than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=says):
            FuseModels.model_validate(options)
    model, signature, example = opened(saved("ViT", tmp_path / "anchor"))
    other = saved("ViT", tmp_path / "other", wide=True)
    assert "of another width" in refused(FuseModels(others=f"hf:{other}", transport="none"), model, signature, [example])


@pytest.mark.parametrize(
    ("option", "without", "with_"),
    [
        ({"samples": 48}, {"metric": "weights"}, {}),
        ({"samples": 48}, {"transport": "none"}, {"transport": "sinkhorn"}),
        ({"metric": "weights"}, {"transport": "none"}, {}),
        ({"residual": "mean"}, {"transport": "none"}, {}),
        ({"regularization": 0.1}, {}, {"transport": "sinkhorn"}),
        ({"regularization": 0.1}, {"transport": "none"}, {"transport": "sinkhorn"}),
        ({"tune_rows": 16}, {}, {"tune": 1}),
        ({"tune_rate": 1e-3}, {}, {"tune": 1}),
    ],
)
def test_options_that_say_nothing_are_refused(option: dict[str, Any], without: dict[str, Any], with_: dict[str, Any]) -> None:
    FuseModels(others="a", **option, **with_)
    FuseModels(others="a", **without)
    with pytest.raises(ValidationError, match=f"{next(iter(option))} says nothing with.*\nLeave it out"):
        FuseModels(others="a", **option, **without)


def test_without_calibration_rows_nothing_is_compared() -> None:
    model, signature, rows = digits()
    anatomy, _ = parts(model, signature, rows)
    with pytest.raises(UserError, match="there are no rows"):
        EXAMPLE.run(model, Context(signature, anatomy, lambda: iter([]), Surgery()))
    by_weights = FuseModels(others=_OTHER, metric="weights")
    assert not by_weights.calibrates
    by_weights.run(model, Context(signature, anatomy, lambda: iter([]), Surgery()))


def test_padded_positions_do_not_count(tmp_path: Path) -> None:
    """The same plans whatever stands in positions that the mask takes out."""
    model, signature, rows = family("bert")
    other = copy.deepcopy(model)
    randomize(other, seed=3)
    mask = rows[0]["attention_mask"]
    filled = {**rows[0], "input_ids": torch.where(mask == 0, 7, rows[0]["input_ids"])}
    done = [tried(FuseModels(others=stored(other, tmp_path / "o.safetensors")), model, signature, [r]) for r in (rows[0], filled)]
    assert all(torch.equal(a, b) for a, b in zip(*(one.after.parameters() for one in done), strict=True))


def test_training_brings_it_nearer_to_its_parents_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.fusion.tuning.Road", functools.partial(Road, keep=4))
    step = FuseModels(others=_OTHER, tune=24, tune_rows=16, tune_rate=1e-3, transport="none")
    model, signature, rows = digits()
    found = []
    for cut in (None, 13):
        folder = tmp_path / str(cut)
        if cut is not None:
            with pytest.raises(InterruptedError):
                step.run(copy.deepcopy(model), context(model, signature, rows, folder, cut))
        told = context(model, signature, rows, folder, None)
        after = step.run(copy.deepcopy(model), told)
        found.append((after.state_dict(), told.report["training"]))
    (whole, first), (again, second) = found
    assert first["loss"] < 0.5 * first["loss_start"]
    assert (first["resumed_at"], second["resumed_at"]) == (0, 12)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("kind", ["classes", "one number", "several labels"])
def test_only_scores_of_classes_are_averaged_as_probabilities(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, signature, rows = digits()
    if kind == "one number":  # its softmax is 1 whatever it is
        model.head = nn.Linear(model.head.in_features, 1)
    if kind == "several labels":
        model.config = SimpleNamespace(problem_type="multi_label_classification")
    other, lessons = copy.deepcopy(model), []
    with torch.no_grad():
        other.head.weight.mul_(-2)
    monkeypatch.setattr("compress.fusion.tuning.travel", lambda model, call, lesson, *rest: lessons.append(lesson))
    tune(model, [model, other], [0.5, 0.5], context(model, signature, rows, Path(), None), 1, 16, 1e-3)
    (lesson,) = lessons
    given = [signature.call(one, lesson.held[0]).detach() for one in (model, other)]
    assert (lesson.output == "logits") == (kind == "classes")
    plain, mixed = torch.stack(given).mean(0), torch.stack(given).softmax(-1).mean(0).log()
    wanted = lesson.wanted[1][0][OUTPUT].tensor.float()
    assert (sqnr_db(plain, wanted) > 60) == (kind != "classes")
    assert (sqnr_db(mixed, wanted) > 60) == (kind == "classes")


def context(model: nn.Module, signature: Signature, rows: list[Batch], folder: Path, cut: int | None) -> Context:
    def progress(step: int, total: int, what: str) -> None:
        if cut is not None and what == "steps of training" and step >= cut:
            raise InterruptedError

    return Context(
        signature, parts(model, signature, rows)[0], lambda: iter(rows), Surgery(), seed=3, progress=progress, scratch=folder
    )


def test_a_run_holds_all_it_needs_and_is_another_run_with_another_model(tmp_path: Path) -> None:
    import compress
    from compress.recipe import read
    from compress.run import apply

    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    other, path, out = tmp_path / "other.safetensors", tmp_path / "recipe.yaml", tmp_path / "out"
    shutil.copy(_OTHER, other)
    path.write_text(
        "model: embedded:digits-vit\n"
        "data: {format: embedded, calibration: {rows: 48}, evaluation: {rows: 0-15}}\n"
        "passes: [fuse_models: {with: other.safetensors}]\nexport: [onnx]\n"
    )
    weights = []
    for _ in range(2):
        told = apply(read(path), out, evaluate=False)
        assert told.steps[0].report["models"][0]["from"] == "other.safetensors"
        weights.append((out / "model.safetensors").read_bytes())
        stored(permuted(digits()[0], parts(*digits())[1], 5), other)
    assert weights[0] != weights[1]
    other.unlink()
    model, signature, rows = digits()
    loaded = compress.load(out)
    with torch.inference_mode():
        level = sqnr_db(signature.call(model, rows[0]), signature.call(loaded, rows[0]))
    assert level > 90, "a permuted copy fused is the model"


def test_weights_that_no_file_of_the_recipe_holds_are_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the user's reads them from wherever it likes."""
    model, signature, rows = digits()
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(_OTHER, tmp_path / "hidden.safetensors")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom safetensors.torch import load_file\nfrom compress.embedded import digits_model\n"
        "def make():\n    model = digits_model()\n"
        f"    model.load_state_dict(load_file('{tmp_path}/hidden.safetensors'), strict=False)\n"
        "    return model, torch.zeros(2, 1, 8, 8)\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "model: embedded:digits-vit\ndata: {format: embedded, calibration: {rows: 48}, evaluation: {rows: 0-15}}\n"
        "passes: [fuse_models: {with: ~/mine.py:make, transport: none}]\nexport: [onnx]\n"
    )
    recipe = read(tmp_path / "recipe.yaml")
    (step,) = recipe.passes
    rows_of = SimpleNamespace(calibration=SimpleNamespace(fingerprint="rows"), validation=None, evaluation=None)
    step._given = Given(trust=True)
    assert step.reads == [tmp_path / "mine.py"]
    assert FuseModels(others="~/hidden.safetensors").reads == [tmp_path / "hidden.safetensors"]
    anatomy, layout = parts(model, signature, rows)
    found = []
    for seed in (None, None, 5):
        if seed is not None:
            stored(permuted(model, layout, seed), tmp_path / "hidden.safetensors")
        step.targets(model, anatomy)
        found.append(identity(recipe, SimpleNamespace(fingerprint="model"), rows_of, tmp_path, evaluate=False))  # type: ignore[arg-type]
    assert differences(found[0], found[1]) == []
    assert differences(found[0], found[2]) == ["the other models"]


def test_distances_are_told_of_what_they_are(tmp_path: Path) -> None:
    done = fused(digits(), tmp_path, disturbed())
    told = done.context.report["models"][0]
    assert 0.005 < told["distance_matched"] < 0.04, "two per cent of noise"
    assert told["distance_as_given"] > 1
    assert done.context.report["rows"] == 48
    assert done.sqnr_db > 20


def test_recipes_name_the_other_model_as_the_schema_does() -> None:
    text = "model: embedded:digits-vit\ndata: {format: embedded}\npasses:\n  - fuse_models: {KEY: hf:x}\nexport: [onnx]\n"
    (step,) = parse_recipe(text.replace("KEY", "with")).passes
    assert isinstance(step, FuseModels)
    assert step.others == "hf:x"
    with pytest.raises(UserError, match="with is missing"):
        parse_recipe(text.replace("KEY", "others"))
