"""What a pass is: its options, and one verb that changes a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.latency import Timing
from calibrate.modes import evaluating, frozen
from calibrate.signature import Batch, Signature
from compress.surgery import Edit, Surgery

if TYPE_CHECKING:
    from compress.anatomy import Anatomy
    from compress.huggingface_folder import Tokenizer
    from compress.labelled import Validation
    from compress.width.nested import Nested

__all__ = ["Context", "Given", "Latency", "Pass", "Target", "blank", "evaluating", "frozen", "unknown"]

_SMALL = 1 << 16
"""Numbers in a tensor that ``blank`` fills."""


@dataclass(frozen=True)
class Target:
    """One place a pass will touch: the module path, its role, and in a few words what will happen there."""

    path: str
    role: str
    action: str


@dataclass(frozen=True)
class Given:
    """What is known of the recipe's model besides its modules, for passes that read other models.

    Attributes:
        trust: whether Python files that the recipe names may be run.
        task: as the recipe names it.
        roles: module paths whose roles the recipe names, by role.
        labels, tokenizer, preprocessing: as in ``compress.sources.Source``.
    """

    trust: bool = False
    task: str = "auto"
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: Mapping[int, str] | None = None
    tokenizer: Tokenizer | None = None
    preprocessing: Mapping[str, Any] | None = None


class Latency(Protocol):
    """Times models as the files that a recipe would write of them, in the file's runtime on this machine."""

    def __call__(self, models: Iterable[nn.Module]) -> list[Timing]:
        """One timing a model, in interleaved runs; ratios are to the first. The models are taken one at a time."""
        ...

    @property
    def conditions(self) -> dict[str, Any]:
        """What the times hold for, in JSON: runtime, batch, threads, processor."""
        ...


@dataclass
class Context:
    """What a pass may use: the anatomy of the model as it is now, calibration batches, the seed, and the surgery.

    ``calibration`` makes a fresh iterator over the same calibration batches each time it is called, ``rows`` in all (0: not
    known). ``report`` collects what the pass wants to say in the run's report (JSON values; ``warnings`` is a list of
    sentences). ``progress`` is told (done, total, what). ``latency`` is there where a file of the recipe can be timed.
    ``validation`` judges a model by labelled rows that no file is judged by (None: the pass did not ask for it).
    ``scratch`` is a folder for what a long pass goes on from when it is interrupted; it need not exist yet.
    ``fingerprint`` is that of the float model, ``nested`` what a pass says that sorts units by importance.
    """

    signature: Signature
    anatomy: Anatomy
    calibration: Callable[[], Iterable[Batch]]
    surgery: Surgery
    rows: int = 0
    seed: int = 0
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    report: dict[str, Any] = field(default_factory=dict)
    latency: Latency | None = None
    validation: Validation | None = None
    fingerprint: str = ""
    nested: Nested | None = None
    scratch: Path | None = None

    def call(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's output for one batch."""
        return self.signature.call(model, batch)

    def judge(self, where: str) -> Validation:
        """The judge by validation rows, for a pass that cannot do without.

        Raises:
            UserError: there are no validation rows.
        """
        if self.validation is None:
            raise UserError(where, "there are no validation rows to choose by", "Name some under data.validation.")
        return self.validation

    @property
    def edits(self) -> list[Edit]:
        return self.surgery.edits


class Pass(BaseModel, ABC):
    """A frozen pydantic model: its fields are the recipe's options. The class docstring is its specification.

    A pass changes the model only through ``context.surgery``, so that the change is recorded and can be replayed by
    ``compress.load``. It asks the anatomy for roles, never for class names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    source: ClassVar[str]
    """The paper or document that the method comes from."""
    needs_calibration: ClassVar[bool] = False
    nests: ClassVar[bool] = False
    """Whether it sorts units by importance; the run then keeps the model that it leaves in the folder ``nested``."""
    writes: ClassVar[bool] = False
    """Whether it gives parameters other values and nothing else: no layer goes in or out, no shape changes."""
    begins: ClassVar[bool] = False
    """Whether it begins with a saved model, so that no pass can come before it."""
    fixes: ClassVar[tuple[str, ...]] = ()
    """Dimensions of the inputs, such as ``tokens``, that have to be fixed in the files of what it leaves."""

    _base: Path = PrivateAttr(Path())
    _given: Given = PrivateAttr(Given())

    @property
    def chosen(self) -> set[str]:
        """Options that were written and are not at their defaults."""
        fields = type(self).model_fields
        return {
            name for name in self.model_fields_set if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        }

    @abstractmethod
    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        """The places this pass would touch; no data is read, nothing changes.

        Raises:
            UserError: a role or pattern matches nothing (names the nearest that exists), or a precondition fails.
        """

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        """The layers this pass would put in, by module path, made on the ``meta`` device: no data, no memory.

        Exporters look at them before anything runs and refuse what their runtime cannot carry. A pass that puts in no layer
        of its own returns nothing.
        """
        return {}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        """Changes the model in place as ``run`` would, as far as shapes and bytes go: layers of the right kind whose values
        mean nothing, without data. ``compress plan`` and the checks before a run look at the result.

        A pass that puts layers in needs only ``preview``; one that takes parts out, or shares them, says so here.
        """
        for path, layer in self.preview(model, anatomy).items():
            surgery.replace(model, path, blank(layer, len(surgery.edits)))

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        """Sites that the options name and that this pass would leave as they are, by path, with the reason."""
        return {}

    @property
    def calibrates(self) -> bool:
        """Whether these options make the pass read calibration rows."""
        return self.needs_calibration

    @property
    def base(self) -> Path:
        """The folder that paths in the options are relative to: that of the recipe."""
        return self._base

    @property
    def given(self) -> Given:
        """What is known of the recipe's model besides its modules."""
        return self._given

    @property
    def reads(self) -> list[Path]:
        """Files that the options name: a run is the same run only while they are the same."""
        return []

    @property
    def fingerprints(self) -> list[str]:
        """Of the models that the options name, as ``targets`` last loaded them: they too have to be the same."""
        return []

    @property
    def validates(self) -> bool:
        """Whether these options make the pass choose by validation rows; the recipe then has to name some."""
        return False

    @property
    def judges(self) -> bool:
        """Whether these options make the pass use validation rows where the recipe names some, and do without elsewhere."""
        return False

    @property
    def timed(self) -> str:
        """The option that makes the pass measure times, and what to write instead where none can be measured; or nothing."""
        return ""

    @property
    def assumes(self) -> str:
        """What a rehearsal takes for granted because only the run can tell; or nothing."""
        return ""

    @property
    def computed_float(self) -> str:
        """What of its method no file holds, in a sentence that a plan says of every file; or nothing."""
        return ""

    @abstractmethod
    def run(self, model: nn.Module, context: Context) -> nn.Module:
        """Changes the model in place and returns it (the root itself may be another object).

        Raises:
            UserError: what the user can change; names the site.
        """


def blank(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Gives a layer that was made on the ``meta`` device tensors in memory, and returns it.

    Small tensors hold float16 numbers that differ by ``seed``, so that no two are taken for one, single numbers are 1 or 0;
    large ones are zeros that take no memory until somebody reads them.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if not tensor.is_meta:
            continue
        made = torch.from_numpy(np.zeros(tensor.nbytes, np.uint8)).view(tensor.dtype).reshape(tensor.shape)
        if not tensor.dim():
            made = made + int(tensor.is_floating_point())
        elif tensor.numel() <= _SMALL:
            drawn = torch.rand(tensor.shape, generator=generator)
            made = ((drawn + 0.5).half() if tensor.is_floating_point() else drawn.round()).to(tensor.dtype)
        holder, _, name = path.rpartition(".")
        owner = layer.get_submodule(holder)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(made, requires_grad=False)
        else:
            owner._buffers[name] = made
    return layer


def unknown(where: str, what: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that matches nothing: names the nearest that exists."""
    import difflib

    names = sorted(set(known))
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}." if near else f"There is: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"
    return UserError(where, f"{what} {given!r} matches nothing", hint)
