"""Runs a pass on a small model and keeps what is needed to judge it."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.metrics import metric
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import Anatomy, find
from compress.embedded import digits_model, digits_rows
from compress.labelled import Validation
from compress.passes.contract import Context, Latency, Pass
from compress.surgery import Surgery

DIGITS = Signature((TensorSpec("pixels", torch.float32, ("batch", 1, 8, 8)),))


@dataclass
class Trial:
    """A float model, the same after a pass, and what the pass said."""

    before: nn.Module
    after: nn.Module
    signature: Signature
    anatomy: Anatomy
    context: Context
    rows: list[Batch]

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.signature.call(model, batch) for batch in self.rows])

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self.outputs(self.before), self.outputs(self.after))


def digits() -> tuple[nn.Module, Signature, list[Batch]]:
    """The trained digits model and 48 rows of its calibration split."""
    return digits_model().eval(), DIGITS, list(digits_rows("calibration", 48).batches(16))


def judge(rows: int, seed: int = 0) -> Validation:
    """Judges a digits model by labelled rows of its validation split."""
    labelled = digits_rows("validation", rows, seed)
    batches = functools.partial(labelled.batches, 64)
    return Validation.of(labelled, "image-classification", metric("accuracy"), DIGITS.call, batches)


def tried(
    step: Pass,
    model: nn.Module,
    signature: Signature,
    rows: list[Batch],
    latency: Latency | None = None,
    validation: Validation | None = None,
) -> Trial:
    """The pass on a copy of the model."""
    after = copy.deepcopy(model)
    example = {name: tensor[:2] for name, tensor in rows[0].items()}
    anatomy = find(after, signature, example)
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=3, latency=latency, validation=validation)
    after = step.run(after, context)
    return Trial(model, after, signature, anatomy, context, rows)


def rebuilt(trial: Trial) -> nn.Module:
    """A fresh float model after the recorded edits, with the tensors of the compressed one."""
    fresh = copy.deepcopy(trial.before)
    Surgery().replay(fresh, [type(edit)(**edit.json()) for edit in trial.context.edits])
    fresh.load_state_dict(trial.after.state_dict())
    return fresh
