"""Hash attention: what it puts in, what it leaves, how it is learnt and saved, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trial import DIGITS, Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Signature, TensorSpec
from compress.layers import HashedAttention
from compress.layers.attached import attached_to
from compress.passes.drop_layers import DropLayers
from compress.passes.hash_attention import HashAttention
from compress.passes.prune_width import PruneWidth
from compress.passes.quantize import Quantize
from compress.passes.topk_attention import TopkAttention

EXAMPLE = HashAttention(bits=3, anchors=5, blocks=[1, -1], steps=2)


@functools.cache
def trial() -> Trial:
    return tried(HashAttention(bits=4, anchors=8, steps=5), *digits())


def test_the_report_says_what_was_kept_and_what_it_costs() -> None:
    told = trial().context.report
    assert told["hashed"] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert told["kept"] == []
    for path, block in told["blocks"].items():
        assert path == f"blocks.{block['block']}"
        assert block["tokens"] == 17
        # 4 heads, 17 tokens, 16 wide, 8 anchors, 4 bits: by hand.
        assert block["macs"]["softmax"] == 4 * 17 * 17 * (16 + 16)
        assert block["macs"]["hash"] == 4 * 17 * (2 * 8 * (16 + 4) + 16 + 4 * 17 + 16 + 4 * 17)
        tokens = block["fewer_macs_from_tokens"]
        linear = block["macs"]["hash"] / 17
        assert (tokens - 1) * 4 * 32 <= linear < tokens * 4 * 32
        assert block["row_kl_nats"]["learnt"] < block["row_kl_nats"]["keys_only"]
        assert block["correlation"]["learnt"] > block["correlation"]["keys_only"]
        assert len(block["heads"]) == 4
    assert 3 < trial().sqnr_db < max(block["sqnr_db_alone"] for block in told["blocks"].values())


def test_learnt_codes_cost_the_output_less_than_codes_of_chance() -> None:
    """A control: the same anchors, kernel and gate, with the projection drawn anew."""
    chance = rebuilt(trial())
    generator = torch.Generator().manual_seed(0)
    for module in chance.modules():
        if isinstance(module, HashedAttention):
            module.projection.copy_(torch.randn(module.projection.shape, generator=generator) * module.projection.std())
            module.shift.zero_()
    assert trial().sqnr_db > sqnr_db(trial().outputs(trial().before), trial().outputs(chance)) + 3


def test_what_was_learnt_is_saved_with_the_model() -> None:
    after = trial().after
    names = {name for name in after.state_dict() if ".hash_attention." in name}
    tensors = ("centre", "anchors", "width", "projection", "shift", "weights", "gate")
    assert names == {f"blocks.{block}.hash_attention.{name}" for block in range(4) for name in tensors}
    assert torch.equal(trial().outputs(rebuilt(trial())), trial().outputs(after))


def test_no_matrix_of_queries_and_keys_is_left_in_the_graph() -> None:
    batch = torch.export.Dim("batch")
    pixels = trial().rows[0]["pixels"]
    program = torch.export.export(
        DIGITS.bind(trial().after), (), {"pixels": pixels}, dynamic_shapes={"pixels": {0: batch}}, strict=False
    )
    square = [node for node in program.graph.nodes if tuple(getattr(node.meta.get("val"), "shape", ()))[-2:] == (17, 17)]
    assert square == []
    with torch.inference_mode():
        assert sqnr_db(trial().after(pixels), program.module()(pixels=pixels)) > 100
    signs = [node for node in program.graph.nodes if node.target is torch.ops.aten.where.ScalarSelf]
    signs += [node for node in program.graph.nodes if "where" in str(node.target) and node not in signs]
    assert len(signs) == 8, "one for queries and one for keys of each block"


def test_keep_leaves_the_block_that_loses_most() -> None:
    one = tried(HashAttention(bits=2, anchors=4, steps=0, blocks=[0, 2], keep=1), *digits())
    alone = {path: block["sqnr_db_alone"] for path, block in one.context.report["blocks"].items()}
    worst = min(alone, key=lambda path: alone[path])
    assert one.context.report["kept"] == [worst]
    assert attached_to(one.after.get_submodule(worst), HashedAttention) is None
    assert not hasattr(one.after.get_submodule(worst), "hash_attention")
    assert [edit.path for edit in one.context.edits] == [path for path in alone if path != worst]
    best = max(alone.values())
    assert one.context.report["sqnr_db"] == best, "what is left is the other block alone"


def test_distillation_brings_the_output_nearer_and_keeps_the_codes() -> None:
    plain, taught = (tried(HashAttention(bits=4, anchors=8, steps=0, blocks=[2], distill=epochs), *digits()) for epochs in (0, 3))
    told = taught.context.report["distillation"]
    assert told["sqnr_db_after"] > told["sqnr_db_before"]
    assert taught.sqnr_db > plain.sqnr_db
    states = plain.after.state_dict(), taught.after.state_dict()
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert "blocks.2.attn.qkv.weight" in changed, "gradients pass the signs"
    assert all(name.startswith(("blocks.2.", "blocks.3.")) and ".hash_attention." not in name for name in changed)
    assert not any(module.learning for module in taught.after.modules() if isinstance(module, HashedAttention))


def test_it_goes_with_the_other_passes() -> None:
    model, signature, rows = digits()
    after = trial().after
    assert tried(Quantize(), after, signature, rows).sqnr_db > 20
    dropped = tried(DropLayers(attention=[1]), after, signature, rows)
    assert attached_to(dropped.after.get_submodule("blocks.3"), HashedAttention) is not None
    with pytest.raises(UserError, match="Leave them with heads: false"):
        tried(PruneWidth(macs=0.5, repair=False), after, signature, rows)
    hard = tried(TopkAttention(k=3, blocks=[1]), model, signature, rows).after
    with pytest.raises(UserError, match=r"blocks.1: its largest scores count alone"):
        tried(HashAttention(anchors=8, blocks=[1]), hard, signature, rows)


class Attention(nn.Module):
    """Attention alone, as torch has it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


def hashed(heads: int = 3) -> tuple[nn.Module, HashedAttention]:
    generator = torch.Generator().manual_seed(0)
    layer = HashedAttention(heads, 8, 4, 5)
    for name, shape in ((name, buffer.shape) for name, buffer in layer.named_buffers() if name not in ("width", "weights")):
        layer.register_buffer(name, torch.randn(shape, generator=generator))
    layer.anchors = F.normalize(layer.anchors, dim=-1)
    module = Attention()
    layer.attach(module, "")
    return module, layer


def operands(queries: int = 6, keys: int = 9, kv_heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 3, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 5))
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    return query, key, value


def test_masks_of_booleans_and_of_numbers_say_the_same() -> None:
    module, layer = hashed()
    query, key, value = operands()
    valid = torch.arange(9) < torch.tensor([4, 7]).unsqueeze(1)
    boolean = valid[:, None, None, :]
    added = torch.zeros(2, 1, 1, 9).masked_fill(~boolean, torch.finfo(torch.float32).min)
    found = module(query, key, value, boolean)
    assert torch.equal(found, module(query, key, value, boolean.expand(-1, -1, 6, -1)))
    assert torch.equal(found, module(query, key, value, added))
    assert torch.equal(found, module(query, key, torch.where(boolean.transpose(-1, -2), value, 1e9), added))
    assert not torch.equal(found, module(query, key, value))
    assert torch.equal(module(query, key, value), layer(query, key, value))


def test_grouped_heads_are_repeated_and_causal_attention_is_refused() -> None:
    module, _ = hashed()
    query, key, value = operands(kv_heads=1)
    wanted = module(query, key.expand(-1, 3, -1, -1), value.expand(-1, 3, -1, -1))
    assert torch.equal(module(query, key, value, enable_gqa=True), wanted)
    with pytest.raises(ValueError, match="no causal form"):
        module(query, key, value, is_causal=True, enable_gqa=True)


def test_there_have_to_be_calibration_rows() -> None:
    model, signature, rows = digits()
    none = [{name: tensor[:0] for name, tensor in rows[0].items()}]
    context = tried(EXAMPLE, model, signature, rows).context
    context.calibration = lambda: iter(none)
    with pytest.raises(UserError, match=r"there are no calibration rows\n  Name at least one row"):
        EXAMPLE.run(digits()[0], context)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blocks": [4]}, r"there is no block 4\n  There are 4: 0 to 3"),
        ({"blocks": [-5]}, "there is no block -5"),
        ({"anchors": 25}, "no block has an attention that can be hashed\n  blocks.0: it has 17 keys, fewer than the 25 anchors"),
        ({"anchors": 18, "blocks": [2]}, r"blocks.2: it has 17 keys, fewer than the 18 anchors\n  Take 2 off blocks"),
        ({"keep": 4}, r"keep: 4 leaves none of 4 attentions\n  At most 3"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_before_anything_runs(options: dict[str, Any], says: str) -> None:
    model, anatomy = digits()[0], trial().anatomy
    with pytest.raises(UserError, match=says):
        HashAttention(**{"anchors": 8, **options}).targets(model, anatomy)


def test_a_block_that_has_it_is_left_and_one_without_attention_refused() -> None:
    model, signature, rows = digits()
    first = tried(HashAttention(bits=2, anchors=4, steps=0, blocks=[1]), model, signature, rows)
    anatomy = tried(TopkAttention(k=17, blocks=[0]), first.after, signature, rows).anatomy
    assert HashAttention(anchors=4).skips(first.after, anatomy) == {"blocks.1": "its attention is hashed already"}
    assert anatomy.roles == first.anatomy.roles, "queries, keys and values are found behind their codes"

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(x)))

    plain = Signature((TensorSpec("x", torch.float32, ("batch", 4, 8)),))
    with pytest.raises(UserError, match="no block has an attention that can be hashed"):
        tried(HashAttention(), Plain(), plain, [{"x": torch.randn(4, 4, 8)}])
