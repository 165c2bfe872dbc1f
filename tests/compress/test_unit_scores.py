"""Trajectory scores: nothing for a useless unit, the same however rows are batched, and near what switching off does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from sweeps import swept
from torch import Tensor

from calibrate.capture import split
from calibrate.signature import Batch
from compress.anatomy import find
from compress.width.restart import Restart
from compress.width.unit_scores import Distance, exact_scores, magnitudes, random_scores, trajectory_scores
from compress.width.units import Units, find_units, masked

RESTARTED = ["bert", "gpt2", "llama", "vit", "swin", "albert", "bart", "mobilevit", "timm_vit", "segformer"]


def parts(name: str) -> tuple[Any, Any, Batch, list[Units], list[str]]:
    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    anatomy = find(model, signature, example)
    units = [one for one in find_units(model, signature, anatomy, example) if isinstance(one, Units)]
    return model, signature, example, units, [block.path for block in anatomy.blocks]


@pytest.fixture(autouse=True)
def _still() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", swept(RESTARTED, ["bert", "llama", "swin", "timm_vit"]))
def test_a_restart_gives_what_the_whole_model_gives(name: str) -> None:
    model, signature, example, units, paths = parts(name)
    restart = Restart(model, signature.call, paths)
    restart.add(example)
    plain = restart.reference(0).output
    assert torch.equal(plain, signature.call(model, example))
    for one in units:
        assert restart.exact(paths[one.block])
        with masked(model, one, [0]):
            whole, resumed = signature.call(model, example), restart.run(0, paths[one.block])
        assert torch.equal(resumed.output, whole)
        assert not torch.equal(whole, plain), "a mask that does nothing would pass"
    assert torch.equal(signature.call(model, example), plain), "no mask and no answer from memory is left"
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_before_are_not_run() -> None:
    model, signature, example, _, paths = parts("bert")
    restart, ran = Restart(model, signature.call, paths), []
    restart.add(example)
    restart.exact(paths[-1])
    for path in paths:
        inside = model.get_submodule(path).attention
        inside.register_forward_hook(lambda module, inputs, output, path=path: ran.append(path))
    restart.run(0, paths[-1])
    assert ran == paths[-1:]


def scores(name: str, batch_size: int | None = None, **options: Any) -> tuple[list[Units], list[Tensor]]:
    model, signature, example, units, paths = parts(name)
    return units, trajectory_scores(model, signature.call, split([example], batch_size), units, paths, **options)


@pytest.mark.parametrize("name", swept(["bert", "llama", "swin"], ["bert", "llama"]))
def test_batches_do_not_matter(name: str) -> None:
    whole, single = scores(name)[1], scores(name, 1)[1]
    for one, other in zip(whole, single, strict=True):
        assert torch.allclose(one, other, rtol=1e-3), (one, other)
        assert one.min() > 0


def test_another_seed_draws_otherwise_and_the_same_seed_does_not() -> None:
    first, again, other = (torch.cat(scores("bert", seed=seed)[1]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_what_nothing_reads_scores_zero(name: str) -> None:
    model, signature, example, units, paths = parts(name)
    for one in units:
        weight = model.get_submodule(one.sink).weight
        columns = one.columns[1]
        weight[(columns, slice(None)) if name == "gpt2" else (slice(None), columns)] = 0
    found = trajectory_scores(model, signature.call, [example], units, paths)
    for score in found:
        assert score[1] == 0
        assert (score > 0).sum() == len(score) - 1


def test_neurons_are_ranked_as_switching_each_off_would() -> None:
    """Spearman over the neurons of each block against the exact score; a score by weights alone is the control."""
    model, signature, example, units, paths = parts("bert")
    found = trajectory_scores(model, signature.call, [example], units, paths, probes=16)
    restart = Restart(model, signature.call, paths)
    restart.add(example)
    distance = Distance(True, 0)
    everything, guessed = [], []
    for one, score in zip(units, found, strict=True):
        if one.kind == "head":
            continue
        groups = [[unit] for unit in range(len(one))]
        exact = exact_scores(model, restart, one, groups, paths, distance, {})
        exact = (exact / exact.mean(1, keepdim=True)).sum(0)
        assert spearman(score, exact) > 0.85
        assert spearman(magnitudes(model, one), exact) < spearman(score, exact)
        everything.append(exact)
        guessed.append(score)
    assert spearman(torch.cat(guessed), torch.cat(everything)) > 0.8


def test_scoring_a_block_leaves_no_mask_on_those_before() -> None:
    """The score of a later block's head is that in the whole model, whatever was scored before."""
    model, signature, example, units, paths = parts("bert")
    heads = [one for one in units if one.kind == "head"]
    restart = Restart(model, signature.call, paths)
    restart.add(example)
    alone = exact_scores(model, restart, heads[-1], [[0]], paths, Distance(True, 0), {})
    for one in heads[:-1]:
        exact_scores(model, restart, one, [[unit] for unit in range(len(one))], paths, Distance(True, 0), {})
    after = exact_scores(model, restart, heads[-1], [[0]], paths, Distance(True, 0), {})
    assert torch.equal(alone, after)


def test_random_scores_are_seeded() -> None:
    units = parts("bert")[3]
    first, again, other = (random_scores(units, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
