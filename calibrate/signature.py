"""What a model takes and gives, by name: the contract between sources, passes and exporters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Output", "Signature", "TensorSpec", "raw_path"]

Batch = dict[str, Tensor]
"""One batch of model inputs by input name; the first dimension of every tensor is the batch."""

Output = Literal["tensor", "logits", "last_hidden_state", "pooler_output", "mean_pooling"]


@dataclass(frozen=True)
class TensorSpec:
    """One input: its name, its dtype and its shape, in which a ``str`` names a dimension that may vary.

    The first dimension is always ``"batch"``; the length of text is called ``"tokens"``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and the one output of a model.

    ``output`` says how the tensor is taken from what ``forward`` returns: the tensor itself (or the first one of a tuple,
    or the first value of a dict), the named field of a Hugging Face output, or the mean of ``last_hidden_state`` over the
    tokens whose ``attention_mask`` is 1, which is then scaled to unit length (sentence embeddings).

    ``constants`` are keyword arguments that every call gets (``use_cache=False``).
    """

    inputs: tuple[TensorSpec, ...]
    output: Output = "tensor"
    output_name: str = "output"
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    def bind(self, model: nn.Module) -> nn.Module:
        """A module with the child ``model``, whose ``forward`` takes exactly the named inputs and returns one tensor.

        Parameters of ``model`` appear under ``model.``; ``raw_path`` takes the prefix off again.
        """
        bound: nn.Module = _bound_class(self.names)()
        bound.signature = self  # type: ignore[assignment]
        bound.model = model
        bound.training = model.training
        return bound

    def call(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's one output tensor for a batch; inputs are taken by name, other entries of the batch are ignored."""
        returned = model(**{name: batch[name] for name in self.names}, **self.constants)
        return self._pick(returned, batch)

    def _pick(self, returned: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if self.output == "tensor":
            while not isinstance(returned, Tensor):
                if not isinstance(returned, Mapping | tuple | list):
                    raise TypeError(f"the model returns {type(returned).__name__}, not tensors")
                returned = next(iter(returned.values())) if isinstance(returned, Mapping) else returned[0]
            return returned
        if self.output == "mean_pooling":
            hidden: Tensor = returned.last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
            return mean / (mean * mean).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        picked: Tensor = getattr(returned, self.output)
        return picked


def raw_path(path: str) -> str:
    """The module path in the user's model of a path in the module that ``Signature.bind`` made."""
    return path.removeprefix("model.")


def _bound_class(names: tuple[str, ...]) -> type[Any]:
    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        signature: Signature = self.signature
        return signature.call(self.model, {**dict(zip(names, args, strict=False)), **kwargs})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Bound", (nn.Module,), {"forward": forward})
