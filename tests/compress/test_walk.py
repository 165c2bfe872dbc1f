"""A walk through a model block by block: what is behind is not run again, and calls give what they gave."""

from __future__ import annotations

import pytest
import torch
from test_distillation import BLOCKS, Stack, Telling, call, rows, stack  # noqa: F401 - a fixture
from torch import Tensor

from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.distillation import walk as module
from compress.distillation.walk import Walk


def outputs(walk: Walk) -> list[Tensor]:
    with evaluating(walk.model):
        return [walk.call(walk.model, piece) for piece in walk.pieces]


def test_blocks_behind_are_not_run_again_and_later_changes_are_seen(stack: Stack) -> None:  # noqa: F811
    ran = [0] * 4
    for number, block in enumerate(stack.blocks):
        block.get_submodule("up").register_forward_hook(lambda m, a, o, n=number: ran.__setitem__(n, ran[n] + 1))
    walk = Walk(stack, call, rows())
    before = outputs(walk)
    walk.reach(["blocks.2.up"], BLOCKS)
    assert walk.behind == BLOCKS[:2]
    ran[:] = [0] * 4
    for wanted, given in zip(before, outputs(walk), strict=True):
        assert torch.equal(wanted, given)
    assert ran == [0, 0, 4, 4]
    with torch.no_grad():
        stack.blocks[0].get_submodule("up").get_parameter("weight").zero_()  # behind: not seen
        stack.blocks[3].get_submodule("up").get_parameter("weight").mul_(2)
    changed = outputs(walk)
    with torch.no_grad():
        stack.blocks[3].get_submodule("up").get_parameter("weight").mul_(0.5)
    assert not torch.equal(before[0], changed[0])
    assert torch.equal(before[0], outputs(walk)[0])


def test_it_goes_on_from_where_it_is(stack: Stack) -> None:  # noqa: F811
    walk = Walk(stack, call, rows())
    before = outputs(walk)
    for owner, behind in (("blocks.1.up", 1), ("blocks.1.down", 1), ("blocks.3.up", 3), ("blocks.0.up", 3)):
        walk.reach([owner], BLOCKS)
        assert walk.behind == BLOCKS[:behind]
        for wanted, given in zip(before, outputs(walk), strict=True):
            assert torch.equal(wanted, given)


def test_other_rows_and_other_models_run_from_the_beginning(stack: Stack) -> None:  # noqa: F811
    walk, other = Walk(stack, call, rows()), rows(1, seed=7)[0]
    walk.reach(["blocks.2.up"], BLOCKS)
    with evaluating(stack):
        assert torch.equal(walk.call(stack, other), call(stack, other))
        fresh = Stack().eval()
        assert torch.equal(walk.call(fresh, walk.pieces[0]), call(fresh, walk.pieces[0]))
        assert not torch.equal(walk.call(fresh, walk.pieces[0]), walk.call(stack, walk.pieces[0]))


@pytest.mark.parametrize("why", ["order", "room"])
def test_where_it_cannot_remember_it_runs_the_whole_model(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Stack = Telling().eval() if why == "order" else Stack().eval()
    if why == "room":
        monkeypatch.setattr(module, "MOST_BYTES", 100)
    pieces: list[Batch] = rows()
    walk = Walk(model, call, pieces)
    before = outputs(walk)
    walk.reach(["blocks.2.up"], BLOCKS)
    assert walk.behind == []
    assert all(torch.equal(wanted, given) for wanted, given in zip(before, outputs(walk), strict=True))
