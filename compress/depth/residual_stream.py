"""What each attention and each MLP adds to the residual stream, seen while the model runs.

The add where a sublayer joins the stream is an operation, not a module. It is found by following what the sublayer's last
projection gives from operation to operation, until it is added to something that does not come from it. So pre-norm, post-norm
and norms on both sides, layer scales, windows that are put together again and parallel branches need no table of names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.anatomy.flow import LAYOUT

__all__ = ["Joined", "Path", "follow", "watched"]

Heard = Callable[[str, Tensor, Tensor], None]
"""Is told (sink, the stream before the join, what is added to it)."""


@dataclass
class Path:
    """The way of one sublayer's output to the stream.

    Attributes:
        sink: module path of its last projection.
        calls: how often it ran.
        joins: how often what it gave was added to the stream.
        after: modules with weights on the way from the sink to the join, in order: norms, layer scales.
        plain: whether nothing but layout lies between the last of them and the join: a constant put there arrives as it is.
    """

    sink: str
    calls: int = 0
    joins: int = 0
    after: tuple[str, ...] = ()
    plain: bool = True


@dataclass
class Joined:
    """What one run of the model showed: the way of each sink, and who reads each norm (None: the stream, or the output)."""

    paths: dict[str, Path] = field(default_factory=dict)
    readers: dict[str, set[str | None]] = field(default_factory=dict)

    def only_for(self, layers: Sequence[str]) -> list[str]:
        """The norms that nobody reads but the given layers, and norms of which that holds."""
        own = set(layers)
        found: list[str] = []
        for _ in self.readers:
            more = [norm for norm, readers in self.readers.items() if norm not in own and readers and readers <= own]
            if not more:
                break
            found += more
            own |= set(more)
        return [norm for norm in self.readers if norm in found]


def follow(
    model: nn.Module, run: Callable[[], Tensor], sinks: Sequence[str], layers: Sequence[str], norms: Sequence[str]
) -> Joined:
    """Runs the model once and tells how each sink's output reaches the stream, and who reads the norms.

    Args:
        run: calls the model on a few rows.
        sinks: last projections of the sublayers.
        layers: all other layers with weights but norms; what they give is something new.
        norms: module paths.
    """
    joined = Joined({sink: Path(sink) for sink in sinks}, {norm: set() for norm in norms})
    with watched(model, sinks, joined=joined, layers=layers) as watch:
        output = run()
        for norm in watch.labels(output)[1]:
            joined.readers[norm].add(None)
    return joined


@contextmanager
def watched(
    model: nn.Module,
    sinks: Sequence[str],
    heard: Heard = lambda sink, before, added: None,
    joined: Joined | None = None,
    layers: Sequence[str] = (),
) -> Iterator[_Watch]:
    """While it is open, ``heard`` is told at every join of a sink's output; no hook is left behind."""
    watch = _Watch(heard, joined or Joined({sink: Path(sink) for sink in sinks}))
    handles = []
    known = {*sinks, *layers}
    for path, module in model.named_modules():
        if path in sinks:
            handles.append(module.register_forward_hook(watch.sink(path)))
        elif path in known:
            handles.append(module.register_forward_hook(watch.layer(path)))
        elif any(parameter is not None for parameter in module._parameters.values()):
            handles.append(module.register_forward_hook(watch.between(path)))
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


_NOTHING: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
_ADDS = frozenset({"add", "add_"})


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels on tensors: the sinks, and the norms, that they come from."""

    def __init__(self, heard: Heard, joined: Joined) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard, self.joined = heard, joined
        self.parts: dict[str, Tensor] = {}

    def labels(self, tensor: Any) -> tuple[frozenset[str], frozenset[str]]:
        owner, found = getattr(tensor, "_stream_labels", (None, _NOTHING))
        return found if owner is self else _NOTHING

    def _label(self, value: Any, labels: tuple[frozenset[str], frozenset[str]]) -> None:
        for tensor in _tensors(value):
            if not isinstance(tensor, nn.Parameter):
                tensor._stream_labels = (self, labels)  # type: ignore[attr-defined]

    def _union(self, values: Any) -> tuple[frozenset[str], frozenset[str]]:
        found = _NOTHING
        for tensor in _tensors(values):
            more = self.labels(tensor)
            if more is not _NOTHING and more != found:
                found = (found[0] | more[0], found[1] | more[1])
        return found

    def sink(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._read(path, inputs)
            way = self.joined.paths[path]
            way.calls += 1
            way.after, way.plain = (), True
            self._label(output, (frozenset({path}), frozenset()))

        return hook

    def layer(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._read(path, inputs)
            self._label(output, _NOTHING)

        return hook

    def between(self, path: str) -> Any:
        """A module that is neither: a norm, a layer scale, or one that holds parameters of its own around layers."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            given = self._union(inputs)
            if self.joined.readers:
                self._read(path, inputs)
            made = self._union(output)
            for sink in given[0] & made[0]:
                way = self.joined.paths[sink]
                way.after, way.plain = (*way.after, path), True
            if path in self.joined.readers:
                self._label(output, (made[0], frozenset({path})))

        return hook

    def _read(self, reader: str | None, values: Any) -> None:
        for norm in self._union(values)[1]:
            self.joined.readers[norm].add(reader)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        labels = self._union((args, kwargs))
        if labels is _NOTHING or labels == _NOTHING:
            result = func(*args, **kwargs)
            for tensor in _tensors(result):
                if self.labels(tensor) is not _NOTHING:
                    self._label(tensor, _NOTHING)
            return result
        name = func.overloadpacket.__name__
        joins = bool(labels[0]) and self._joins(name, args, kwargs)
        if joins:
            self._read(None, args)
            labels = _NOTHING
        elif labels[0] and name.rstrip("_") not in LAYOUT and name not in _LAYOUT:
            self._changed(name, args, labels[0])
        result = func(*args, **kwargs)
        self._label(result, labels)
        return result

    def _joins(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether an add puts a sink's output on the stream; tells who listens, before anything is written in place."""
        if name == "addcmul":
            before, added = args[0], args[1] * args[2] if not self.labels(args[0])[0] else None
            return added is not None and self._tell(self._union(args[1:])[0], before, added)
        if name not in _ADDS or kwargs.get("alpha", 1) != 1 or not all(isinstance(side, Tensor) for side in args[:2]):
            return False
        one, other = args[:2]
        if one.shape != other.shape or isinstance(one, nn.Parameter) or isinstance(other, nn.Parameter):
            return False
        first, second = self.labels(one)[0], self.labels(other)[0]
        if first and second:
            return False
        return self._tell(first, other, one) if first else self._tell(second, one, other)

    def _tell(self, sinks: frozenset[str], before: Tensor, added: Tensor) -> bool:
        for sink in sorted(sinks):
            self.joined.paths[sink].joins += 1
            self.heard(sink, before, self.parts.pop(sink, added))
        return True

    def _changed(self, name: str, args: Any, sinks: frozenset[str]) -> None:
        """What two sublayers give side by side is added up before it joins; anything else changes it."""
        if name in _ADDS and all(isinstance(side, Tensor) for side in args[:2]):
            sides = [self.labels(side)[0] for side in args[:2]]
            if sides[0] and sides[1] and not sides[0] & sides[1]:
                for side, labels in zip(args[:2], sides, strict=True):
                    for sink in labels:
                        self.parts.setdefault(sink, side)
                return
        for sink in sinks:
            self.joined.paths[sink].plain = False


_LAYOUT = frozenset({"_reshape_alias", "as_strided", "new_empty", "empty_like", "index_select", "copy"})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
