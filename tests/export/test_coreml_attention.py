"""Attention in Core ML packages: one operation on iOS 18, with any scale and any mask; products and a softmax where it is not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("coremltools", reason="Core ML needs coremltools")

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from export.graph import Traceable
from export.mil_package import Package
from export.to_coreml import CoreMLExporter

FUSED = "scaled_dot_product_attention"


class Attention(nn.Module):
    """Attention over x [B, H, T, D] with a boolean mask [B, 1, 1, T], or a causal one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.masked = options, not options.get("is_causal")
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        options = self.options | ({"attn_mask": keep[:, None, None, :].bool()} if self.masked else {})
        mixed = F.scaled_dot_product_attention(x, x * 0.5, x + 1, **options)
        made: Tensor = self.out(mixed)
        return made


def rows() -> Batch:
    x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    return {"x": x, "keep": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}


def written(model: nn.Module, folder: Path, **options: Any) -> tuple[Counter[str], Any]:
    sizes = (TensorSpec("x", torch.float32, ("batch", 2, 5, 8)), TensorSpec("keep", torch.int64, ("batch", 5)))
    exporter = CoreMLExporter(precision="float32", batch=2, **options)
    path = exporter.write(Traceable(model.eval(), Signature(sizes, "tensor"), rows()), folder / "model.mlpackage").path
    return Counter(op.kind for op in Package(path).ops), exporter.open(path, 1)


@pytest.mark.parametrize("options", [{}, {"scale": 8**-0.5}, {"scale": 0.3}, {"is_causal": True, "scale": 8**-0.5}], ids=str)
def test_it_is_one_operation_of_the_same_result(options: dict[str, Any], tmp_path: Path) -> None:
    model = Attention(**options)
    kinds, runner = written(model, tmp_path)
    assert (kinds[FUSED], kinds["softmax"]) == (1, 0)
    assert kinds["mul"] == 1 + (options.get("scale") == 0.3) + model.masked, (
        "of keys, of queries for a scale of their own, of masks"
    )
    with torch.no_grad():
        wanted = model(**rows())
        assert sqnr_db(wanted, runner(rows())) > 100
        other = Attention(**options | {"scale": 0.5})
        other.load_state_dict(model.state_dict())
        assert sqnr_db(other(**rows()), runner(rows())) < 40, "the scale matters"


@pytest.mark.parametrize("options", [{"target": "iOS17"}, {"fused_attention": False}], ids=str)
def test_elsewhere_it_is_written_out(options: dict[str, Any], tmp_path: Path) -> None:
    model = Attention(scale=8**-0.5)
    kinds, runner = written(model, tmp_path, **options)
    assert (kinds[FUSED], kinds["softmax"]) == (0, 1)
    with torch.no_grad():
        assert sqnr_db(model(**rows()), runner(rows())) > 100


def test_a_query_that_attends_to_nothing_still_gets_numbers(tmp_path: Path) -> None:
    _, runner = written(Attention(scale=8**-0.5), tmp_path)
    given = runner(rows() | {"keep": torch.zeros(2, 5, dtype=torch.int64)})
    assert bool(given.isfinite().all())


def test_one_mask_is_made_for_all_attentions(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Attention(scale=8**-0.5), Attention(scale=8**-0.5)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            mask = keep[:, None, None, :].bool()
            for layer in (self.one, self.two):
                x = layer.out(F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=8**-0.5))
            return x

    model = Two()
    kinds, runner = written(model, tmp_path)
    assert (kinds[FUSED], kinds["sub"]) == (2, 1)
    with torch.no_grad():
        assert sqnr_db(model(**rows()), runner(rows())) > 100


def test_attention_of_16_bits_is_left_as_it_is(tmp_path: Path) -> None:
    class Short(Attention):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            short = x.half()
            mixed = F.scaled_dot_product_attention(short, short * 0.5, short, scale=0.3)
            made: Tensor = self.out(mixed.float() + keep[:, None, :, None])
            return made

    model = Short()
    kinds, runner = written(model, tmp_path)
    assert (kinds[FUSED], kinds["softmax"]) == (0, 1)
    with torch.no_grad():
        assert sqnr_db(model(**rows()), runner(rows())) > 50
