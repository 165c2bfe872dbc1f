"""Norms that are trained away: what RepBN is at its limits, what takes its factors, what training brings, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trial import DIGITS, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.distillation.progressive import Road, travel, varied
from compress.distillation.training import LiveLesson
from compress.layers import ChannelAffine, FadedActivation, LinearAttention
from compress.norms.first_blocks import first_blocks
from compress.norms.joining import join, joinable
from compress.norms.rep_norm import Moments, RepNorm
from compress.norms.replacing import NormExchange, own_parameters
from compress.passes.contract import Context
from compress.passes.quantize import Quantize
from compress.passes.replace_norms import ReplaceNorms
from compress.rehearsal import stand_in
from compress.surgery import Surgery

EXAMPLE = ReplaceNorms(steps=16, rows=16, rate=1e-3)

CHANNELS = 12


def rep_norm(norm: nn.Module | None = None) -> tuple[RepNorm, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, CHANNELS, generator=generator) * torch.linspace(0.5, 3, CHANNELS) + torch.linspace(-2, 2, CHANNELS)
    made = RepNorm(norm or nn.LayerNorm(CHANNELS), CHANNELS)
    with torch.no_grad():
        for parameter in (made.gamma, made.beta, made.alpha):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made, x


def test_the_share_leads_from_the_norm_to_rep_bn() -> None:
    """SLAB, eq. 3: lambda 1 is the norm, lambda 0 is RepBN, and between them it is linear in lambda."""
    made, x = rep_norm()
    made.learning = True
    given = {}
    for share in (1.0, 0.5, 0.0):
        made.share = share
        given[share] = made(x)
    assert torch.equal(given[1.0], made.norm(x))
    flat = x.reshape(-1, CHANNELS)
    scaled = (x - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    assert sqnr_db(scaled * made.gamma + made.beta + made.alpha * x, given[0.0]) > 110
    assert sqnr_db((given[1.0] + given[0.0]) / 2, given[0.5]) > 110


def test_what_files_hold_is_rep_bn_with_settled_statistics() -> None:
    """Merged, eq. 5: gamma / sqrt(var + eps) + alpha and beta - gamma mean / sqrt(var + eps)."""
    made, x = rep_norm()
    made.share, made.learning = 0.0, True
    made.collect()
    batch = made(x)
    made.settle()
    made.learning = False
    assert sqnr_db(batch, made(x)) > 100
    factor, constant = made.affine()
    assert sqnr_db(made(x), x * factor + constant) > 110


def test_gamma_the_deviation_and_beta_the_mean_are_the_identity() -> None:
    made, x = rep_norm()
    flat = x.reshape(-1, CHANNELS)
    with torch.no_grad():
        made.mean.copy_(flat.mean(0))
        made.variance.copy_(flat.var(0, unbiased=False))
        made.gamma.copy_((made.variance + 1e-5).sqrt())
        made.beta.copy_(made.mean)
        made.alpha.zero_()
    assert sqnr_db(x, made(x)) > 110


def test_with_fixed_statistics_training_sees_what_files_hold() -> None:
    made, x = rep_norm()
    made.share, given = 0.0, made(x)
    made.learning = made.fixed = True
    assert torch.equal(given, made(x))
    made.fixed = False
    assert sqnr_db(given, made(x)) < 30, "the statistics of a batch are others"


def test_it_begins_as_the_affine_function_nearest_to_the_norm() -> None:
    made, x = rep_norm()
    moments = Moments(CHANNELS)
    with torch.no_grad():
        for part in x:
            moments.add(part, made.norm(part))
        made.fit(moments)
        wanted = made.norm(x)
        least = (made(x) - wanted).square().sum((0, 1))
        for name, step in (("gamma", 0.01), ("gamma", -0.01), ("beta", 0.01), ("beta", -0.01)):
            other = copy.deepcopy(made)
            getattr(other, name).add_(step)
            assert bool(((other(x) - wanted).square().sum((0, 1)) > least).all()), f"{name} {step}"


def test_all_norms_of_the_digits_go_and_training_is_what_keeps_the_outputs() -> None:
    model, signature, rows = digits()
    few, many = (tried(ReplaceNorms(steps=steps, rows=16, rate=1e-3), model, signature, rows) for steps in (1, 40))
    report = many.context.report
    assert set(report["norms"]) == {path for path, one in model.named_modules() if isinstance(one, nn.LayerNorm)}
    assert all(one["merged_into"] for one in report["norms"].values())
    assert not any(isinstance(one, nn.LayerNorm | RepNorm) for one in many.after.modules())
    assert not any(isinstance(one, ChannelAffine) for one in many.after.modules())
    assert report["training"]["loss"] < 0.8 * report["training"]["loss_start"]
    assert many.sqnr_db > few.sqnr_db + 2
    assert all(torch.equal(one, digits()[0].state_dict()[name]) for name, one in model.state_dict().items()), (
        "the float model stays"
    )


def linear_attention(tokens: int, masked: bool) -> tuple[LinearAttention, list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    made = LinearAttention(8, 6, (3, 4), tokens - 12)
    assert made.kernel is not None
    with torch.no_grad():
        made.kernel.normal_(generator=generator)
    inputs = [torch.randn(2, 3, tokens, width, generator=generator) + 0.5 for width in (8, 8, 6)]
    mask = torch.arange(tokens).expand(2, 1, tokens, tokens) < tokens - 2 if masked else None
    return made, inputs, mask


@pytest.mark.parametrize("masked", [False, True])
def test_linear_attention_is_the_same_in_both_orders_and_rows_of_weights_sum_to_one(masked: bool) -> None:
    """SLAB, sec. 3.2: (q k^T) v = q (k^T v); the oracle writes the matrix of weights out."""
    made, (query, key, value), mask = linear_attention(14, masked)
    given = {}
    for order in ("keys first", "queries first"):
        made.order = order  # type: ignore[assignment]
        given[order] = made(query, key, value, mask)
    assert sqnr_db(*given.values()) > 100
    weights = query.relu() @ key.relu().transpose(-1, -2)
    if mask is not None:
        weights = weights * mask
    weights = weights / weights.sum(-1, keepdim=True)
    assert bool((weights.sum(-1) - 1).abs().max() < 1e-5)
    assert made.kernel is not None
    patches = value[:, :, 2:].transpose(-1, -2).reshape(6, 6, 3, 4)
    near = nn.functional.conv2d(patches, made.kernel, padding=2, groups=6).reshape(2, 3, 6, 12).transpose(-1, -2)
    wanted = weights @ value + torch.cat([torch.zeros(2, 3, 2, 6), near], 2)
    assert sqnr_db(wanted, given["keys first"]) > 90


def test_softmax_attention_fades_into_linear_attention() -> None:
    made, inputs, _ = linear_attention(14, masked=False)
    made.learning = True
    given = {}
    for share in (1.0, 0.25, 0.0):
        made.share = share
        given[share] = made.redirect(nn.functional.scaled_dot_product_attention, tuple(inputs), {})
    assert torch.equal(given[1.0], nn.functional.scaled_dot_product_attention(*inputs))
    assert sqnr_db(0.25 * given[1.0] + 0.75 * given[0.0], given[0.25]) > 110
    made.learning = False
    assert torch.equal(given[0.0], made.redirect(nn.functional.scaled_dot_product_attention, tuple(inputs), {}))


def test_attention_is_exchanged_in_step_with_the_norms(tmp_path: Path) -> None:
    import onnx

    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    model, signature, rows = digits()
    done = tried(ReplaceNorms(steps=20, rows=16, rate=1e-3, attention="linear"), model, signature, rows)
    assert done.context.report["attentions"] == [f"blocks.{number}" for number in range(4)]
    training = done.context.report["training"]
    assert training["loss"] < training["loss_start"]
    kernels = [one for name, one in done.after.named_parameters() if name.endswith("linear_attention.kernel")]
    assert len(kernels) == 4
    assert all(float(one.abs().max()) > 0 for one in kernels), "the convolution learns too"
    again = rebuilt(done)
    assert torch.equal(done.outputs(done.after), done.outputs(again))
    OnnxExporter().write(Traceable(done.after, signature, rows[0]), tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Softmax" not in kinds
    assert "LayerNormalization" not in kinds


def test_a_faded_activation_makes_one_layer_of_two() -> None:
    """VanillaNet: W2 W1 and W2 b1 + b2, to rounding; with the activation still there it is another function."""
    model, signature, rows = digits()
    anatomy = find(model, signature, rows[0])
    found, reasons = joinable(model, anatomy, anatomy.blocks)
    assert not reasons
    faded = FadedActivation()
    faded.attach(model, "blocks.2")
    with torch.no_grad():
        faded.learning = True
        curved = signature.call(model, rows[0])
        faded.share = 0.0
        straight = signature.call(model, rows[0])
        faded.learning = False
        join(model, Surgery(), found["blocks.2"])
        joined = signature.call(model, rows[0])
    assert torch.equal(curved, signature.call(digits()[0], rows[0])), "a share of 1 is the activation"
    assert sqnr_db(straight, joined) > 100
    assert sqnr_db(curved, joined) < 30
    assert model.get_submodule("blocks.2.mlp.fc2").get_parameter("weight").shape == (64, 64)


def test_activations_fade_in_step_with_the_norms_and_are_gone_from_files(tmp_path: Path) -> None:
    import onnx

    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    done = tried(ReplaceNorms(steps=20, rows=16, rate=1e-3, fade=[0, -1]), *digits())
    assert done.context.report["joined"] == ["blocks.0", "blocks.3"]
    training = done.context.report["training"]
    assert training["loss"] < training["loss_start"]
    assert torch.equal(done.outputs(done.after), done.outputs(rebuilt(done)))
    numbers = []
    for at, model in enumerate((done.before, done.after)):
        path = tmp_path / str(at) / "model.onnx"
        path.parent.mkdir()
        OnnxExporter().write(Traceable(model, DIGITS, done.rows[0]), path)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        numbers.append((kinds.count("Gelu") + kinds.count("Erf"), sum(one.numel() for one in model.parameters())))
    assert numbers[0][0] == 2 * numbers[1][0] > 0
    assert numbers[1][1] < numbers[0][1] - 2 * (2 * 64 * 256 - 64 * 64), "two layers of 64 x 256 are one of 64 x 64"


@pytest.mark.parametrize("fade", [[4], [-5]])
def test_a_block_that_is_not_there_cannot_fade(fade: list[int]) -> None:
    model, signature, rows = digits()
    with pytest.raises(UserError, match="there is no block") as caught:
        ReplaceNorms(fade=fade).targets(model, find(model, signature, rows[0]))
    assert "0 to 3" in caught.value.hint


def lesson_of(model: nn.Module) -> tuple[LiveLesson, NormExchange]:
    _, signature, rows = digits()
    teacher = stand_in(model)
    own_parameters(model)
    lesson = LiveLesson(teacher, signature.call, (rows[:2], rows[2:]), ["blocks.1"], "logits")
    exchange = NormExchange.of(model, {"blocks.0.norm1": 64, "norm": 64}, rows[:2], lambda batch: signature.call(model, batch))
    return lesson, exchange


def test_an_interrupted_training_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    road = Road(steps=12, rate=1e-3, keep=4)
    found = []
    for cut in (None, 7, 11):
        model = digits()[0]
        lesson, exchange = lesson_of(model)
        folder = tmp_path / f"cut at {cut}"

        def progress(step: int, total: int, what: str, cut: int | None = cut) -> None:
            if step == cut:
                raise KeyboardInterrupt

        if cut is not None:
            with pytest.raises(KeyboardInterrupt):
                travel(model, DIGITS.call, lesson, exchange, road, progress, folder)
            model = digits()[0]
            lesson, exchange = lesson_of(model)
        told = travel(model, DIGITS.call, lesson, exchange, road, lambda step, total, what: None, folder)
        assert told.resumed_at == (0 if cut is None else 4 * (cut // 4))
        found.append((told.loss, model.state_dict()))
    folder = tmp_path / "cut at 7"
    model = digits()[0]
    lesson, exchange = lesson_of(model)
    again = travel(model, DIGITS.call, lesson, exchange, road, lambda step, total, what: None, folder)
    assert again.resumed_at == 12, "what is finished is not done again"
    found.append((again.loss, model.state_dict()))
    for loss, state in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(state[name], one) for name, one in found[0][1].items())


def planted() -> tuple[nn.Module, list[Batch]]:
    """Images of many contrasts behind an embedding of little else, and a first block that drowns what it got: its norms change
    from image to image, those after it hardly do."""
    model, _, rows = digits()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("patch_embed.bias", "pos_embed", "cls_token"):
                parameter.mul_(0.1)
            if name in ("blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.weight"):
                parameter.mul_(10)
    generator = torch.Generator().manual_seed(5)
    return model, [
        {"pixels": batch["pixels"] * 4 * torch.rand(len(batch["pixels"]), 1, 1, 1, generator=generator)} for batch in rows
    ]


def family(name: str) -> tuple[nn.Module, Signature, list[Batch]]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    model, signature, example = build(name)
    return model, signature, [example]


def exchanged(model: nn.Module, rows: list[Batch], fixed: bool = True) -> NormExchange:
    paths = {path: 64 for path, one in model.named_modules() if isinstance(one, nn.LayerNorm)}
    return NormExchange.of(model, paths, rows, lambda batch: DIGITS.call(model, batch), (), fixed)


BLOCKS = [f"blocks.{n}" for n in range(4)]


def test_the_first_blocks_are_those_where_the_error_arises() -> None:
    chosen = {}
    for name, (model, rows) in {"planted": planted(), "digits": (digits()[0], digits()[2])}.items():
        exchange, fading = exchanged(model, rows), [FadedActivation(), FadedActivation()]
        others = [("blocks.0", fading[0]), ("blocks.3", fading[1])]
        chosen[name] = first_blocks(model, DIGITS.call, rows, BLOCKS, exchange, others)
        exchange.others = fading
        exchange.done, exchange.done_others = chosen[name].norms, chosen[name].others
        exchange.set(0.5, True)
        assert {path for path, part in exchange.parts.items() if part.share == 0} == chosen[name].norms
        assert [one.share for one in fading] == [0.0 if chosen[name].paths else 0.5, 0.5]
    assert chosen["planted"].paths == ("blocks.0",)
    assert chosen["planted"].norms == {"blocks.0.norm1", "blocks.0.norm2"}
    assert list(chosen["planted"].errors) == BLOCKS
    errors = list(chosen["digits"].errors.values())
    assert sum(errors[:2]) < 0.9 * sum(errors), "the control: spread over the model"
    assert chosen["digits"].paths == ()
    assert "spread" in chosen["digits"].because


def test_no_block_learns_first_for_nothing_or_for_what_is_not_finite() -> None:
    model, rows = planted()
    exchange = exchanged(model, rows)
    with torch.no_grad():
        exchange.parts["blocks.0.norm1"].beta[0] = torch.inf
    assert "not finite" in first_blocks(model, DIGITS.call, rows, BLOCKS, exchange, []).because
    model, rows = planted()
    exchange = NormExchange.of(model, {"blocks.2.norm1": 64}, rows, lambda batch: DIGITS.call(model, batch), (), True)
    found = first_blocks(model, DIGITS.call, rows, BLOCKS, exchange, [])
    assert "hardly anything" in found.because
    assert sum(found.errors.values()) < 1e-3


def test_padded_positions_do_not_choose_the_first_blocks() -> None:
    model, signature, rows = family("bert")
    mask = rows[0]["attention_mask"]
    other = {**rows[0], "input_ids": torch.where(mask == 0, 7, rows[0]["input_ids"])}
    assert not torch.equal(other["input_ids"], rows[0]["input_ids"])
    blocks = [block.path for block in find(model, signature, rows[0]).blocks]
    paths = {path: one.weight.numel() for path, one in model.named_modules() if isinstance(one, nn.LayerNorm)}
    exchange = NormExchange.of(model, paths, rows, lambda batch: signature.call(model, batch), (), True)
    first, second = (first_blocks(model, signature.call, [batch], blocks, exchange, []) for batch in (rows[0], other))
    assert first.errors == pytest.approx(second.errors, rel=1e-5)


def test_statistics_of_norms_that_do_not_run_stay_as_they_are() -> None:
    """With statistics of batches the first blocks settle theirs alone."""
    model, rows = planted()
    exchange = exchanged(model, rows, fixed=False)
    held = {path: part.mean.clone() for path, part in exchange.parts.items()}
    teacher = digits()[0]
    teacher.load_state_dict(planted()[0].state_dict())
    own_parameters(model)
    lesson = LiveLesson(teacher, DIGITS.call, (rows[:2], rows[2:]), ["blocks.0"])
    told = travel(model, DIGITS.call, lesson, exchange, Road(16, 2e-3, 0.0), lambda step, total, what: None)
    assert told.best_step
    moved = {path for path, part in exchange.parts.items() if not torch.equal(part.mean, held[path])}
    assert moved
    assert all(path.startswith("blocks.0.") for path in moved)


def test_a_first_stage_that_fails_is_said_and_its_norms_fade_like_the_others() -> None:
    model, rows = planted()
    report = tried(ReplaceNorms(steps=4, first_steps=30, rows=16, rate=1e30), model, DIGITS, rows).context.report
    assert report["first_blocks"]["training"]["best_step"] == 0
    assert any(one.startswith("first blocks: training stopped") for one in report["warnings"])


def test_what_has_no_effect_is_refused_or_said() -> None:
    model, signature, rows = family("bert")
    with pytest.raises(UserError, match="no images"):
        ReplaceNorms(varied=True).targets(model, find(model, signature, rows[0]))
    report = tried(ReplaceNorms(steps=1, first_steps=5, rows=16), *digits()).context.report
    assert any("no block learns alone: the error is spread" in one for one in report["warnings"])
    assert tried(ReplaceNorms(steps=1, rows=16), *digits()).context.report["first_blocks"]["paths"] == []
    with pytest.raises(UserError, match="no calibration rows"):
        ReplaceNorms(steps=1).run(
            digits()[0], Context(DIGITS, find(digits()[0], DIGITS, digits()[2][0]), lambda: iter([]), Surgery())
        )


def test_first_blocks_that_learn_alone_leave_less_to_the_model() -> None:
    model, rows = planted()
    without, first = (tried(ReplaceNorms(steps=20, first_steps=n, rows=16, rate=1e-3), model, DIGITS, rows) for n in (0, 40))
    told = first.context.report["first_blocks"]
    assert told["training"]["loss"] < 0.6 * told["training"]["loss_start"]
    held = sum(parameter.numel() for parameter in model.get_submodule("blocks.0").parameters())
    assert held < told["training"]["parameters"] < 0.5 * first.context.report["training"]["parameters"]
    assert first.sqnr_db > without.sqnr_db + 1


def test_images_are_mirrored_and_shifted_and_nothing_else_is() -> None:
    columns = torch.arange(16.0).expand(64, 1, 16, 16)
    batch = {"pixels": columns, "mask": torch.ones(64, 3)}
    given = varied(batch, torch.Generator().manual_seed(0))
    assert torch.equal(given["mask"], batch["mask"])
    steps = given["pixels"][:, 0].diff(dim=-1)
    middle = steps[:, :, 4:11]
    ways = {float(one) for one in middle.reshape(64, -1).mean(1)}
    assert ways == {1.0, -1.0}, "each as a whole to one side"
    assert bool((middle == middle[:, :1, :1]).all()), "no column is lost in the middle"
    starts = {int(one) for one in (given["pixels"][:, 0, 0, 8] - given["pixels"][:, 0, 0, 8].mean()).round()}
    assert len(starts) > 4
    assert torch.equal(varied(batch, torch.Generator().manual_seed(0))["pixels"], given["pixels"])


def test_training_that_leaves_the_finite_numbers_stops_and_keeps_the_best_state() -> None:
    done = tried(ReplaceNorms(steps=30, rows=16, rate=1e30), *digits())
    training = done.context.report["training"]
    assert "was not finite" in training["stopped"]
    assert training["best_step"] == 0
    assert any("training stopped" in one for one in done.context.report["warnings"])
    assert bool(done.outputs(done.after).isfinite().all())
    assert training["loss"] == training["loss_start"]


def test_files_hold_no_normalisation(tmp_path: Path) -> None:
    import onnx

    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    done = tried(EXAMPLE, *digits())
    kinds = []
    for number, model in enumerate((done.before, done.after)):
        path = tmp_path / str(number) / "model.onnx"
        path.parent.mkdir()
        OnnxExporter().write(Traceable(model, DIGITS, done.rows[0]), path)
        kinds.append({node.op_type for node in onnx.load(path).graph.node})
    assert "LayerNormalization" in kinds[0], "the float file has them"
    assert not {"LayerNormalization", "ReduceMean", "Sqrt", "Reciprocal"} & kinds[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"skip": ["norm"]}, "no norm can be replaced"), ({"sites": ["mlp.up"]}, "no norm can be replaced")],
    ids=str,
)
def test_nothing_to_replace_is_refused(options: dict[str, Any], says: str) -> None:
    model, signature, rows = digits()
    with pytest.raises(UserError, match=says) as caught:
        ReplaceNorms(**options).targets(model, find(model, signature, rows[0]))
    assert caught.value.hint


def test_a_quantized_model_is_refused_with_the_order_that_works() -> None:
    model, signature, rows = digits()
    context = Context(signature, find(model, signature, rows[0]), lambda: iter(rows), Surgery())
    Quantize(activations="none").run(model, context)
    with pytest.raises(UserError, match="is quantized") as caught:
        ReplaceNorms().targets(model, find(model, signature, rows[0]))
    assert "before quantize" in caught.value.hint
