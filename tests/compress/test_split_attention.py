"""``SplitAttention`` against ``torch.nn.MultiheadAttention``, and a model that holds one, all the way to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from compress.layers import SplitAttention, split_attention

PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = torch.ones(5, 7).triu(1).bool()


def pair(**options: object) -> tuple[nn.MultiheadAttention, SplitAttention]:
    packed = nn.MultiheadAttention(24, 4, **options).eval()  # type: ignore[arg-type]
    for parameter in packed.parameters():
        nn.init.normal_(parameter, std=0.3)
    return packed, SplitAttention(packed)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 12, "batch_first": True}])
@pytest.mark.parametrize("padding", [None, PADDING, PADDING.float() * -1e4])
@pytest.mark.parametrize("mask", [None, CAUSAL, torch.randn(5, 7), torch.randn(8, 5, 7)])
@pytest.mark.parametrize("average", [True, False])
def test_outputs_and_weights_are_those_of_torch(
    options: dict[str, object], padding: Tensor | None, mask: Tensor | None, average: bool
) -> None:
    packed, split = pair(**options)
    sizes = [24, options.get("kdim", 24), options.get("vdim", 24)]
    query, key, value = (torch.randn(2, tokens, size) for tokens, size in zip((5, 7, 7), sizes, strict=True))  # type: ignore[call-overload]
    if not packed.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    given = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": average}
    with torch.no_grad():
        expected, made = packed(query, key, value, **given), split(query, key, value, **given)
    assert sqnr_db(expected[0], made[0]) > 110
    assert sqnr_db(expected[1], made[1]) > 110
    assert split(query, key, value, need_weights=False)[1] is None


def test_a_single_sequence_has_no_batch() -> None:
    packed, split = pair()
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected, made = packed(x, x, x), split(x, x, x)
    assert sqnr_db(expected[0], made[0]) > 110
    assert expected[1].shape == made[1].shape


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_of_torch_keeps_its_function(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 7, 24) if batch_first else torch.randn(7, 2, 24)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        assert split_attention(model) == 3
        made = model(x, src_key_padding_mask=PADDING)
    keep = ~PADDING if batch_first else ~PADDING.T
    assert sqnr_db(expected[keep], made[keep]) > 100


def test_what_it_cannot_express_stays() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, add_zero_attn=True)])
    assert split_attention(model) == 0


FILE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

def make():
    torch.manual_seed(0)
    return Model().eval(), {"x": torch.randn(2, 6, 32)}
"""

RECIPE = """
model: mine.py:make
data: {format: arrays, calibration: {path: a.npz, rows: 0-31}, evaluation: {path: a.npz, rows: 32-63}}
passes:
  - quantize: {weights: 8, activations: static, reduce_range: pairs}
export:
  - onnx: {openvino: false}
accept: {sqnr_db: 25}
measure: {repeats: 3}
"""


def test_a_users_encoder_is_quantized_with_its_attention(tmp_path: Path) -> None:
    import numpy as np

    import compress

    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).standard_normal((64, 6, 32), dtype=np.float32))
    report = compress.apply(tmp_path / "mine.yaml", out=tmp_path / "out", trust=True)
    assert report.exit_code == 0, [limit.says for limit in report.limits]
    assert report.rows[1].audit is not None
    assert report.rows[1].audit.layers == 2 * 6
    assert compress.load(tmp_path / "out", trust=True)(torch.randn(2, 6, 32)).shape == (2, 5)
