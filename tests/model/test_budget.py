"""Rank and planes by a budget: what is measured, against the same in other ways, and what is chosen of it."""

import numpy as np
import pytest
import torch

from dfssm.base import DfssmError
from dfssm.model import budget as module
from dfssm.model.budget import Choices, allocate, choose, errors, measure
from dfssm.model.config import DFSSMConfig, Scaffold
from dfssm.model.ledger import model_bytes
from dfssm.model.quant import dequantized
from dfssm.model.rounding import damped
from dfssm.model.teacher import Mamba2LM

PATHS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("in_proj", "out_proj")]


def size(config):
    return sum(model_bytes(config.to_dict()).values())


def test_what_is_chosen_is_what_a_price_of_bytes_would_choose():
    rng = np.random.default_rng(0)
    kinds = [Scaffold(rank, planes) for rank in (0, 1, 2) for planes in (1, 2, 3)]
    sizes = [{kind: weight * (7 * kind.rank + 20 * kind.planes) for kind in kinds} for weight in (1, 2, 5)]
    choices = [Choices({kind: rng.uniform(1, 3) / of[kind] for kind in kinds}, of, 0.0) for of in sizes]
    least = sum(min(of.values()) for of in sizes)
    seen = set()
    for price in np.geomspace(1e-6, 1, 200):  # whose choice no other of its bytes can beat
        best = [min(kinds, key=lambda kind, one=one: one.cost[kind] + price * one.size[kind]) for one in choices]
        room = sum(one.size[kind] for one, kind in zip(choices, best, strict=True)) - least
        assert allocate(choices, room) == best
        seen.add(tuple(best))
    assert len(seen) > 5
    for room in range(0, 500, 10):
        found = allocate(choices, room)
        assert sum(one.size[kind] for one, kind in zip(choices, found, strict=True)) <= least + room


def test_the_error_of_each_choice_is_that_of_its_products():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=g), torch.randn(500, 64, generator=g) @ torch.randn(64, 64, generator=g)
    moment = (x.T @ x).double()
    found, first = errors(weight, moment)
    root = torch.linalg.cholesky(damped(moment))
    assert set(found) == {(rank, planes) for rank in (0, 2, 4, 8, 16) for planes in module.PLANES}
    assert [len(row.abs().unique()) for row in first] == [1] * 24  # one scale a row
    rest = ((weight - first).double() @ root).numpy()
    values = np.linalg.svd(rest, compute_uv=False)
    for rank in (0, 2, 4, 8, 16):
        assert found[Scaffold(rank, 1)] == pytest.approx(np.square(values[rank:]).sum(), rel=1e-3)


def test_the_divergence_is_that_of_the_teacher_with_one_projection_rounded(teacher, windows, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 10**6)  # all of the text
    tokens = teacher(windows)[0].log_softmax(-1)
    for path, choices in measure(teacher, windows).items():
        projection, seen = teacher.get_submodule(path), []
        hook = projection.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(dequantized(inputs[0])))
        teacher(windows)
        hook.remove()
        x = seen[0].flatten(0, 1)
        weight = projection.weight.clone()
        projection.weight.copy_(errors(weight, (x.T @ x).double())[1])
        other = teacher(windows)[0].log_softmax(-1)
        projection.weight.copy_(weight)
        expected = float((tokens.exp() * (tokens - other)).sum(-1).mean())
        assert choices.kl == pytest.approx(expected, rel=2e-2), path  # a few signs differ with the order of sums
        assert choices.cost[Scaffold(0, 1)] == pytest.approx(choices.kl)


def test_more_bytes_buy_a_nearer_student_and_no_more_are_spent(teacher, windows, monkeypatch, config):
    least, most = (size(DFSSMConfig.from_teacher(config, *kind)) for kind in ((0, 1), (32, 4)))
    before, progress = {name: value.clone() for name, value in teacher.state_dict().items()}, []
    found = measure(teacher, windows, lambda done, of: progress.append((done, of)))
    assert progress == [(0, 2), (1, 2), (2, 2)] and list(found) == PATHS
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    monkeypatch.setattr(module, "measure", lambda *_: found)
    costs = []
    for budget in np.linspace(least, most, 7):
        config, kl = choose(teacher, windows, budget)
        assert list(kl) == PATHS and all(value > 0 for value in kl.values())
        assert size(config) <= budget
        costs.append(sum(found[path].cost[config.scaffold(path)] for path in PATHS))
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.05 * costs[0]
    assert choose(teacher, windows, least)[0] == DFSSMConfig.from_teacher(config, 0, 1)
    assert choose(teacher, windows, 2 * most)[0] == DFSSMConfig.from_teacher(config, 32, 4)
    with pytest.raises(DfssmError, match=r"the budget is 0.01 MB, but the smallest .* has 0.\d+ MB of weights: give"):
        choose(teacher, windows, 10_000)


def test_an_fp16_teacher(teacher, windows, config):
    halves = {name: value.half() for name, value in teacher.state_dict().items()}
    narrow, wide = Mamba2LM(config).eval().requires_grad_(False), Mamba2LM(config).eval().requires_grad_(False)
    narrow.load_state_dict(halves, assign=True)
    wide.load_state_dict({name: value.float() for name, value in halves.items()})
    assert choose(narrow, windows, 60_000)[1] == choose(wide, windows, 60_000)[1]


def test_numbers_that_are_not_finite_are_named(windows, config):
    torch.manual_seed(0)
    model = Mamba2LM(config).requires_grad_(False)
    model.layers[1].in_proj.weight.fill_(3e38)
    with pytest.raises(DfssmError, match="its numbers in layers.1.in_proj are not finite on this text: copy or train"):
        choose(model, windows, 60_000)
