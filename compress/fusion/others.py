"""The other models of a fusion: where they come from, and whether they can be fused with the recipe's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Signature
from compress.anatomy import Anatomy, find
from compress.fusion.axes import SAME_DB, Layout, layout_of, with_parameters
from compress.sections import FilePath, Section
from compress.sources import check_finite, digest_tensors, load_model, read_weights

if TYPE_CHECKING:
    from compress.passes.contract import Given

__all__ = ["Loaded", "Other", "files_of", "load", "parameters_of"]


_SETTINGS = frozenset(("act", "activation", "eps", "epsilon", "theta", "scaling", "scale", "type", "before", "window", "pooling"))
"""Words in the names of settings that change what a model computes: hidden_act, layer_norm_eps, position_embedding_type."""
_OTHERWISE = frozenset(("size", "dropout", "init", "problem"))
"""Words of settings that do not, whatever else they are called: activation_dropout, type_vocab_size, problem_type."""


class Other(Section):
    """Another model, as a mapping: where it comes from and, for a model of timm, its weights."""

    source: str = Field(description="as in model.source, or a safetensors file with other weights of the recipe's own model")
    checkpoint: FilePath | None = Field(None, description="safetensors file with the weights of a timm model")

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True)
class Loaded:
    """A model that can be fused with the recipe's, with its axes; ``fingerprint`` of its weights."""

    name: str
    model: nn.Module
    layout: Layout
    fingerprint: str


def load(other: Other, model: nn.Module, anatomy: Anatomy, layout: Layout, base: Path, given: Given, where: str) -> Loaded:
    """Loads another model and checks it against the recipe's.

    Args:
        model: the recipe's, with its parts and axes.
        base: the folder that relative paths start from.
        given: what is known of the recipe's model besides.
        where: the place of the option, for errors.

    Raises:
        UserError: it cannot be read, it needs ``--trust``, or it is not alike enough; says in what.
    """
    where = f"{where}: {other}"
    if other.source.endswith(".safetensors"):
        found, fingerprint = _filled(model, base / Path(other.source).expanduser())
        check_finite(found, where)
        _same_function(where, model, found, anatomy, alike=True)
        return Loaded(str(other), found, layout, fingerprint)
    try:
        source = load_model(other.source, base=base, trust=given.trust, task=given.task, checkpoint=other.checkpoint)
    except UserError as error:
        if error.where.partition(".")[0] == "model":  # the recipe's own is named there
            error.where = "with" + error.where.removeprefix("model")
        raise
    found, fingerprint = source.model, source.fingerprint
    if other.source.startswith("timm:") and other.checkpoint is None:
        hint = "Write {source: timm:name, checkpoint: file.safetensors}."
        raise UserError(where, "has random weights: no checkpoint was given", hint)
    if source.signature.inputs != anatomy.traced[0].inputs:
        what = f"takes {_shown(source.signature)}; the recipe's model {_shown(anatomy.traced[0])}"
        raise UserError(where, what, "Fuse models that take the same inputs.")
    _same_facts(where, source, given)
    _same_parameters(where, model, found)
    signature, example = anatomy.traced
    _runs(where, found, anatomy)
    parts = find(found, signature, example, given.roles)
    if len(parts.blocks) != len(anatomy.blocks):
        what = f"has {len(parts.blocks)} blocks, the recipe's model {len(anatomy.blocks)}"
        raise UserError(where, what, "Fuse models of one depth; drop_layers makes a model shorter.")
    mine = layout_of(found, parts, where)
    _same_axes(where, (found, mine), (model, layout))
    _same_function(where, model, found, anatomy, alike=mine.axes == layout.axes)
    return Loaded(str(other), found, mine, fingerprint)


def files_of(other: Other, base: Path) -> list[Path]:
    """The files that another model is read from."""
    kind, _, rest = other.source.partition(":")
    if other.source.endswith(".safetensors"):
        return [base / Path(other.source).expanduser()]
    if kind == "hf":
        from compress.huggingface_folder import find_folder

        folder = find_folder(rest, base)
        return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt", ".model"))
    if kind == "timm":
        return [] if other.checkpoint is None else [base / other.checkpoint]
    return [] if kind == "embedded" else [base / Path(other.source.rpartition(":")[0]).expanduser()]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, without gradients."""
    return {name: one.detach() for name, one in model.named_parameters()}


def _filled(model: nn.Module, path: Path) -> tuple[nn.Module, str]:
    """A copy of the recipe's model with the weights of a file, which may leave out tied ones."""
    weights, found = read_weights(path), copy.deepcopy(model)
    own = found.state_dict(keep_vars=True)
    tied = {id(own[name]) for name in weights if name in own}
    absent = sorted(name for name, tensor in own.items() if name not in weights and id(tensor) not in tied)
    strange = sorted(set(weights) - set(own))
    hint = "It was saved from another model; for that, name its folder or its source."
    if absent or strange:
        what = f"lacks the weight {absent[0]}" if absent else f"has the weight {strange[0]}, which the recipe's model lacks"
        raise UserError(str(path), what, hint)
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            what = f"{name} is {list(tensor.shape)}, the recipe's model has {list(own[name].shape)}"
            raise UserError(str(path), what, hint)
    found.load_state_dict(weights, strict=False)
    return found, digest_tensors(weights)


def _shown(signature: Signature) -> str:
    return ", ".join(f"{spec.name} [{', '.join(map(str, spec.shape))}]" for spec in signature.inputs)


def _same_facts(where: str, source: Any, given: Given) -> None:
    """What the weights do not show: names of classes, the vocabulary, how pixels become numbers."""
    if given.labels and source.labels and given.labels != source.labels:
        number = next((n for n in given.labels if given.labels[n] != source.labels.get(n)), len(given.labels))
        told = f"{source.labels.get(number, 'none')!r}, of the recipe's model {given.labels.get(number, 'none')!r}"
        raise UserError(where, f"has other classes: class {number} is {told}", "Fuse models of the same classes.")
    if given.tokenizer is not None and source.tokenizer is not None:
        mine, its = given.tokenizer.raw.get_vocab(), source.tokenizer.raw.get_vocab()
        if mine != its:
            word = next(iter(sorted(mine.items() ^ its.items(), key=str)))[0]
            what = f"has another vocabulary ({len(its)} and {len(mine)} tokens; {word!r} is not in both, or at another number)"
            raise UserError(where, what, "Fuse models that share a tokenizer.")
    if given.preprocessing and source.preprocessing:
        for key in ("mean", "std", "scale"):
            mine, its = given.preprocessing.get(key), source.preprocessing.get(key)
            if mine != its:
                hint = "Fuse models that read pixels alike, or correct its preprocessor_config.json."
                raise UserError(where, f"reads pixels in another way: {key} {its}, the recipe's model {mine}", hint)


def _same_parameters(where: str, model: nn.Module, found: nn.Module) -> None:
    own, its = dict(model.named_parameters()), dict(found.named_parameters())
    counts = [len(_numbered(names)) for names in (its, own)]
    if own.keys() == its.keys():
        return
    strange = sorted(its.keys() - own.keys()) or sorted(own.keys() - its.keys())
    if counts[0] != counts[1]:
        what = f"has {counts[0]} entries in its lists of layers, the recipe's model {counts[1]}"
        raise UserError(where, what, "Fuse models of one depth; drop_layers makes a model shorter.")
    has = "has" if strange[0] in its else "lacks"
    hint = "Fuse models of one architecture, before other passes change it; widths may differ."
    raise UserError(where, f"is of another architecture: it {has} {strange[0]}", hint)


def _numbered(names: Mapping[str, Any]) -> set[str]:
    """Paths that end in a number, such as ``layers.3``."""
    pieces = [name.split(".") for name in names]
    return {".".join(p[: at + 1]) for p in pieces for at, piece in enumerate(p) if piece.isdigit()}


def _runs(where: str, model: nn.Module, anatomy: Anatomy) -> None:
    """Raises where the model does not take the rows of the recipe's."""
    signature, example = anatomy.traced
    try:
        with evaluating(model):
            signature.call(model, example)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        told = str(error).strip().partition("\n")[0][:200]
        raise UserError(where, f"does not take the rows of the recipe's model: {told}", "Fuse models of one input.") from None


def _same_axes(where: str, other: tuple[nn.Module, Layout], anchor: tuple[nn.Module, Layout]) -> None:
    """Dimensions that nothing is matched along have to be equal, and axes of one kind have to be in the same places."""
    its, own = parameters_of(other[0]), parameters_of(anchor[0])
    for name, tensor in own.items():
        uses = anchor[1].uses.get(name, {})
        there = other[1].uses.get(name, {})
        laid = [{dim: [(p.axis, p.side) for p in pieces] for dim, pieces in part.items()} for part in (uses, there)]
        if laid[0] != laid[1] or tensor.dim() != its[name].dim():
            hint = "Fuse models of one architecture; widths and heads may differ."
            raise UserError(where, f"{name} has another layout than in the recipe's model", hint)
        if name in anchor[1].left:
            continue
        for dim in range(tensor.dim()):
            if dim not in uses and tensor.shape[dim] != its[name].shape[dim]:
                what = f"{name} has {its[name].shape[dim]} {_fixed(anchor[0], name, dim)}, the recipe's model {tensor.shape[dim]}"
                raise UserError(where, what, "These cannot be matched: fuse models that have the same.")
    for name, axis in anchor[1].axes.items():
        if axis.ordered and axis.size // axis.heads != other[1].axes[name].size // other[1].axes[name].heads:
            what = "its heads are of another width, and their units have an order of their own (rotary positions)"
            raise UserError(where, what, "Fuse models whose heads have one width.")


def _same_function(where: str, model: nn.Module, found: nn.Module, anatomy: Anatomy, *, alike: bool) -> None:
    """What the weights do not show: activations, epsilons, buffers. With the other's parameters the recipe's model has to compute
    what the other does; where widths or heads differ (not ``alike``), the configurations have to say the same."""
    own, its = parameters_of(model), parameters_of(found)
    hint = "Fuse models of one architecture and one configuration."
    if not alike or any(own[name].shape != its[name].shape for name in own):
        mine, theirs = (_function_of(getattr(one, "config", None)) for one in (model, found))
        for name in sorted(mine.keys() & theirs.keys()):
            if mine[name] != theirs[name]:
                raise UserError(where, f"has {name} {theirs[name]}, the recipe's model {mine[name]}", hint)
        return
    signature, example = anatomy.traced
    copy = with_parameters(model, its)
    with evaluating(found):
        expected = signature.call(found, example)
    with evaluating(copy):
        given = signature.call(copy, example)
    if given.shape != expected.shape or not (torch.equal(given, expected) or sqnr_db(expected, given) >= SAME_DB):
        what = "computes something else than the recipe's model does with the same weights (activations, epsilons, buffers)"
        raise UserError(where, what, hint)


def _function_of(config: Any) -> dict[str, Any]:
    """Settings of a configuration of transformers that change the function and are no sizes."""
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    words = {name: set(name.split("_")) for name in told}
    return {name: told[name] for name in told if _SETTINGS & words[name] and not _OTHERWISE & words[name]}


def _fixed(model: nn.Module, name: str, dim: int) -> str:
    """What a dimension counts that has no axis, in words."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return "entries (words, positions)"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "channels" if dim == 1 else "pixels a side of a patch"
    return "classes" if isinstance(module, nn.Linear) else "tokens"
