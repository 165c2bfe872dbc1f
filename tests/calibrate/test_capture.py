"""One sweep: what counts, what is shared, what stops it, and that it leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from calibrate.capture import capture, given, received, split
from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.histogram import Histogram
from calibrate.ranges import Channels, MinMax, Observer, range_observer
from calibrate.signature import Batch

WIDTH = 8


class Reader(nn.Module):
    """Three projections read one tensor, a fourth reads their sum; the mask is only carried along."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.pool = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        mixed = self.q(x) + self.k(x) * self.v(input=x)
        pooled: Tensor = self.pool(self.out(mixed)[:, 0])
        return pooled


def call(model: nn.Module, batch: Batch) -> Tensor:
    output: Tensor = model(**batch)
    return output


def batches(rows: int = 12, tokens: int = 6, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, tokens, WIDTH, generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    return [{"x": x[i : i + size], "attention_mask": mask[i : i + size]} for i in range(0, rows, size)]


def asked(*paths: str) -> dict[str, list[Observer]]:
    return {path: [MinMax(), Channels()] for path in paths}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_observers_see_exactly_the_counted_values() -> None:
    model, data = Reader(), batches()
    observers = capture(model, call, data, asked("q", "out"), batch_size=3).observers
    x, mask = (torch.cat([batch[name] for batch in data]) for name in ("x", "attention_mask"))
    seen, channels = observers["q"]
    assert isinstance(seen, MinMax)
    assert isinstance(channels, Channels)
    counted = x[mask != 0]
    assert (seen.low, seen.high) == (float(counted.min()), float(counted.max()))
    assert channels.count == int(mask.sum())
    assert torch.equal(channels.absmax, counted.abs().amax(0))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy", "moving_average"])
def test_more_padding_changes_nothing(method: str) -> None:
    model, data = Reader(), batches()
    longer = [
        {
            "x": torch.cat([batch["x"], torch.full((4, 5, WIDTH), 1e3)], 1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(4, 5, dtype=torch.long)], 1),
        }
        for batch in data
    ]
    ranges = []
    for rows in (data, longer):
        observer = range_observer(method)  # type: ignore[arg-type]
        capture(model, call, rows, {"q": [observer]})
        ranges.append(observer.range(Grid(8, True, "tensor")))
    assert ranges[0] == ranges[1]
    control = range_observer(method)  # type: ignore[arg-type]
    unmasked = [{"x": batch["x"], "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in longer]
    capture(model, call, unmasked, {"q": [control]})
    assert control.range(Grid(8, True, "tensor")) != ranges[0]


def test_sites_that_read_one_tensor_share_its_observers() -> None:
    captured = capture(Reader(), call, batches(), asked("q", "k", "v", "out"))
    assert captured.shared == {"k": "q", "v": "q"}
    assert captured.observers["q"] is captured.observers["k"] is captured.observers["v"]
    assert captured.observers["out"] is not captured.observers["q"]


def test_sites_that_ask_for_different_things_do_not_share() -> None:
    captured = capture(Reader(), call, batches(), {"q": [MinMax()], "k": [Channels()]})
    assert captured.shared == {}


def test_what_never_ran_and_where_padding_counts_is_said() -> None:
    captured = capture(Reader(), call, batches(), asked("q", "unused", "pool"))
    assert captured.silent == ("unused",)
    assert captured.padding_counted == ("pool",)
    assert captured.rows == 12


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_broken_row_stops_with_its_place(value: float, kind: str) -> None:
    model, data = Reader(), batches()
    data[2]["x"][1, 0, 3] = value
    with pytest.raises(UserError) as caught:
        capture(model, call, data, asked("q", "out"))
    assert caught.value.where == "q"
    assert caught.value.what.startswith(kind)
    assert "batch 2, row 9 " in caught.value.what
    assert hooks(model) == 0


def test_a_broken_padded_position_does_not_count() -> None:
    data = batches()
    row = int((data[0]["attention_mask"][:, -1] == 0).nonzero()[0])
    data[0]["x"][row, -1] = float("nan")
    capture(Reader(), call, data, asked("q"))


def test_hooks_and_modes_are_put_back_even_after_an_error() -> None:
    model = Reader().train()
    model.q.eval()
    modes = [module.training for module in model.modules()]

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        call(model, batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        capture(model, failing, batches(), asked("q", "out"))
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    capture(model, call, batches(), asked("q", "out"))
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes


def test_a_run_stops_at_the_module_that_is_asked() -> None:
    model, batch, ran = Reader(), batches()[0], []
    model.out.register_forward_hook(lambda *given: ran.append("out"))
    before = hooks(model)
    assert torch.equal(received(model, call, "v", batch), batch["x"])  # called by keyword
    assert torch.equal(given(model, call, "k", batch), model.k(batch["x"]))
    assert not ran
    assert torch.equal(received(model, call, "pool", batch), given(model, call, "out", batch)[:, 0])
    assert len(ran) == 2
    with pytest.raises(LookupError):
        given(model, call, "unused", batch)
    with pytest.raises(LookupError):
        received(model, call, "unused", batch)
    assert hooks(model) == before


def test_no_rows_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no rows"):
        capture(Reader(), call, [], asked("q"))


def test_split_keeps_the_rows_and_bounds_the_size() -> None:
    data = batches(10, size=10)
    pieces = list(split(data, 4))
    assert [len(piece["x"]) for piece in pieces] == [4, 4, 2]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), data[0]["x"])


def held(observers: list[Observer]) -> int:
    """Bytes of the tensors that observers keep, deeply."""
    seen, count, todo = set(), 0, list(observers)
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            count += item.numel() * item.element_size()
        elif isinstance(item, (list, tuple)):
            todo += item  # type: ignore[arg-type]
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
        count += sys.getsizeof(item) if isinstance(item, (bytes, str)) else 0
    return count


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy", "moving_average"])
def test_state_does_not_grow_with_the_rows(method: str) -> None:
    sizes = []
    for rows in (4, 400):
        observers: list[Observer] = [range_observer(method), Channels()]  # type: ignore[arg-type]
        capture(Reader(), call, batches(rows), {"q": observers}, batch_size=4)
        sizes.append(held(observers))
    assert sizes[0] == sizes[1]
    assert sizes[0] < 10 * Histogram().counts.numel() * 8


def test_only_one_piece_of_the_data_is_alive_at_a_time() -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Batch]:
        nonlocal most
        for batch in batches(80, size=4):
            fresh = {name: tensor.clone() for name, tensor in batch.items()}
            alive.append(weakref.ref(fresh["x"]))
            yield fresh
            del fresh
            most = max(most, sum(reference() is not None for reference in alive))

    capture(Reader(), call, stream(), asked("q"), batch_size=4)
    assert most <= 3


def test_convolutions_are_seen_with_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2))
    images = torch.randn(5, 3, 6, 6)
    channels = Channels()
    capture(model, lambda m, batch: m(batch["x"]), [{"x": images}], {"0": [channels]})
    assert torch.equal(channels.absmax, images.abs().amax((0, 2, 3)))
