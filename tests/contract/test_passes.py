"""The laws that every pass obeys; each brings one ``EXAMPLE`` of its options in ``tests/compress/passes/test_<name>.py``."""

from __future__ import annotations

import copy
import gc
import importlib.util
import inspect
import sys
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.inventory import inventory
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.passes import PASSES, Context, Pass, known_passes
from compress.rehearsal import stand_in
from compress.surgery import Edit, Surgery

TESTS = Path(__file__).parents[1] / "compress" / "passes"
each_pass = pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)


@cache
def _module(name: str) -> Any:
    """A module of ``tests/compress/passes``."""
    sys.path.insert(0, str(TESTS))
    try:
        spec = importlib.util.spec_from_file_location(f"contract_{name}", TESTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(TESTS))


def example(step: type[Pass]) -> Pass:
    made = _module(f"test_{step.name}").EXAMPLE
    assert isinstance(made, step)
    return made


def subject() -> tuple[nn.Module, Signature, list[Batch]]:
    made: tuple[nn.Module, Signature, list[Batch]] = _module("trial").digits()
    return made


def ran(step: Pass, model: nn.Module, signature: Signature, rows: list[Batch]) -> tuple[nn.Module, Context]:
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=5)
    return step.run(model, context), context


def attached(context: Context) -> set[str]:
    """Paths of the modules on whose forward a recorded layer acts."""
    return {edit.path for edit in context.edits if edit.verb == "attach"}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_there_are_passes_and_their_names_are_known() -> None:
    assert PASSES
    assert set(known_passes()) >= {step.name for step in PASSES}
    assert len({step.name for step in PASSES}) == len(PASSES)


@each_pass
def test_options_are_frozen_and_unknown_ones_refused(step: type[Pass]) -> None:
    made = example(step)
    option = next(iter(step.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, option, getattr(made, option))
    with pytest.raises(ValidationError, match="no_such_option"):
        step.model_validate({**made.model_dump(), "no_such_option": 1})
    assert step.model_validate(made.model_dump()) == made


@each_pass
def test_it_is_documented(step: type[Pass]) -> None:
    assert inspect.getdoc(step)
    assert "doc" not in step.__dict__
    assert step.__doc__ != Pass.__doc__
    assert step.source
    properties = step.model_json_schema()["properties"]
    assert properties
    missing = [name for name, schema in properties.items() if not schema.get("description")]
    assert missing == []


@dataclass
class Done:
    """One run of a pass's example, and what was seen before it and at its end: many laws read it.

    Attributes:
        after: the model after the run.
        targets: paths that the pass said it would touch.
        looked: whether asking for them, for the preview and for the rehearsal left the model as it was.
        touched: paths of the layers that the run replaced or changed.
        preview: for each path the class of the layer it shows, and whether all its tensors are without values.
        rehearsed: the inventory that the rehearsal left.
        before: the inventory of the float model.
        weights: the float weights by path, held weakly.
    """

    after: nn.Module
    context: Context
    targets: list[str]
    looked: bool
    touched: set[str]
    preview: dict[str, tuple[type[nn.Module], bool]]
    rehearsed: Any
    before: Any
    weights: dict[str, weakref.ref[Tensor]]


@cache
def done(step: type[Pass], training: bool = False) -> Done:
    """The example on the digits model, which is in training mode if so asked; run once for all laws."""
    model, signature, rows = subject()
    model.train(training)
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modules, held = dict(model.named_modules()), inventory(model)
    targets = [target.path for target in example(step).targets(model, anatomy)]
    preview = {
        path: (type(layer), all(tensor.is_meta for tensor in layer.state_dict().values()))
        for path, layer in example(step).preview(model, anatomy).items()
    }
    rehearsed = stand_in(model)
    example(step).rehearse(rehearsed, anatomy, Surgery())
    looked = same(before, {name: parameter.detach() for name, parameter in model.named_parameters()})
    looked &= modules == dict(model.named_modules()) and inventory(model) == held
    weights = {
        path: weakref.ref(module.weight)
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
    }
    foreseen = inventory(rehearsed)
    del rehearsed
    after, context = ran(example(step), model, signature, rows)
    touched = attached(context) | _changed(modules, before, after)
    return Done(after, context, targets, looked, touched, preview, foreseen, held, weights)


def _changed(modules: dict[str, nn.Module], before: dict[str, Tensor], after: nn.Module) -> set[str]:
    """Paths of layers that are not in the model any more, or that have a parameter of another value."""
    left = {id(module) for module in after.modules()}
    values = {id(parameter) for parameter in after.parameters()}
    return {
        path
        for path, module in modules.items()
        if not list(module.children())
        if id(module) not in left
        or any(
            not torch.equal(parameter, before[f"{path}.{name}"])
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in values
        )
    }


@each_pass
def test_the_same_twice_gives_the_same_bits(step: type[Pass]) -> None:
    """Whichever mode the model is in."""
    first, second = done(step), done(step, training=True)
    assert first is not second
    assert same(first.after.state_dict(), second.after.state_dict())
    assert [edit.json() for edit in first.context.edits] == [edit.json() for edit in second.context.edits]


@each_pass
def test_edits_replay_on_a_fresh_model(step: type[Pass]) -> None:
    made, (fresh, signature, rows) = done(step), subject()
    surgery = Surgery()
    surgery.replay(fresh, [Edit(**edit.json()) for edit in made.context.edits])
    fresh.load_state_dict(made.after.state_dict())
    with torch.inference_mode():
        for batch in rows:
            assert torch.equal(signature.call(fresh, batch), signature.call(made.after, batch))
    assert [edit.json() for edit in surgery.edits] == [edit.json() for edit in made.context.edits]


@each_pass
def test_targets_are_what_run_touches(step: type[Pass]) -> None:
    made = done(step)
    assert made.targets
    assert made.looked, "asking changes nothing"
    touched, targets = made.touched, made.targets
    assert all(any(path == target or path.startswith(f"{target}.") for target in targets) for path in touched)
    assert all(any(path == target or path.startswith(f"{target}.") for path in touched) for target in targets)


@each_pass
def test_preview_shows_the_layers_that_run_puts_in(step: type[Pass]) -> None:
    made = done(step)
    for path, (layer, is_meta) in made.preview.items():
        assert is_meta
        assert type(made.after.get_submodule(path)) is layer


@each_pass
def test_a_rehearsal_leaves_the_shapes_that_run_leaves(step: type[Pass]) -> None:
    made = done(step)
    assert made.looked, "it leaves the model alone"
    assert step.nests or step.writes or attached(made.context) or inventory(made.after) != made.before
    assert made.rehearsed == inventory(made.after)


@each_pass
@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_kept_and_no_hook_is_left(step: type[Pass], training: bool) -> None:
    made = done(step, training)
    after, acted = made.after, attached(made.context)
    assert all(module.training is training for module in after.modules())
    hooked = {path: module for path, module in after.named_modules() if module._forward_pre_hooks or module._forward_hooks}
    assert hooked.keys() == acted, "those of layers that were attached to a module, and said so"
    assert all(len(module._forward_pre_hooks) == len(module._forward_hooks) == 1 for module in hooked.values())


@each_pass
def test_no_float_weight_of_a_replaced_module_lives_on(step: type[Pass]) -> None:
    made = done(step)
    kept = {id(parameter) for parameter in made.after.parameters()}
    gc.collect()
    assert made.weights
    assert step.nests or step.writes or made.context.edits
    ghosts = [path for path, weight in made.weights.items() if (held := weight()) is not None and id(held) not in kept]
    assert ghosts == []


@each_pass
def test_a_pattern_that_matches_nothing_is_refused(step: type[Pass]) -> None:
    """Lists of names are patterns, lists of whole numbers positions, lists of shares one for each: none may silently match
    nothing."""
    model, signature, rows = subject()
    tried = 0
    for name, field in step.model_fields.items():
        kind = str(field.annotation)
        wrong: list[Any] = ["no.such.place"] if "str" in kind else [0.5] * 99 if "float" in kind else [99]
        if "dict" in kind or ("list" not in kind and "tuple" not in kind):
            continue
        tried += 1
        options = {**example(step).model_dump(), name: wrong}
        with pytest.raises(UserError) as caught:
            ran(step.model_validate(options), copy.deepcopy(model), signature, rows)
        assert caught.value.hint
    assert tried or not any("list" in str(field.annotation) for field in step.model_fields.values())
