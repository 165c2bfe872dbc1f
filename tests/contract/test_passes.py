"""The laws that every pass obeys; each brings one ``EXAMPLE`` of its options in ``tests/compress/passes/test_<name>.py``."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

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


@each_pass
def test_the_same_twice_gives_the_same_bits(step: type[Pass]) -> None:
    model, signature, rows = subject()
    states, edits = [], []
    for _ in range(2):
        after, context = ran(example(step), copy.deepcopy(model), signature, rows)
        states.append(after.state_dict())
        edits.append([edit.json() for edit in context.edits])
    assert same(*states)
    assert edits[0] == edits[1]


@each_pass
def test_edits_replay_on_a_fresh_model(step: type[Pass]) -> None:
    model, signature, rows = subject()
    after, context = ran(example(step), copy.deepcopy(model), signature, rows)
    fresh = copy.deepcopy(model)
    surgery = Surgery()
    surgery.replay(fresh, [Edit(**edit.json()) for edit in context.edits])
    fresh.load_state_dict(after.state_dict())
    with torch.inference_mode():
        for batch in rows:
            assert torch.equal(signature.call(fresh, batch), signature.call(after, batch))
    assert [edit.json() for edit in surgery.edits] == [edit.json() for edit in context.edits]


@each_pass
def test_targets_are_what_run_touches(step: type[Pass]) -> None:
    model, signature, rows = subject()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    targets = [target.path for target in example(step).targets(model, anatomy)]
    assert targets
    assert same(before, {name: parameter.detach() for name, parameter in model.named_parameters()})
    assert modules == dict(model.named_modules())
    after, context = ran(example(step), model, signature, rows)
    left = {id(module) for module in after.modules()}
    values = {id(parameter): parameter for parameter in after.parameters()}
    touched = attached(context)
    for path, module in modules.items():
        if list(module.children()):
            continue
        changed = any(
            not torch.equal(parameter, before[f"{path}.{name}"])
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in values
        )
        if id(module) not in left or changed:
            touched.add(path)
    assert all(any(path == target or path.startswith(f"{target}.") for target in targets) for path in touched)
    assert all(any(path == target or path.startswith(f"{target}.") for path in touched) for target in targets)


@each_pass
def test_preview_shows_the_layers_that_run_puts_in(step: type[Pass]) -> None:
    model, signature, rows = subject()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    preview = example(step).preview(model, anatomy)
    after, _ = ran(example(step), model, signature, rows)
    for path, layer in preview.items():
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        assert type(after.get_submodule(path)) is type(layer)


@each_pass
def test_a_rehearsal_leaves_the_shapes_that_run_leaves(step: type[Pass]) -> None:
    model, signature, rows = subject()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    before, rehearsed = inventory(model), stand_in(model)
    example(step).rehearse(rehearsed, anatomy, Surgery())
    assert inventory(model) == before
    after, context = ran(example(step), model, signature, rows)
    assert step.nests or step.writes or attached(context) or inventory(after) != before
    assert inventory(rehearsed) == inventory(after)


@each_pass
@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_kept_and_no_hook_is_left(step: type[Pass], training: bool) -> None:
    model, signature, rows = subject()
    model.train(training)
    after, context = ran(example(step), model, signature, rows)
    assert all(module.training is training for module in after.modules())
    hooked = {path: module for path, module in after.named_modules() if module._forward_pre_hooks or module._forward_hooks}
    assert hooked.keys() == attached(context), "those of layers that were attached to a module, and said so"
    assert all(len(module._forward_pre_hooks) == len(module._forward_hooks) == 1 for module in hooked.values())


@each_pass
def test_no_float_weight_of_a_replaced_module_lives_on(step: type[Pass]) -> None:
    import gc
    import weakref

    model, signature, rows = subject()
    alive = {
        path: weakref.ref(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
    }
    after, context = ran(example(step), model, signature, rows)
    kept = {id(parameter) for parameter in after.parameters()}
    gc.collect()
    assert step.nests or step.writes or context.edits
    ghosts = [path for path, weight in alive.items() if (held := weight()) is not None and id(held) not in kept]
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
