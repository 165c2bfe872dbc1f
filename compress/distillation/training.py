"""Local distillation without labels: parameters of a part of a model are trained until what comes out of it is again what the
original model gave there.

What the original gave at some modules, or as its output, is recorded once for the calibration rows (``Lesson``). ``distil``
then trains the named parameters with Adam; whatever runs before the first module that has one of them is computed once and
remembered. The state with the least loss on held-out rows is kept, the start included: it never ends worse than it began.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate.capture import counted, split
from calibrate.signature import Batch
from compress.distillation.listening import MOST_BYTES, OUTPUT, Heard, Packed, Part, Store, count, hear, still

__all__ = ["OUTPUT", "Course", "Lesson", "LiveLesson", "Taught", "distil", "valid"]

Call = Callable[[nn.Module, Batch], Tensor]

_DIVERGED = 100.0
"""Times the loss at the start, beyond which training is given up."""
_HELD = 4
"""One part in so many of the memory is the most that held-out rows take: the others are there to learn from."""


@dataclass(frozen=True)
class Course:
    """How long, and how fast.

    Attributes:
        epochs: times that each row to learn from is seen.
        steps: at most so many; None: as many as the epochs have.
        rows: in one step.
        warm_up: share of the steps in which the rate rises; a cosine to zero follows.
        checks: how often the held-out rows are asked, at least once an epoch where that is more seldom.
        patience: it stops after so many checks in a row that were no better.
        seconds: it stops after so many; how many steps those are hangs on the machine.
    """

    epochs: int = 8
    steps: int | None = None
    rows: int = 8
    warm_up: float = 0.05
    checks: int = 20
    patience: int = 6
    seconds: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0


@dataclass(frozen=True)
class Taught:
    """What training brought, on the held-out rows.

    Attributes:
        loss_before, loss_after: mean squared error over mean square, summed over the places that were compared, and the
            divergence of the logits in nats.
        sqnr_db_before, sqnr_db_after: of the mean over those places of squared error over square; None: nothing differs.
        steps: that were made; planned: that would have been without an early stop.
        best_step: whose state is kept; 0: nothing was better than the start, and nothing changed.
        rows, held_rows: learnt from, judged on.
        remembered: whether what runs before the part was computed once only.
        stopped: why it ended before the last step that was planned; "": it did not.
    """

    loss_before: float
    loss_after: float
    sqnr_db_before: float | None
    sqnr_db_after: float | None
    steps: int
    planned: int
    best_step: int
    rows: int
    held_rows: int
    parameters: int
    remembered: bool
    stopped: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)


class Lesson:
    """What a model gives for some rows, and should give again after it was changed.

    Attributes:
        fit, held: batches to learn from and to judge on.
        wanted: for each, what was heard under each key.
        signal: for each key the mean square, over all positions of ``held`` that count.
        left_out: in words, that there was no room for what the model gives for all rows; empty: there was.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        rows: tuple[Sequence[Batch], Sequence[Batch]],
        paths: Mapping[str, str] | Sequence[str] = (),
        output: Literal["", "features", "logits"] = "",
        step: int = 8,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Runs the model, as it is now, over the rows.

        Args:
            rows: to learn from and to judge on; see ``compress.depth.repair.parted``.
            paths: of modules whose output is wanted; as a mapping: path in the model that will be trained -> path in this.
            output: whether the model's own output is wanted, and whether it is logits, compared by the divergence of their
                softmax over the last axis.
            step: rows of a batch, at most.
            most_bytes: that what is recorded may take.
        """
        self.paths = dict(paths) if isinstance(paths, Mapping) else {path: path for path in paths}
        self.output = output
        self.fit, self.held = (list(split(part, step)) for part in rows)
        given = count(self.fit), count(self.held)
        store = Store(sum(given), most_bytes)
        with still(model):
            self.held, judged = self._recorded(model, call, self.held, store, most_bytes - most_bytes // _HELD)
            self.fit, learnt = self._recorded(model, call, self.fit, store)
        self.wanted: tuple[Sequence[dict[str, Packed]], Sequence[dict[str, Packed]]] = (learnt, judged)
        self.left_out = _left_out(given, (count(self.fit), count(self.held)), most_bytes)
        self.signal = {key: self._mean_square(key) for key in self.keys}

    @property
    def keys(self) -> list[str]:
        return [*self.paths, *([OUTPUT] if self.output else [])]

    def _recorded(
        self, model: nn.Module, call: Call, batches: list[Batch], store: Store, spared: int = 0
    ) -> tuple[list[Batch], list[dict[str, Packed]]]:
        """The batches that there is room for, the last perhaps in part, and what was heard for each; so many bytes stay free."""
        kept: list[Batch] = []
        found: list[dict[str, Packed]] = []
        for whole in batches:
            heard, batch = hear(model, call, whole, self.paths, bool(self.output)), whole
            if (room := store.room(heard, count([whole]), spared)) < count([whole]):
                batch = {name: tensor[:room] for name, tensor in whole.items()}
                heard = hear(model, call, batch, self.paths, bool(self.output)) if room else heard
            packed = store.packed(heard, room) if room else None
            if packed is None:
                break
            kept.append(batch)
            found.append(packed)
            if batch is not whole:
                break
        return kept, found

    def _mean_square(self, key: str) -> float:
        total, numbers = 0.0, 0
        for batch, wanted in zip(self.held, self.wanted[1], strict=True):
            values = valid(wanted[key].tensor, batch)
            total, numbers = total + float(values.double().square().sum()), numbers + values.numel()
        return max(total / max(numbers, 1), 1e-30)

    def losses(self, heard: Heard, wanted: Mapping[str, Packed], batch: Batch) -> dict[str, tuple[Tensor, Tensor, int]]:
        """For each key the loss and the squared error over the mean square, both summed over positions, and how many."""
        found = {}
        for key, given in heard.items():
            y, t = valid(given, batch), valid(wanted[key].tensor, batch)
            error = (y.float() - t).square().mean(-1).sum() / self.signal[key]
            loss = error
            if key == OUTPUT and self.output == "logits":
                logs = F.log_softmax(t, -1), F.log_softmax(y.float(), -1)
                loss = (logs[0].exp() * (logs[0] - logs[1])).sum()
            found[key] = (loss, error, y.shape[:-1].numel())
        return found


class LiveLesson(Lesson):
    """A lesson whose wanted outputs are computed when they are needed, by a model that does not change: for many rows, or rows
    that are masked anew each time, there is no room to keep them. Those of held-out rows are kept."""

    def __init__(
        self,
        original: nn.Module,
        call: Call,
        batches: tuple[Sequence[Batch], Sequence[Batch]],
        paths: Sequence[str] = (),
        output: Literal["", "features", "logits"] = "",
    ) -> None:
        """
        Args:
            original: gives what is wanted; it is not changed, and is another object than the model that is trained.
            batches: to learn from and to judge on, each as it will be run.
        """
        super().__init__(original, call, ([], batches[1]), paths, output, max(map(_rows_of, batches[1]), default=1))
        self.fit = list(batches[0])
        self._original, self._call = original, call
        self.wanted = (_Asked(lambda number: self.ask(self.fit[number]), len(self.fit)), self.wanted[1])

    def ask(self, batch: Batch) -> dict[str, Packed]:
        """What the original gives for a batch."""
        with still(self._original):
            heard = hear(self._original, self._call, batch, self.paths, bool(self.output))
        return {key: Packed(value.float()) for key, value in heard.items()}


class _Asked(Sequence[dict[str, Packed]]):
    """What a function gives for each number, asked anew each time."""

    def __init__(self, ask: Callable[[int], dict[str, Packed]], count: int) -> None:
        self._ask, self._count = ask, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        return self._ask(number)


def _rows_of(batch: Batch) -> int:
    return count([batch])


def distil(
    model: nn.Module,
    call: Call,
    lesson: Lesson,
    rates: Mapping[str, float],
    blocks: Sequence[str] = (),
    course: Course | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Taught:
    """Trains parameters of a model until it gives again what the lesson says.

    Parameters that are trained are replaced, not written into, so that another model that shares them keeps its own; those
    that are tied stay tied. All others are as they were, and so are modes and ``requires_grad``.

    Args:
        rates: names of the parameters to train, and the learning rate of each.
        blocks: paths of the model's blocks; those that are done before anything trained runs are not computed again.
    """
    course = course or Course()
    with _learning(model, list(rates)) as learnt:
        part = Part(model, call, (lesson.fit, lesson.held), list(lesson.paths), bool(lesson.output), _owners(rates), blocks)
        training = _Training(part, lesson, learnt, rates, course, progress)
        taught = training.run()
        learnt.keep(training.best)
    return taught


class _Training:
    """One run: where it is, and the best state so far (nothing: the start)."""

    def __init__(
        self, part: Part, lesson: Lesson, learnt: _Learnt, rates: Mapping[str, float], course: Course, progress: Any
    ) -> None:
        self.part, self.lesson, self.course, self.progress = part, lesson, course, progress
        self.parameters = learnt.parameters
        each = max(len(lesson.fit), 1)
        self.planned = min(course.epochs * each if lesson.fit else 0, course.steps if course.steps is not None else 1 << 40)
        groups = [{"params": [self.parameters[name]], "lr": rate} for name, rate in rates.items() if name in self.parameters]
        self.optimizer = torch.optim.Adam(groups, betas=course.betas, fused=True) if groups else None
        self.every = max(1, min(each, self.planned // max(course.checks, 1)))
        self.best: dict[str, Tensor] = {}

    def run(self) -> Taught:
        before = least = self._judged()
        best_step = bad = step = 0
        stopped, began = "", time.monotonic()
        for step, number in enumerate(self._order(), 1):
            finite = self._step(step, number)
            self.progress(step, self.planned, "distillation")
            if step % self.every and step < self.planned and finite:
                continue
            now = self._judged()
            if now[0] < least[0]:
                least, best_step, bad = now, step, 0
                self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            else:
                bad += 1
            stopped = self._ended(bad, finite and math.isfinite(now[0]), now[0] / max(before[0], 1e-30), time.monotonic() - began)
            if stopped and step < self.planned:
                break
        return Taught(
            loss_before=before[0],
            loss_after=least[0],
            sqnr_db_before=_decibel(before[1]),
            sqnr_db_after=_decibel(least[1]),
            steps=step,
            planned=self.planned,
            best_step=best_step,
            rows=count(self.lesson.fit),
            held_rows=count(self.lesson.held),
            parameters=sum(parameter.numel() for parameter in self.parameters.values()),
            remembered=self.part.remembers,
            stopped=stopped if step < self.planned else "",
        )

    def _ended(self, bad: int, finite: bool, ratio: float, seconds: float) -> str:
        """Why training ends at a check, in words; "": it goes on."""
        if not finite:
            return "the loss was not finite"
        if ratio > _DIVERGED:
            return f"it diverged: the loss on held-out rows was {ratio:.3g} times that at the start"
        if bad >= self.course.patience:
            return f"{bad} checks in a row were no better"
        if self.course.seconds is not None and seconds >= self.course.seconds:
            return f"{self.course.seconds:g} seconds were over"
        return ""

    def _order(self) -> Iterator[int]:
        """The batches to learn from, shuffled anew for each epoch."""
        generator = torch.Generator().manual_seed(self.course.seed)
        left = self.planned if self.optimizer else 0
        while left > 0:
            for number in torch.randperm(len(self.lesson.fit), generator=generator).tolist()[:left]:
                yield number
                left -= 1

    def _step(self, step: int, number: int) -> bool:
        """One step; False: the loss is not finite, and nothing was changed."""
        assert self.optimizer is not None
        warm = max(1, round(self.course.warm_up * self.planned))
        rise, fall = min(1.0, step / warm), (1 + math.cos(math.pi * (step - 1) / self.planned)) / 2
        heard = self.part.heard(0, number)
        found = self.lesson.losses(heard, self.lesson.wanted[0][number], self.lesson.fit[number])
        loss = sum((loss / max(positions, 1) for loss, _, positions in found.values()), torch.zeros(()))
        if not loss.isfinite() or not loss.requires_grad:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= rise * fall
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return True

    @torch.no_grad()
    def _judged(self) -> tuple[float, float]:
        """On the held-out rows: the loss, and the mean over keys of squared error over square."""
        sums: dict[str, list[float]] = {key: [0.0, 0.0, 0.0] for key in self.lesson.keys}
        for number, (batch, wanted) in enumerate(zip(self.lesson.held, self.lesson.wanted[1], strict=True)):
            for key, (loss, error, positions) in self.lesson.losses(self.part.heard(1, number), wanted, batch).items():
                totals = sums[key]
                sums[key] = [totals[0] + float(loss), totals[1] + float(error), totals[2] + positions]
        means = [(loss / max(count, 1), error / max(count, 1)) for loss, error, count in sums.values()]
        return sum(loss for loss, _ in means), sum(error for _, error in means) / max(len(means), 1)


class _Learnt:
    """Parameters that are trained in the place of the model's own."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        self.old: dict[str, nn.Parameter] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.wants: dict[str, bool] = {}
        for name in names:
            old = model.get_parameter(name)
            if any(old is other for other in self.old.values()):
                continue
            self.old[name], self.wants[name] = old, old.requires_grad
            every = [(module, key) for module in model.modules() for key, value in module._parameters.items() if value is old]
            self.places[name] = every
            self.parameters[name] = nn.Parameter(old.detach().clone())
            for module, key in every:
                module._parameters[key] = self.parameters[name]

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Leaves these values in the model; without any its own parameters."""
        for name, value in values.items():
            new = nn.Parameter(value.clone(), requires_grad=self.wants[name])
            for module, key in self.places[name]:
                module._parameters[key] = new
        if values:
            self.places = {}

    def back(self) -> None:
        for name, places in self.places.items():
            for module, key in places:
                module._parameters[key] = self.old[name]


@contextmanager
def _learning(model: nn.Module, names: Sequence[str]) -> Iterator[_Learnt]:
    """Only the named parameters have gradients, in copies; modes and ``requires_grad`` are put back."""
    _settled(model)
    with still(model, gradients=True):
        wants = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        learnt = _Learnt(model, names)
        for parameter, _ in wants:
            parameter.requires_grad_(False)
        try:
            yield learnt
        finally:
            for parameter, wanted in wants:
                parameter.requires_grad_(wanted)
            learnt.back()


def _settled(model: nn.Module) -> None:
    """Tensors that were made in inference mode cannot take part in a backward pass: each becomes an ordinary one."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in made:
                    plain = tensor.clone()
                    made[id(tensor)] = nn.Parameter(plain, tensor.requires_grad) if held is module._parameters else plain
                held[name] = made[id(tensor)]  # type: ignore[assignment]


def valid(x: Tensor, batch: Batch) -> Tensor:
    """The positions that count, the channels last."""
    positions = counted(x, batch.get("attention_mask"))
    return x if positions is None else x[positions]


def _left_out(given: tuple[int, int], kept: tuple[int, int], most_bytes: int) -> str:
    """Rows to learn from and held out, as given and as kept."""
    if kept == given:
        return ""
    told = f"distillation learns from {kept[0]} of {given[0]} rows and is judged on {kept[1]} of {given[1]}"
    nothing = "" if all(kept) else ", so that nothing can be learnt"
    return f"{told}{nothing}: what the model gives for all of them takes more than {most_bytes >> 20} MiB"


def _owners(names: Mapping[str, float]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _decibel(ratio: float) -> float | None:
    return -10 * math.log10(ratio) if 0 < ratio < math.inf else None
