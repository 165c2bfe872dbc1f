"""MLPs whose activation has faded: two linear layers become one.

``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``: VanillaNet (Chen et al. 2023, arXiv 2305.12972), sec. 3.1.
Shapes: C width of the model, F of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.anatomy import Anatomy, Block
from compress.layers import FadedActivation, Identity
from compress.rehearsal import stand_in
from compress.surgery import Surgery

__all__ = ["Joinable", "join", "joinable"]

_SAME_DB = 80.0


@dataclass(frozen=True)
class Joinable:
    """A block whose MLP can become one layer: ``up`` [F, C] and ``down`` [C, F]."""

    block: Block
    up: str
    down: str


def joinable(model: nn.Module, anatomy: Anatomy, blocks: list[Block]) -> tuple[dict[str, Joinable], dict[str, str]]:
    """By the path of each block: its MLP, or why it cannot become one layer. Tried on one row, not read from classes."""
    signature, example = anatomy.traced
    row = {name: tensor[:1] for name, tensor in example.items()}
    found, reasons = {}, {}
    for block in blocks:
        one = _mlp(model, block)
        reason = one if isinstance(one, str) else _obstacle(model, signature.call, row, one)
        if reason:
            reasons[block.path] = reason
        else:
            assert isinstance(one, Joinable)
            found[block.path] = one
    return found, reasons


def _mlp(model: nn.Module, block: Block) -> Joinable | str:
    roles = {role: [site.path for site in block.sites if role in site.roles] for role in ("mlp.up", "mlp.down", "mlp.gate")}
    if roles["mlp.gate"]:
        return "its MLP has a gate: what is left without an activation is a product, and not linear"
    if len(roles["mlp.up"]) != 1 or len(roles["mlp.down"]) != 1:
        return "it has no MLP of two linear layers"
    up, down = (model.get_submodule(roles[role][0]) for role in ("mlp.up", "mlp.down"))
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear)) or down.bias is None:
        return "its MLP is not made of two linear layers with a bias"
    if up.in_features > down.in_features:
        return "its MLP is narrower than the model: two layers are smaller than one"
    return Joinable(block, roles["mlp.up"][0], roles["mlp.down"][0])


def _obstacle(model: nn.Module, call: Callable[[nn.Module, Batch], Tensor], row: Batch, one: Joinable) -> str:
    trial, faded = stand_in(model), FadedActivation()
    faded.attach(trial, one.block.path)
    with torch.no_grad(), evaluating(trial):
        before = call(trial, row).float()
        if faded.calls != 1:
            return (
                f"{faded.calls} activations run in it that are known" if faded.calls else "no activation runs in it that is known"
            )
        join(trial, Surgery(), one)
        after = call(trial, row).float()
    same = torch.equal(before, after) or sqnr_db(before, after) >= _SAME_DB
    return "" if same else "something else is between the layers of its MLP"


def join(model: nn.Module, surgery: Surgery, one: Joinable) -> None:
    """The first layer becomes the identity, the second both; their block has a ``FadedActivation``."""
    up, down = model.get_submodule(one.up), model.get_submodule(one.down)
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    first, second = up.weight.detach().double(), down.weight.detach().double()
    constant = down.bias.detach().double()
    if up.bias is not None:
        constant = constant + second @ up.bias.detach().double()
    surgery.replace(model, one.up, Identity())
    surgery.narrow(model, one.down, "weight", 1, list(range(up.in_features)))
    surgery.set(model, one.down, "in_features", up.in_features)
    for name, made in (("weight", second @ first), ("bias", constant)):
        old = down.get_parameter(name)
        setattr(down, name, nn.Parameter(made.to(old), requires_grad=old.requires_grad))
