"""Changes to a model's module tree, recorded so that they can be replayed on a fresh model without calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from compress.layers.attached import Attached

__all__ = ["Edit", "Surgery", "parent_of"]


@dataclass(frozen=True)
class Edit:
    """One change: ``replace`` the module at ``path`` by a layer of ``compress.layers`` made from ``config``, ``keep`` only
    the children ``config["indices"]`` of the list at ``path``, or ``set`` the attribute ``config["name"]`` (plain JSON
    values only) of the module at ``path``; ``share``: the module at ``path`` becomes the one at ``config["with"]``;
    ``narrow``: the tensor ``config["name"]`` of the module at ``path`` keeps ``config["size"]`` entries of its axis
    ``config["axis"]``; ``attach``: a layer of ``compress.layers`` made from ``config`` acts on the forward of the module at
    ``path``; ``merge``: the module at ``path`` becomes a ``Sequence`` of a layer made from ``config["layer"]`` and of its own
    children ``config["then"]``, in that order."""

    verb: str
    path: str
    layer: str = ""
    config: dict[str, Any] | None = None

    def json(self) -> dict[str, Any]:
        return {"verb": self.verb, "path": self.path, "layer": self.layer, "config": self.config}


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds ``path`` and the child's name in it."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


class Surgery:
    """Applies edits to a model and keeps the list of them."""

    def __init__(self, edits: list[Edit] | None = None) -> None:
        self.edits: list[Edit] = list(edits or [])

    def replace(self, model: nn.Module, path: str, layer: nn.Module) -> None:
        """Puts ``layer`` (a class of ``compress.layers`` with ``config()``) in the place of the module at ``path``."""
        parent, name = parent_of(model, path)
        layer.train(parent.training)
        setattr(parent, name, layer)
        self.edits.append(Edit("replace", path, type(layer).__name__, layer.config()))  # type: ignore[operator]

    def share(self, model: nn.Module, path: str, with_path: str) -> None:
        """Makes ``path`` the very module at ``with_path`` (tied weights stay tied)."""
        parent, name = parent_of(model, path)
        setattr(parent, name, model.get_submodule(with_path))
        self.edits.append(Edit("share", path, config={"with": with_path}))

    def keep(self, model: nn.Module, path: str, indices: list[int]) -> None:
        """Keeps only the given children of the ``ModuleList`` or ``Sequential`` at ``path``, in that order."""
        children = list(model.get_submodule(path).children())
        parent, name = parent_of(model, path)
        kept = [children[index] for index in indices]
        container = nn.Sequential(*kept) if isinstance(model.get_submodule(path), nn.Sequential) else nn.ModuleList(kept)
        container.training = parent.training
        setattr(parent, name, container)
        self.edits.append(Edit("keep", path, config={"indices": indices}))

    def set(self, model: nn.Module, path: str, name: str, value: Any) -> None:
        """Sets a plain attribute (a number, a string, a list of them), such as a layer index or a head count."""
        target: Any = model.get_submodule(path)
        *holders, last = name.split(".")
        for holder in holders:
            target = getattr(target, holder)
        setattr(target, last, value)
        self.edits.append(Edit("set", path, config={"name": name, "value": value}))

    def narrow(self, model: nn.Module, path: str, name: str, axis: int, kept: list[int]) -> None:
        """Keeps only the given entries, in that order, of one axis of a parameter or buffer of the module at ``path``."""
        module = model.get_submodule(path)
        tensor = getattr(module, name)
        smaller = tensor.detach().index_select(axis, torch.tensor(kept, device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
        else:
            setattr(module, name, smaller)
        self.edits.append(Edit("narrow", path, config={"name": name, "axis": axis, "size": len(kept)}))

    def attach(self, model: nn.Module, path: str, layer: Attached) -> list[RemovableHandle]:
        """Lets ``layer`` act on the forward of the module at ``path``; returns what takes it off again."""
        handles = layer.attach(model, path)
        self.edits.append(Edit("attach", path, type(layer).__name__, layer.config()))
        return handles

    def merge(self, model: nn.Module, path: str, layer: nn.Module | None, then: list[str]) -> None:
        """Makes the module at ``path`` a sequence of ``layer`` (called ``merged``; None: nothing) and some of its children."""
        from compress.layers.plain import Sequence

        parent, name = parent_of(model, path)
        old = model.get_submodule(path)
        made = Sequence()
        if layer is not None:
            made.add_module("merged", layer)
        for child in then:
            made.add_module(child, old.get_submodule(child))
        made.training = parent.training
        if layer is not None:
            layer.train(parent.training)
        setattr(parent, name, made)
        described = None if layer is None else layer.config()  # type: ignore[operator]
        kind = "" if layer is None else type(layer).__name__
        self.edits.append(Edit("merge", path, kind, {"layer": described, "then": then}))

    def replay(self, model: nn.Module, edits: list[Edit]) -> None:
        """Does recorded edits again on a fresh model of the original architecture; tensors are loaded afterwards.

        Raises:
            ValueError: an edit names a layer that is not in ``compress.layers``.
        """
        import compress.layers

        for edit in edits:
            config = edit.config or {}
            if edit.verb in ("replace", "attach", "merge"):
                if edit.layer not in compress.layers.__all__ and (edit.layer or edit.verb != "merge"):
                    raise ValueError(f"{edit.path}: unknown layer {edit.layer!r}")
                if edit.verb == "merge":
                    made = getattr(compress.layers, edit.layer).from_config(config["layer"]) if edit.layer else None
                    self.merge(model, edit.path, made, config["then"])
                    continue
                put = self.replace if edit.verb == "replace" else self.attach
                put(model, edit.path, getattr(compress.layers, edit.layer).from_config(config))
            elif edit.verb == "keep":
                self.keep(model, edit.path, config["indices"])
            elif edit.verb == "share":
                self.share(model, edit.path, config["with"])
            elif edit.verb == "narrow":
                self.narrow(model, edit.path, config["name"], config["axis"], list(range(config["size"])))
            elif edit.verb == "set":
                self.set(model, edit.path, config["name"], config["value"])
            else:
                raise ValueError(f"{edit.path}: unknown edit {edit.verb!r}")
