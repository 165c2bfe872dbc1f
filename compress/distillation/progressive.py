"""A model trained, without labels, while a part of it is slowly exchanged: what it gave at its blocks and as its output is what
it should give again.

The exchange has a share that falls from 1 to 0 with the steps (``Exchange.set``); a state is judged, on held-out rows, once the
share is 0. Training that is interrupted goes on from the state that was written last. Only as much of the model runs, and
learns, as a lesson listens to.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calibrate.signature import Batch
from compress.distillation.listening import count, hear, still
from compress.distillation.training import OUTPUT, LiveLesson

__all__ = ["Exchange", "Road", "Travelled", "travel", "varied"]

Call = Callable[[nn.Module, Batch], Tensor]
Progress = Callable[[int, int, str], None]

_SHIFT = 8
"""Images are shifted by up to one part in so many of their width and height."""
_STATE, _UNFINISHED = "training.safetensors", "training.part"


class Exchange(Protocol):
    """What is exchanged."""

    def set(self, share: float, learning: bool) -> None:
        """``share`` of what was there before; ``learning``: as in training, otherwise as it will be in the end, at share 0."""
        ...

    def settle(self, batches: list[Batch], call: Callable[[Batch], Any]) -> None:
        """Takes its statistics from these rows, at share 0."""
        ...


@dataclass(frozen=True)
class Road:
    """How long, how fast, and when the share has fallen.

    Attributes:
        steps: of training.
        rate: the largest learning rate, of Adam; it rises over the first 5 % and falls to zero along a cosine.
        decay: share of the steps over which the share falls to 0, linearly.
        fixed: share of the steps, the last ones, in which statistics do not change any more.
        checks: times that the held-out rows are asked after the share is 0.
        clip: the largest norm of the gradient of all parameters.
        keep: steps after which the state is written.
        varied: images are mirrored and shifted at random in training (``varied``), and what they should give is asked anew.
    """

    steps: int
    rate: float
    decay: float = 0.7
    fixed: float = 0.1
    checks: int = 12
    clip: float = 1.0
    keep: int = 100
    seed: int = 0
    varied: bool = False


@dataclass
class Travelled:
    """What training brought, on the held-out rows.

    Attributes:
        loss_start: of the exchanged parts as they were fitted, untrained; loss: of the state that was kept.
        best_step: whose state it is; 0: the untrained one.
        rows, held_rows: learnt from, judged on.
        resumed_at: the step at which an interrupted run went on; 0: it was not.
        stopped: why it ended before the last step; "": it did not.
    """

    loss_start: float
    loss: float
    best_step: int
    steps: int
    rows: int
    held_rows: int
    parameters: int
    resumed_at: int = 0
    stopped: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def travel(
    model: nn.Module,
    call: Call,
    lesson: LiveLesson,
    exchange: Exchange,
    road: Road,
    progress: Progress,
    folder: Path | None = None,
) -> Travelled:
    """Trains all parameters of a model; the best state that was judged is left in it.

    Args:
        model: its parameters are its own (``owned``).
        folder: where the state is written, which goes on to be there; None: nowhere.
    """
    with still(model, gradients=True):
        wanted = [parameter.requires_grad for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            return _Travel(model, call, lesson, exchange, road, progress, folder).run()
        finally:
            exchange.set(0.0, False)
            for parameter, grad in zip(model.parameters(), wanted, strict=True):
                parameter.requires_grad_(grad)


def varied(batch: Batch, generator: torch.Generator) -> Batch:
    """The images of a batch [B, C, H, W] mirrored, each with probability 1/2, and shifted at random, what is missing reflected;
    everything else as it is. What a model should give for them is no question of labels: they are other images."""
    found = {}
    for name, x in batch.items():
        if x.dim() != 4 or not x.is_floating_point():
            found[name] = x
            continue
        height, width = x.shape[-2] // _SHIFT, x.shape[-1] // _SHIFT
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
        padded = nn.functional.pad(x, (width, width, height, height), mode="reflect")
        tops = torch.randint(0, 2 * height + 1, (len(x),), generator=generator).tolist()
        lefts = torch.randint(0, 2 * width + 1, (len(x),), generator=generator).tolist()
        places = zip(padded, tops, lefts, strict=True)
        found[name] = torch.stack([one[:, top : top + x.shape[-2], left : left + x.shape[-1]] for one, top, left in places])
    return found


class _Travel:
    def __init__(
        self,
        model: nn.Module,
        call: Call,
        lesson: LiveLesson,
        exchange: Exchange,
        road: Road,
        progress: Progress,
        folder: Path | None,
    ) -> None:
        self.model, self.call, self.lesson, self.exchange = model, call, lesson, exchange
        self.road, self.progress, self.folder = road, progress, folder
        self.parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=road.rate, betas=(0.9, 0.98))
        self.best: dict[str, Tensor] = {}
        self.told = Travelled(0.0, 0.0, 0, road.steps, count(lesson.fit), count(lesson.held), 0)

    def run(self) -> Travelled:
        road, told = self.road, self.told
        self.exchange.set(0.0, False)
        told.loss_start = told.loss = self._judged()
        self.best = self._state()
        first = told.resumed_at = self._resumed()
        free = math.ceil(road.decay * road.steps)
        settled = max(free, road.steps - max(1, round(road.fixed * road.steps)))
        every = max(1, (road.steps - free) // max(road.checks, 1))
        for step, number in enumerate(self._order(), 1):
            if step <= first:
                continue
            if step == settled + 1:
                self._settle()
            self.exchange.set(max(0.0, 1 - (step - 1) / free) if free else 0.0, step <= settled)
            if not self._step(step, number):
                told.stopped = f"the loss at step {step} was not finite; the best state before it was kept"
                break
            self.progress(step, road.steps, "steps of training")
            if step == road.steps or (step > free and (step - free) % every == 0):
                if step <= settled:
                    self._settle()
                self._compare(step)
            if step % road.keep == 0 or step == road.steps:
                self._keep(step)
        self._put(self.best)
        learnt = [one for one in self.parameters.values() if one in self.optimizer.state]
        told.parameters = sum(one.numel() for one in learnt)
        return told

    def _order(self) -> Iterator[int]:
        """The batches to learn from, shuffled anew for each epoch."""
        generator, left = torch.Generator().manual_seed(self.road.seed), self.road.steps
        while left > 0 and self.lesson.fit:
            for number in torch.randperm(len(self.lesson.fit), generator=generator).tolist()[:left]:
                yield number
                left -= 1

    def _step(self, step: int, number: int) -> bool:
        """One step; False: the loss or its gradient is not finite, and nothing was changed."""
        warm = max(1, round(0.05 * self.road.steps))
        fall = (1 + math.cos(math.pi * (step - 1) / self.road.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.road.rate * min(1.0, step / warm) * fall
        loss = self._loss(*self._asked(step, number))
        self.optimizer.zero_grad(set_to_none=True)
        if not loss.isfinite():
            return False
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.road.clip)
        if not norm.isfinite():
            return False
        self.optimizer.step()
        return True

    def _asked(self, step: int, number: int) -> tuple[Batch, Any]:
        """A batch to learn from, and what it should give."""
        batch = self.lesson.fit[number]
        if self.road.varied:
            generator = torch.Generator().manual_seed(self.road.seed * 1_000_003 + step)
            batch = varied(batch, generator)
            return batch, self.lesson.ask(batch)
        return batch, self.lesson.wanted[0][number]

    def _loss(self, batch: Batch, wanted: Any) -> Tensor:
        """The mean over the places inside that are heard, and what the output differs by."""
        heard = hear(self.model, self.call, batch, self.lesson.paths, bool(self.lesson.output))
        found = self.lesson.losses(heard, wanted, batch)
        means = {key: loss / max(positions, 1) for key, (loss, _, positions) in found.items()}
        output = means.pop(OUTPUT, torch.zeros(()))
        return output + sum(means.values(), torch.zeros(())) / max(len(means), 1)

    @torch.no_grad()
    def _judged(self) -> float:
        self.exchange.set(0.0, False)
        pairs = zip(self.lesson.held, self.lesson.wanted[1], strict=True)
        losses = [(float(self._loss(batch, wanted)), count([batch])) for batch, wanted in pairs]
        total = sum(loss * rows for loss, rows in losses) / max(sum(rows for _, rows in losses), 1)
        return total if math.isfinite(total) else math.inf

    def _settle(self) -> None:
        with torch.no_grad():
            paths, output = self.lesson.paths, bool(self.lesson.output)
            self.exchange.settle(self.lesson.fit, lambda batch: hear(self.model, self.call, batch, paths, output))

    def _compare(self, step: int) -> None:
        if (now := self._judged()) < self.told.loss:
            self.told.loss, self.told.best_step, self.best = now, step, self._state()

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **{f"buffer {name}": one for name, one in self.model.named_buffers()}}

    @torch.no_grad()
    def _put(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _keep(self, step: int) -> None:
        """Writes where training is: to a temporary name, then renamed."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        moments = {
            f"{key} {name}": self.optimizer.state[one][key]
            for name, one in self.parameters.items()
            if one in self.optimizer.state
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        best = {f"best {name}": one for name, one in self.best.items()}
        now = {f"now {name}": one.detach().clone() for name, one in self._tensors().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"step": step, "told": self.told.json(), "road": asdict(self.road)}
        unfinished = self.folder / _UNFINISHED
        tensors = {key: one.contiguous() for key, one in {**now, **best, **moments}.items()}
        save_file(tensors, unfinished, {"facts": json.dumps(facts)})
        os.replace(unfinished, self.folder / _STATE)

    @torch.no_grad()
    def _resumed(self) -> int:
        """The step up to which a state was written, which is then put back; 0: none was."""
        path = None if self.folder is None else self.folder / _STATE
        if path is None or not path.exists():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError):
            return 0
        if facts["road"] != asdict(self.road):
            return 0
        self._put({name: held[f"now {name}"] for name in self._tensors()})
        self.best = {name: held[f"best {name}"] for name in self._tensors()}
        for name, one in self.parameters.items():
            if f"step {name}" in held:
                self.optimizer.state[one] = {key: held[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        told = facts["told"]
        self.told.loss_start, self.told.loss, self.told.best_step = told["loss_start"], told["loss"], told["best_step"]
        return int(facts["step"])
