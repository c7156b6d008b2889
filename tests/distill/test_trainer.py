"""The loop against a plain one; killed and resumed it takes the same steps, bit for bit."""

import json
import math
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfssm.distill.data import Windows
from dfssm.distill.distributed import Ranks
from dfssm.distill.trainer import BETAS, MAX_NORM, Schedule, Trainer, fast_bf16
from dfssm.opset import DfssmError

ALONE = Ranks(0, 1, torch.device("cpu"))
VOCAB, TOKENS = 11, 6
IDS = np.random.default_rng(0).integers(VOCAB, size=2000, dtype=np.uint32)


class Bigrams(nn.Module):
    """The next token from the one before: an embedding that is frozen, a matrix and a bias that train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, 16).requires_grad_(False)
        self.head = nn.Linear(16, VOCAB)
        self.modes = []

    def logits(self, ids):
        self.modes.append(self.training)
        return self.head(self.table(ids)), None

    def forward(self, ids):
        logits = self.logits(ids[:, :-1])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return {"loss": loss, "kl": loss / 2}


def rates(progress):
    return {"matrix": 0.1 * (1 - progress), "bias": 0.02}


@pytest.fixture
def trainer(tmp_path):
    """trainer(...) -> a Trainer of Bigrams; options are those of Schedule and Trainer."""

    def trainer(folder="run", **options):
        schedule = {"steps": 12, "batch": 8, "micro_batch": 8, "tokens": TOKENS, "log_every": 3, "save_every": 4}
        schedule |= {name: options.pop(name) for name in Schedule.__dataclass_fields__ if name in options}
        model = options.pop("model", None) or Bigrams()
        groups = {"matrix": [model.head.weight], "bias": [model.head.bias]}
        options = {"source": Windows(IDS, TOKENS, seed=0), "rates": rates} | options
        return Trainer(
            model=model, groups=groups, schedule=Schedule(**schedule), ranks=ALONE, folder=tmp_path / folder, **options
        )

    (tmp_path / "run").mkdir()
    return trainer


def log(trainer):
    return [json.loads(line) for line in trainer.log.path.read_text().splitlines()]


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


class Stop(Exception):
    pass


def stop_at(t, step):
    """End `t` like a crash once it has taken `step` steps."""
    take = t.source.take

    def stopping(count):
        if t.step == step:
            raise Stop
        return take(count)

    t.source.take = stopping
    with pytest.raises(Stop):
        t.train()


def but_times(t):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tok_s")} for line in log(t)]


class TestResume:
    @pytest.mark.parametrize("log_every", [1, 3, 5])
    @pytest.mark.parametrize("step", [4, 5, 7, 11])
    def test_is_as_if_it_had_never_stopped(self, trainer, step, log_every):
        def options():
            model = Bigrams()
            ids = torch.from_numpy(IDS[:50].astype(np.int64))[None]
            return {
                "model": model,
                "held_out": lambda: {"held_out": model(ids)["loss"].item()},
                "evaluate_every": 3,
                "log_every": log_every,
                "micro_batch": 4,
            }

        whole = trainer("whole", **options())
        whole.folder.mkdir()
        whole.train()
        stop_at(trainer(**options()), step)
        t = trainer(**options())
        assert t.resume() and t.step == step // 4 * 4
        t.train()
        for found, expected in zip(t.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(found, expected)
        assert but_times(t) == but_times(whole)
        assert all(a["seconds"] <= b["seconds"] for a, b in zip(log(t), log(t)[1:], strict=False))

    def test_twice(self, trainer):
        whole = trainer("whole")
        whole.folder.mkdir()
        whole.train()
        stop_at(trainer(), 5)
        t = trainer()
        t.resume()
        stop_at(t, 10)
        t = trainer()
        assert t.resume() and t.step == 8
        t.train()
        assert torch.equal(t.model.head.weight, whole.model.head.weight) and but_times(t) == but_times(whole)

    def test_of_what_has_ended_changes_nothing(self, trainer):
        t = trainer()
        t.train()
        before = t.log.path.read_text()
        again = trainer()
        assert again.resume() and again.step == 12
        again.train()
        assert again.log.path.read_text() == before and torch.equal(again.model.head.weight, t.model.head.weight)

    def test_of_a_group_that_had_no_gradient_yet(self, trainer):
        """As the low rank of the published recipe, which trains in the second half only."""

        class Late(Bigrams):
            def forward(self, ids):
                self.head.bias.requires_grad_(True)
                bias = self.head.bias if self.step() >= 6 else 0.0
                logits = F.linear(self.table(ids[:, :-1]), self.head.weight) + bias
                return {"loss": F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())}

        def late(folder="run"):
            t = trainer(folder, model=Late())
            t.folder.mkdir(exist_ok=True)
            t.model.step = lambda: t.step
            return t

        whole = late("whole")
        whole.train()
        stop_at(late(), 5)
        t = late()
        assert t.resume()
        t.train()
        assert torch.equal(t.model.head.weight, whole.model.head.weight)
        assert torch.equal(t.model.head.bias, whole.model.head.bias)

    def test_without_a_checkpoint(self, trainer):
        assert trainer().resume() is False

    def test_of_a_run_of_other_options_is_refused_before_anything_is_loaded(self, trainer):
        t = trainer(identity={"rank": 4, "share": 0.1, "seed": 0})
        t.train()
        before = t.log.path.read_text()
        other = trainer(identity={"rank": 4, "share": 0.2, "seed": 0})
        weight = other.model.head.weight.clone()
        with pytest.raises(DfssmError, match=r"run: was begun with share 0.1, not 0.2; resume with the same, or "):
            other.resume()
        assert torch.equal(other.model.head.weight, weight) and t.log.path.read_text() == before

    def test_of_another_text_is_refused_without_its_fingerprint(self, trainer):
        trainer(identity={"data": {"sha256": "0"}}).train()
        with pytest.raises(DfssmError, match=r"run: was begun with another data; resume with the same"):
            trainer(identity={"data": {"sha256": "1"}}).resume()

    def test_of_equal_options_that_json_writes_otherwise(self, trainer):
        trainer(identity={"data": ("a", "b"), "lr": 1e-3}).train()
        assert trainer(identity={"data": ["a", "b"], "lr": 0.001}).resume()

    def test_what_a_run_left_that_came_to_no_checkpoint_is_not_gone_on_with(self, trainer):
        stop_at(trainer(log_every=1), 3)
        t = trainer()
        t.train()
        assert [line["step"] for line in log(t)] == [3, 6, 9, 12]


class TestLonger:
    """A schedule of which the middle depends on no length: it may become longer until the rate falls."""

    LEVEL = 0.25, 0.75

    @staticmethod
    def rates(progress):
        return {name: 0.1 * min(1, progress / 0.25, (1 - progress) / 0.25) for name in ("matrix", "bias")}

    def run(self, trainer, folder, steps, **options):
        identity = {"steps": steps, "seed": 0}
        options = {"rates": self.rates, "level": self.LEVEL, "save_every": 100, "log_every": 1} | options
        t = trainer(folder, steps=steps, identity=identity, **options)
        t.folder.mkdir(exist_ok=True)
        return t

    def test_it_is_the_run_that_was_longer_from_the_start_but_for_its_warm_up(self, trainer):
        short = self.run(trainer, "run", 8)
        short.train()
        assert short.checkpoints.steps() == [6, 8]
        longer = self.run(trainer, "run", 16)
        assert longer.resume() and longer.step == 6 and longer.checkpoints.steps() == [6]
        seen = []
        longer.rates = lambda progress: seen.append(progress) or self.rates(progress)
        longer.train()
        assert [line["step"] for line in log(longer)] == list(range(1, 17))
        rates = [line["lr"] for line in log(longer)]
        assert rates[1:6] == pytest.approx([0.075, 0.1, 0.1, 0.1, 0.1], rel=0.3) and rates[2:12] == [0.1] * 10
        assert rates[12:] == sorted(rates[12:], reverse=True) and rates[-1] < 0.02
        assert longer.checkpoints.steps() == [12, 16]

    def test_much_longer_it_does_not_warm_up_again(self, trainer):
        self.run(trainer, "run", 8).train()
        longer = self.run(trainer, "run", 80)
        assert longer.resume()
        longer.train()
        assert [line["lr"] for line in log(longer)][6:60] == [0.1] * 54

    def test_stopped_after_that_it_goes_on(self, trainer):
        self.run(trainer, "run", 8).train()
        whole = self.run(trainer, "run", 40, save_every=7)
        whole.resume()
        stop_at(whole, 15)
        t = self.run(trainer, "run", 40, save_every=7)
        assert t.resume() and t.step == 14
        assert {rate for name, rate in self.rates(t.progress).items()} == {0.1}

    def test_shorter_it_is_refused(self, trainer):
        self.run(trainer, "run", 16).train()
        with pytest.raises(DfssmError, match="was begun with steps 16, not 8"):
            self.run(trainer, "run", 8).resume()

    def test_without_a_checkpoint_to_become_longer_from_it_is_refused(self, trainer):
        t = self.run(trainer, "run", 8)
        t.train()
        shutil.rmtree(t.checkpoints.folder / "step-000006")
        with pytest.raises(DfssmError, match="begun with steps 8, and has no checkpoint of steps 2 to 6"):
            self.run(trainer, "run", 16).resume()

    def test_of_a_rate_that_falls_all_along_it_is_refused(self, trainer):
        self.run(trainer, "run", 8, level=None).train()
        with pytest.raises(DfssmError, match="begun with steps 8, not 16"):
            self.run(trainer, "run", 16, level=None).resume()


class TestSigterm:
    def test_ends_the_step_saves_and_then_ends(self, trainer):
        class Ended(Exception):
            pass

        def end(number, frame):
            raise Ended

        t = trainer(save_every=100, log_every=1)
        forward = t.model.forward

        def signalled(ids):
            if t.step == 4:
                signal.raise_signal(signal.SIGTERM)
            return forward(ids)

        t.model.forward = signalled
        before = signal.signal(signal.SIGTERM, end)
        try:
            with pytest.raises(Ended):
                t.train()
            assert signal.getsignal(signal.SIGTERM) is end
        finally:
            signal.signal(signal.SIGTERM, before)
        assert t.checkpoints.steps() == [5]
        whole, again = trainer("whole", log_every=1), trainer(save_every=100, log_every=1)
        whole.folder.mkdir()
        whole.train()
        assert again.resume() and again.step == 5
        again.train()
        assert torch.equal(again.model.head.weight, whole.model.head.weight) and but_times(again) == but_times(whole)

    def test_in_the_last_step_changes_nothing(self, trainer):
        t = trainer(steps=2)
        forward, before = t.model.forward, signal.getsignal(signal.SIGTERM)
        t.model.forward = lambda ids: (t.step == 1 and signal.raise_signal(signal.SIGTERM)) or forward(ids)
        t.train()
        assert t.step == 2 and t.checkpoints.steps() == [2] and signal.getsignal(signal.SIGTERM) is before


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


# In the middle of the second save it stands still until it is killed: all is written, but for the name.
_SAVE = """
from dfssm.distill import checkpoint
import time
save = checkpoint.state_dict_saver.save
def slow(state, checkpoint_id):
    save(state, checkpoint_id=checkpoint_id)
    if "8" in checkpoint_id.name:
        time.sleep(600)
checkpoint.state_dict_saver.save = slow
"""


@pytest.mark.slow
def test_killed_in_a_save_it_is_as_if_it_never_was(start, command, distill, tmp_path, same_log):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = {"recipe": "paper", "seed": 3, "steps": 10, "save_every": 4, "log_every": 3, "evaluate_every": 5}
    checkpoints = killed / "checkpoints"

    (process,) = start([command(killed, **options)], setup=_SAVE)
    end = time.monotonic() + 120
    while not (checkpoints / ".step-000008.tmp" / ".metadata").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert '"step": 6' in (killed / "log.jsonl").read_text() and not (killed / "model.pt").exists()

    resumed, expected = distill(killed, resume=True, **options), distill(whole, **options)
    for name in ("sha256", "perplexity", "tokens"):
        assert resumed[name] == expected[name]
    assert same_log(killed) == same_log(whole)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000008", "step-000010"]


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
