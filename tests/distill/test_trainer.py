"""The loop against a plain one, by steps and by the clock, and what it says of itself."""

import math
import re
import time

import numpy as np
import pytest
import torch
from bigrams import IDS, TOKENS, Bigrams, log, rates

from dfssm.base import DfssmError
from dfssm.distill.data import Windows
from dfssm.distill.distributed import Ranks
from dfssm.distill.trainer import BETAS, MAX_NORM, Schedule, fast_bf16


def plain(steps=12, weight_decay=0.0):
    """The same steps without Trainer: parameters, losses and sizes of the gradients."""
    model, source = Bigrams(), Windows(IDS, TOKENS, seed=0)
    weight, bias = model.head.weight, model.head.bias
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}], betas=BETAS
    )
    losses, norms = [], []
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates((step + 0.5) / steps).values(), strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        loss = model(torch.from_numpy(source.take(8)))["loss"]
        loss.backward()
        norm = math.hypot(weight.grad.norm(), bias.grad.norm())
        for p in (weight, bias):
            p.grad *= min(1.0, MAX_NORM / (norm + 1e-6))
        optimizer.step()
        losses, norms = [*losses, loss.item()], [*norms, norm]
    return (weight, bias), losses, norms


class TestSteps:
    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    def test_are_those_of_a_plain_loop(self, trainer, weight_decay):
        t = trainer(weight_decay=weight_decay)
        t.train()
        expected, losses, norms = plain(weight_decay=weight_decay)
        for found, want in zip((t.model.head.weight, t.model.head.bias), expected, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)  # the norm is summed in another order
        lines = [line for line in log(t) if "loss" in line]
        assert [line["step"] for line in lines] == [3, 6, 9, 12]
        assert [line["tokens"] for line in lines] == [144, 288, 432, 576]
        for i, line in enumerate(lines):  # each the mean since the one before
            part = slice(3 * i, 3 * i + 3)
            assert line["loss"] == pytest.approx(np.mean(losses[part]), rel=1e-5)
            assert line["kl"] == pytest.approx(np.mean(losses[part]) / 2, rel=1e-5)
            assert line["grad_norm"] == pytest.approx(np.mean(norms[part]), rel=1e-5)
            of_groups = line["grad_norm_matrix"], line["grad_norm_bias"]
            assert max(of_groups) <= line["grad_norm"] * (1 + 1e-5) and line["grad_norm"] <= sum(of_groups)
            assert line["lr"] == max(rates((3 * i + 2.5) / 12).values())
            assert line["tok_s"] > 0 and line["seconds"] > 0

    def test_of_gradients_that_are_clipped(self, trainer, monkeypatch):
        monkeypatch.setattr("dfssm.distill.trainer.MAX_NORM", 0.05)
        monkeypatch.setitem(globals(), "MAX_NORM", 0.05)
        t = trainer()
        t.train()
        expected, _, norms = plain()
        assert min(norms) > 0.05
        torch.testing.assert_close(t.model.head.weight, expected[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("micro_batch", [1, 2, 4])
    def test_in_parts_are_those_of_the_whole(self, trainer, micro_batch):
        """Up to fp32 rounding: means of means are sums in another order."""
        found = []
        for folder, size in (("run", 8), ("parts", micro_batch)):
            t = trainer(folder, micro_batch=size)
            t.folder.mkdir(exist_ok=True)
            t.train()
            lines = [[line[name] for name in ("loss", "kl", "grad_norm")] for line in log(t)]
            found.append((t.model.head.weight.detach(), t.model.head.bias.detach(), torch.tensor(lines)))
        for whole, parts in zip(*found, strict=True):
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)

    def test_a_parameter_may_have_a_rate_of_its_own(self, trainer):
        """The first step of AdamW is the rate, whatever the size of a gradient."""
        model = Bigrams()
        before = [p.detach().clone() for p in (model.head.weight, model.head.bias)]
        t = trainer(model=model, steps=1, factors={model.head.weight: 0.25})
        t.train()
        rate = rates(0.5)
        for p, old, step in zip(
            (model.head.weight, model.head.bias), before, (0.25 * rate["matrix"], rate["bias"]), strict=True
        ):
            assert (p.detach() - old).abs().max().item() == pytest.approx(step, rel=1e-4)

    def test_before_each_the_run_may_change_something(self, trainer):
        seen = []
        t = trainer(steps=4, log_every=1, before=lambda progress: seen.append(progress) or {"blend": progress / 2})
        t.train()
        assert seen == [0.125, 0.375, 0.625, 0.875]
        assert [line["blend"] for line in log(t)] == [p / 2 for p in seen]

    def test_the_last_is_logged_saved_and_measured_whatever_its_number(self, trainer):
        t = trainer(steps=5, log_every=3, save_every=2, evaluate_every=3, held_out=lambda: {"held_out": 1.0})
        t.train()
        assert [line["step"] for line in log(t) if "loss" in line] == [3, 5]
        assert [line["step"] for line in log(t) if "held_out" in line] == [3, 5]
        assert t.checkpoints.steps() == [4, 5]

    def test_the_run_may_end_before_its_schedule(self, trainer):
        t = trainer(steps=9, log_every=2, save_every=100, ends=lambda: 5)
        t.train()
        assert t.step == 5 and t.checkpoints.steps() == [5] and [line["step"] for line in log(t)] == [2, 4, 5]

    def test_held_out_text_is_measured_in_eval_mode(self, trainer):
        model = Bigrams()
        t = trainer(
            model=model,
            steps=4,
            evaluate_every=2,
            held_out=lambda: model.logits(torch.zeros(1, 1).long()) and {"held_out": 2},
        )
        t.train()
        assert model.modes == [True, True, False, True, True, False]
        lines = [line for line in log(t) if "held_out" in line]
        assert [(line["step"], line["held_out"]) for line in lines] == [(2, 2), (4, 2)]

    @pytest.mark.parametrize("batch, micro_batch, world", [(8, 3, 1), (8, 16, 1), (6, 2, 2)])
    def test_that_do_not_come_out_even(self, batch, micro_batch, world):
        ranks = Ranks(0, world, torch.device("cpu"))
        with pytest.raises(
            DfssmError, match=rf"batch is {batch} windows; give a multiple .* = {world} x {micro_batch}$"
        ):
            Schedule(4, batch, micro_batch).parts(ranks)

    def test_of_a_rank(self):
        assert Schedule(4, 8, 2).parts(Ranks(0, 2, torch.device("cpu"))) == 2


class TestByTheClock:
    def test_the_rates_follow_it_and_the_run_ends_with_it(self, trainer, monkeypatch):
        clock = iter(range(10**6))
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # a second passes at each look
        t = trainer(steps=1000, seconds=30, log_every=1)
        seen = []
        t.rates = lambda progress: seen.append(progress) or rates(progress)
        t.train()
        assert t.step < 40 and t.seconds >= 30 > log(t)[-2]["seconds"]
        assert seen[0] == 0.5 / 1000 and seen == sorted(seen) and 0.9 < seen[-1] < 1
        assert t.checkpoints.steps()[-1] == t.step

    def test_all_steps_taken_end_it_earlier(self, trainer):
        t = trainer(seconds=1e9)
        t.train()
        assert t.step == 12


class TestALossThatIsNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_ends_the_run_in_one_line_before_it_reaches_a_parameter(self, trainer, bad):
        t = trainer(save_every=2)
        forward = t.model.forward

        def broken(ids):
            found = forward(ids)
            return found | {"loss": found["loss"] * bad} if t.step == 5 else found

        t.model.forward = broken
        with pytest.raises(DfssmError, match=rf"^step 6: the loss is {bad}, the gradient .*lower --lr") as error:
            t.train()
        assert "\n" not in str(error.value)
        assert t.checkpoints.steps() == [2, 4] and t.model.head.weight.isfinite().all()

    def test_or_a_gradient_that_is_not(self, trainer):
        t = trainer()
        t.model.head.bias.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(DfssmError, match=r"^step 1: the loss is 2\.\d+, the gradient (inf|nan)"):
            t.train()
        assert not t.checkpoints.steps()


class TestWithoutATerminal:
    def test_a_line_says_how_far_it_is(self, trainer, monkeypatch, capsys):
        monkeypatch.setattr("dfssm.distill.progress.LINE_EVERY", 0.0)
        trainer(steps=3, log_every=1).train()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3
        assert re.fullmatch(r"48 of 144 tokens, [\d,]+ tokens/s, loss \d\.\d{3}, \d+ s left", lines[0])
        assert lines[-1].startswith("144 of 144 tokens, ") and lines[-1].endswith(", 0 s left")

    def test_in_between_there_is_none(self, trainer, capsys):
        trainer(steps=5).train()
        assert len(capsys.readouterr().err.splitlines()) == 1  # the last


@pytest.mark.parametrize("speed, fast", [(1.0, False), (1.29, False), (1.31, True)])
def test_bf16_is_chosen_where_it_is_faster_by_a_margin(speed, fast, monkeypatch):
    clock = {"now": 0.0}
    product = torch.Tensor.__matmul__

    def timed(a, b):
        clock["now"] += 1.0 / speed if a.dtype == torch.bfloat16 else 1.0
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    assert fast_bf16(torch.device("cpu"), size=2) is fast
