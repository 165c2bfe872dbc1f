"""Hash codes learnt from a model's own attention maps, without labels. Tensors in, tensors out.

First bit by bit, as in supervised hashing with kernels (Liu et al. 2012, CVPR, sec. 3) and EcoFormer (arXiv 2209.09004): of each
query's keys those with the largest scores should agree with it, those with the smallest should not, and each bit takes from what
the bits before it left. Then all of it at once, by the divergence of the rows, with straight-through gradients.

Shapes: R rows of data, H heads, T queries, S keys, D head width, M anchors, N bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.algorithms.hash_codes import FLOOR, HashCodes, row_weights, sign, softmax_rows, through

__all__ = ["Fit", "Learnt", "Maps", "draw", "fit_of", "greedy", "learn", "refine"]

_RIDGE = 1e-3
_SLOPE = 2.0
_GREEDY_STEPS, _GREEDY_RATE, _GREEDY_ROWS = 20, 0.1, 32
_RATE = 0.02
_ROWS = 16
_SHARES = (0.25, 0.5, 0.75, 1.0)
_LEAST = 1e-9


@dataclass(frozen=True)
class Maps:
    """Queries and keys of an attention, from which its maps follow.

    Attributes:
        queries: [R, H, T, D]; keys: [R, H, S, D].
        bias: [R, 1 or H, S, 1], what a mask adds to the scores of each key; None: nothing is masked.
        asked: [R, T], which queries count.
        allowed: [R, S], which keys do.
        scale: of the scores.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    asked: Tensor
    allowed: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.queries)

    def rows(self, chosen: Tensor | slice) -> Maps:
        bias = None if self.bias is None else self.bias[chosen]
        taken = (self.queries[chosen], self.keys[chosen], bias, self.asked[chosen], self.allowed[chosen])
        return Maps(*taken, self.scale)

    def softmax(self) -> Tensor:
        return softmax_rows(self.queries, self.keys, self.scale, self.bias)

    def tokens(self, x: Tensor, which: Tensor) -> Tensor:
        """Those of [R, H, T, D] that count, [H, n, D]."""
        return x.transpose(1, 2)[which].transpose(0, 1)


@dataclass(frozen=True)
class Learnt:
    """Codes, and how near each stage of learning came to the soft rows, on rows that were not learnt from.

    Attributes:
        stages: by name: ``keys_only`` (no codes: every query weighs keys alike), ``random`` (codes of chance), ``greedy`` (bit by
            bit), ``learnt`` (what is kept).
    """

    codes: HashCodes
    stages: Mapping[str, Fit]


def learn(
    maps: Maps,
    held: Maps,
    bits: int,
    anchors: int,
    pairs: int,
    steps: int,
    generator: torch.Generator,
    shared: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Learnt:
    """Draws codes, learns their bits one by one, then refines it all; each head begins with what is nearer of the first two.

    Args:
        held: rows to judge by.
        bits, anchors: N and M.
        pairs: keys that a query should agree with, and as many that it should not.
        steps: of the refinement.
        shared: one projection for queries and keys.

    Raises:
        ValueError: fewer queries or keys count than there are anchors.
    """
    if min(int(maps.asked.sum()), int(maps.allowed.sum())) < anchors:
        raise ValueError(f"{int(maps.asked.sum())} queries and {int(maps.allowed.sum())} keys for {anchors} anchors")
    chance = draw(maps, bits, anchors, generator, shared)
    some = maps.rows(slice(_GREEDY_ROWS))
    found = greedy(chance, some, pairs)
    fits = [fit_of(one, some).divergence for one in (chance, found)]
    start = _nearer(found, chance, fits[1] <= fits[0])
    made = refine(start, maps, held, steps, generator, progress)
    none = chance.but(weights=torch.zeros_like(chance.weights))
    every = {"keys_only": none, "random": chance, "greedy": found, "learnt": made}
    return Learnt(made, {name: fit_of(one, held) for name, one in every.items()})


def draw(maps: Maps, bits: int, anchors: int, generator: torch.Generator, shared: bool = False) -> HashCodes:
    """Codes of chance: anchors drawn from queries and keys, the kernel as wide as they are apart on average, a random projection.

    The gate is exact: the mean query, times the scale.
    """
    sides = (maps.tokens(maps.queries, maps.asked), maps.tokens(maps.keys, maps.allowed))
    centre = torch.stack([side.mean(1) for side in sides])  # [2, H, D]
    moved = [side - middle.unsqueeze(1) for side, middle in zip(sides, centre, strict=True)]
    units = [side / side.norm(dim=-1, keepdim=True).clamp(min=1e-12) for side in moved]
    halves = (anchors - anchors // 2, anchors // 2)
    picked = [torch.randperm(unit.shape[1], generator=generator)[:half] for unit, half in zip(units, halves, strict=True)]
    chosen = torch.cat([unit[:, pick] for unit, pick in zip(units, picked, strict=True)], 1)
    some = torch.cat([unit[:, : 4 * anchors] for unit in units], 1)
    width = torch.cdist(some, chosen).mean((1, 2)).clamp(min=1e-3)
    heads = len(width)
    made = torch.randn(1, heads, bits, chosen.shape[1], generator=generator).repeat(1 if shared else 2, 1, 1, 1)
    plain = torch.full((heads, bits), (1 - FLOOR) / bits)
    codes = HashCodes(centre, chosen, width, made, torch.zeros(made.shape[:3]), plain, centre[0] * maps.scale)
    return _even(codes, maps)


def greedy(codes: HashCodes, maps: Maps, pairs: int) -> HashCodes:
    """Bit after bit, learnt from the ``pairs`` keys of each query that score highest and as many that score lowest.

    A bit begins as the direction that agrees best without its sign, or as that of chance where this is better, and follows the
    gradient of its smoothed sign from there.
    """
    kernels = [codes.kernel(x, side) for side, x in enumerate((maps.queries, maps.keys))]
    task = _Pairs.of(codes, maps, [kernel - mean for kernel, mean in zip(kernels, _means(kernels, maps), strict=True)], pairs)
    projections, weights = [], []
    sides = len(codes.projection)
    for number in range(codes.projection.shape[2]):
        chance = [codes.projection[side % sides, :, number] for side in (0, 1)]
        found = task.climbed(task.better(task.direction(sides == 1), chance), sides == 1)
        weights.append(task.take(found))
        projections.append(torch.stack(found[:sides]))
    made = _even(codes.but(projection=torch.stack(projections, 2)), maps)
    return _scaled(made, torch.stack(weights, 1), maps)


def refine(
    codes: HashCodes,
    maps: Maps,
    held: Maps,
    steps: int,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda done: None,
) -> HashCodes:
    """Everything but the centres learns to give the rows of softmax attention (their divergence in nats), by Adam.

    The gradient of a sign is one where its argument is between -1 and 1, and zero elsewhere (EcoFormer, sec. 4.2). What is
    nearest on the held-out rows stays, the start included.
    """
    student = _Student(codes)
    optimizer = torch.optim.Adam(student.parameters, lr=_RATE)
    best, least = codes, float(fit_of(codes, held).divergence.mean())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = maps.rows(torch.randperm(len(maps), generator=generator)[:_ROWS])
        with torch.enable_grad():
            loss = _divergence(chosen.softmax(), student.rows(chosen), chosen.asked).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(step + 1)
        if step % 50 == 49 or step == steps - 1:
            now = student.codes()
            level = float(fit_of(now, held).divergence.mean())
            if level < least:
                best, least = now, level
    return best


@dataclass(frozen=True)
class Fit:
    """How near hashed rows are to those of softmax attention, by head.

    Attributes:
        divergence: [H], mean over queries of the divergence of the hashed row from the soft one, in nats.
        correlation: [H], of all entries that count.
    """

    divergence: Tensor
    correlation: Tensor


@torch.no_grad()
def fit_of(codes: HashCodes, maps: Maps, step: int = _ROWS) -> Fit:
    """Judges codes on maps, some rows of data at a time."""
    divergence, counted = torch.zeros(len(codes.width), dtype=torch.float64), 0
    sums = torch.zeros(5, len(codes.width), dtype=torch.float64)
    number = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(maps), step):
        part = maps.rows(slice(start, start + step))
        soft = part.softmax()
        hashed = _rows(codes, part)
        asked = part.asked
        divergence += _divergence(soft, hashed, asked, mean=False).double()
        counted += int(asked.sum())
        mask = (asked.unsqueeze(-1) & part.allowed.unsqueeze(1)).unsqueeze(1).double()
        x, y = soft.double() * mask, hashed.double() * mask
        sums += torch.stack([t.sum((0, 2, 3)) for t in (x, y, x * x, y * y, x * y)])
        number += mask.sum()
    mean = sums / number
    spread = (mean[2] - mean[0] ** 2) * (mean[3] - mean[1] ** 2)
    correlation = (mean[4] - mean[0] * mean[1]) / spread.clamp(min=1e-30).sqrt()
    return Fit((divergence / max(counted, 1)).float(), correlation.float())


class _Student:
    """Codes whose tensors learn."""

    def __init__(self, codes: HashCodes) -> None:
        self.first = codes
        share = codes.weights.sum(-1, keepdim=True).clamp(1e-3, (1 - FLOOR) * (1 - 1e-3)) / (1 - FLOOR)
        self.raw = codes.weights.clamp(min=1e-4).log()
        self.share = (share / (1 - share)).log()
        self.log_width = codes.width.log()
        self.projection, self.shift, self.gate = codes.projection.clone(), codes.shift.clone(), codes.gate.clone()
        self.anchors = codes.anchors
        self.parameters = [self.raw, self.share, self.log_width, self.projection, self.shift, self.gate]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _made(self) -> HashCodes:
        weights = self.raw.softmax(-1) * self.share.sigmoid() * (1 - FLOOR)
        return self.first.but(
            width=self.log_width.exp(), projection=self.projection, shift=self.shift, weights=weights, gate=self.gate
        )

    def rows(self, maps: Maps) -> Tensor:
        return _rows(self._made(), maps, through)

    @torch.no_grad()
    def codes(self) -> HashCodes:
        made = self._made()
        return made.but(**{name: tensor.detach().clone() for name, tensor in made.tensors().items()})


def _rows(codes: HashCodes, maps: Maps, signed: Callable[[Tensor], Tensor] = sign) -> Tensor:
    made = [codes.codes(x, side, signed) for side, x in enumerate((maps.queries, maps.keys))]
    return row_weights(made[0], made[1], codes.weights, codes.key_logits(maps.keys, maps.bias))


def _divergence(soft: Tensor, hashed: Tensor, asked: Tensor, mean: bool = True) -> Tensor:
    """By head [H], of the rows of queries that count: their mean, or their sum."""
    rows = (soft * ((soft + _LEAST).log() - (hashed + _LEAST).log())).sum(-1)
    total = (rows * asked.unsqueeze(1)).sum((0, 2))
    return total / asked.sum() if mean else total


@dataclass
class _Pairs:
    """Which keys a query should and should not agree with, and what bits have left of it so far.

    Attributes:
        kernels: of queries [R, H, T, M] and keys [R, H, S, M], their means taken off.
        keys: [R, H, T, pairs], which keys they are.
        wanted: [R, H, T, pairs], 1 for those that score highest, -1 for those that score lowest, 0 for those that do not count.
        left: what is left of that.
    """

    kernels: list[Tensor]
    keys: Tensor
    wanted: Tensor
    left: Tensor

    @classmethod
    def of(cls, codes: HashCodes, maps: Maps, kernels: list[Tensor], pairs: int) -> _Pairs:
        """Scores are taken without what the gate gives."""
        scores = (maps.queries - codes.centre[0].unsqueeze(1)) @ maps.keys.transpose(-1, -2)
        allowed = maps.allowed[:, None, None, :]
        count = max(1, min(pairs, scores.shape[-1] // 2))
        highest = scores.masked_fill(~allowed, -math.inf).topk(count, -1).indices
        lowest = scores.masked_fill(~allowed, math.inf).topk(count, -1, largest=False).indices
        keys = torch.cat([highest, lowest], -1)
        counts = allowed.expand_as(scores).gather(-1, keys) & maps.asked[:, None, :, None]
        wanted = counts * torch.tensor([1.0] * count + [-1.0] * count)
        return cls(kernels, keys, wanted, wanted.clone())

    def bits(self, directions: list[Tensor], signed: Callable[[Tensor], Tensor]) -> Tensor:
        """Products of the bits of each pair, [R, H, T, pairs]."""
        query, key = (signed(kernel @ one.unsqueeze(-1)) for kernel, one in zip(self.kernels, directions, strict=True))
        every = key.transpose(-1, -2).expand(-1, -1, self.keys.shape[2], -1)
        return query * every.gather(-1, self.keys)

    def agreement(self, directions: list[Tensor], signed: Callable[[Tensor], Tensor] = sign) -> Tensor:
        """By head [H], how far a bit gives what is left, from -1 to 1."""
        total: Tensor = (self.left * self.bits(directions, signed)).sum((0, 2, 3))
        return total / self.left.abs().sum((0, 2, 3)).clamp(min=1e-12)

    def take(self, directions: list[Tensor]) -> Tensor:
        """The weight [H] with which a bit gives most of what is left; that is taken off."""
        bits = self.bits(directions, sign)
        weight = ((self.left * bits).sum((0, 2, 3)) / self.wanted.abs().sum((0, 2, 3)).clamp(min=1)).clamp(min=0)
        self.left = self.left - weight[:, None, None] * bits * self.wanted.abs()
        return weight

    def direction(self, shared: bool) -> list[Tensor]:
        """For queries and keys the directions [H, M] whose values, not their signs, agree best at a variance of one."""
        moments = [torch.einsum("rhtm,rhtn->hmn", kernel, kernel) / (len(kernel) * kernel.shape[2]) for kernel in self.kernels]
        shape = (*self.keys.shape[:3], self.kernels[1].shape[2])
        matrix = torch.zeros(shape).scatter_add_(-1, self.keys, self.left)
        cross = torch.einsum("rhtm,rhtn->hmn", self.kernels[0], matrix @ self.kernels[1])
        if shared:
            root = _inverse_root(moments[0] + moments[1])
            inner = root @ cross @ root
            _, vectors = torch.linalg.eigh(inner + inner.transpose(-1, -2))
            return [(root @ vectors[..., -1:]).squeeze(-1)] * 2
        roots = [_inverse_root(moment) for moment in moments]
        left, _, right = torch.linalg.svd(roots[0] @ cross @ roots[1])
        return [(roots[0] @ left[..., :1]).squeeze(-1), (roots[1] @ right[..., :1, :].transpose(-1, -2)).squeeze(-1)]

    def better(self, one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        """Of two pairs of directions that which agrees more, for each head."""
        wins = (self.agreement(one) >= self.agreement(other)).unsqueeze(-1)
        return [torch.where(wins, first, second) for first, second in zip(one, other, strict=True)]

    def climbed(self, start: list[Tensor], shared: bool) -> list[Tensor]:
        """The directions after gradient steps on the smoothed agreement; of those that were seen, each head's best."""
        moving = [direction.clone().requires_grad_(True) for direction in (start[:1] if shared else start)]
        optimizer = torch.optim.SGD(moving, lr=_GREEDY_RATE, momentum=0.9, nesterov=True)
        best = start
        for step in range(_GREEDY_STEPS):
            with torch.enable_grad():
                loss = -self.agreement([moving[0], moving[-1]], lambda x: torch.tanh(_SLOPE * x)).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 5 == 4:
                best = self.better(best, [moving[0].detach().clone(), moving[-1].detach().clone()])
        return best


def _means(kernels: list[Tensor], maps: Maps) -> list[Tensor]:
    """Of the kernel's values over the tokens that count, [H, 1, M] for queries and keys."""
    which = (maps.asked, maps.allowed)
    return [maps.tokens(kernel, side).mean(1, keepdim=True) for kernel, side in zip(kernels, which, strict=True)]


def _even(codes: HashCodes, maps: Maps) -> HashCodes:
    """The projection scaled so that bits have a deviation of one before their sign, and the shift that makes their mean 0."""
    which = (maps.asked, maps.allowed)
    kernels = [maps.tokens(codes.kernel(x, side), which[side]) for side, x in enumerate((maps.queries, maps.keys))]
    if len(codes.projection) == 1:
        kernels = [torch.cat(kernels, 1)]
    signals = [kernel @ made.transpose(-1, -2) for kernel, made in zip(kernels, codes.projection, strict=True)]  # [H, n, N]
    deviation = torch.stack([signal.std(1) for signal in signals]).clamp(min=1e-6)
    mean = torch.stack([signal.mean(1) for signal in signals])
    return codes.but(projection=codes.projection / deviation.unsqueeze(-1), shift=mean / deviation)


def _inverse_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    floor = _RIDGE * values.mean(-1, keepdim=True).clamp(min=1e-12)
    root: Tensor = (vectors / (values.clamp(min=0) + floor).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return root


def _nearer(one: HashCodes, other: HashCodes, first: Tensor) -> HashCodes:
    """The tensors of the one for heads where ``first`` [H] holds, else of the other; both have the same centre and anchors."""
    axes = {"projection": 1, "shift": 1, "weights": 0}
    chosen = {}
    for name, axis in axes.items():
        value = getattr(one, name)
        shape = [1] * value.dim()
        shape[axis] = len(first)
        chosen[name] = torch.where(first.reshape(shape), value, getattr(other, name))
    return one.but(**chosen)


def _scaled(codes: HashCodes, weights: Tensor, maps: Maps) -> HashCodes:
    """The weights of the bits, as large as brings each head's rows nearest to the soft ones."""
    unit = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    tried = [codes.but(weights=unit * share * (1 - FLOOR)) for share in _SHARES]
    levels = torch.stack([fit_of(one, maps).divergence for one in tried])  # [shares, H]
    best = levels.argmin(0)
    chosen = torch.stack([one.weights for one in tried])[best, torch.arange(len(best))]
    return codes.but(weights=chosen)
