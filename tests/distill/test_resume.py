"""A run that goes on: killed, resumed, lengthened or ended by SIGTERM it takes the same steps, bit for bit."""

import math
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bigrams import IDS, Bigrams, but_times, log, stop_at

from dfssm.base import DfssmError


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

    def test_of_rates_of_their_own(self, trainer):
        """A run that goes on finds the factors of its beginning, whatever it computes itself."""

        def options(factor):
            model = Bigrams()
            return {"model": model, "factors": {model.head.weight: factor}}

        whole = trainer("whole", **options(0.25))
        whole.folder.mkdir()
        whole.train()
        stop_at(trainer(**options(0.25)), 7)
        t = trainer(**options(3.0))
        assert t.resume() and t.step == 4
        t.train()
        assert torch.equal(t.model.head.weight, whole.model.head.weight)

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

    def test_what_a_checkpoint_of_before_does_not_know_was_as_usual(self, trainer):
        trainer(identity={"rank": 4}).train()
        assert trainer(identity={"rank": 4, "new": "a"}, usual={"new": "a", "rank": 16}).resume()
        with pytest.raises(DfssmError, match="was begun with new a, not b"):
            trainer(identity={"rank": 4, "new": "b"}, usual={"new": "a"}).resume()

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


class TestBest:
    """The step whose figure on the held-out text is least."""

    def run(self, trainer, figures, folder="run", **options):
        seen, left = {}, iter(figures)

        def held_out():
            seen[t.step] = t.model.head.weight.detach().clone()
            return {"held_out_kl": next(left)}

        options = {"steps": 8, "evaluate_every": 2, "save_every": 100, "best_by": "held_out_kl"} | options
        t = trainer(folder, held_out=held_out, **options)
        t.folder.mkdir(exist_ok=True)
        return t, seen

    def test_is_gone_back_to(self, trainer):
        t, seen = self.run(trainer, [3.0, 1.0, 2.0, 1.5])
        t.train()
        assert t.checkpoints.steps() == [4, 8]
        last = t.model.head.weight.detach().clone()
        assert t.take_best() == 4 and torch.equal(t.model.head.weight, seen[4])
        assert not torch.equal(t.model.head.weight, last)

    def test_it_outlives_the_newer_checkpoints(self, trainer):
        t, _ = self.run(trainer, [1.0, 2.0, 2.0, 2.0], save_every=2)
        t.train()
        assert t.checkpoints.steps() == [2, 6, 8] and t.take_best() == 2

    def test_the_last_may_be_it(self, trainer):
        t, seen = self.run(trainer, [4.0, 3.0, 2.0, 1.0])
        t.train()
        assert t.take_best() == 8 and torch.equal(t.model.head.weight, seen[8])

    def test_a_figure_that_is_no_number_is_none(self, trainer):
        t, _ = self.run(trainer, [math.nan, 2.0, math.nan, 3.0])
        t.train()
        assert t.take_best() == 4

    def test_nobody_asks_for_it(self, trainer):
        t, seen = self.run(trainer, [1.0, 2.0, 2.0, 2.0], best_by="")
        t.train()
        assert t.checkpoints.steps() == [8] and t.take_best() == 8 and torch.equal(t.model.head.weight, seen[8])

    def test_a_run_that_goes_on_knows_it(self, trainer):
        t, seen = self.run(trainer, [3.0, 1.0])
        stop_at(t, 5)
        assert t.checkpoints.steps() == [2, 4]
        t, _ = self.run(trainer, [2.0, 2.0])
        assert t.resume() and t.step == 4
        t.train()
        assert t.take_best() == 4 and torch.equal(t.model.head.weight, seen[4])

    def test_one_whose_checkpoint_is_gone_is_forgotten(self, trainer):
        t, _ = self.run(trainer, [1.0, 2.0, 2.0], save_every=2)
        stop_at(t, 6)
        shutil.rmtree(t.checkpoints.folder / "step-000002")
        t, _ = self.run(trainer, [3.0], save_every=2)
        assert t.resume() and t.step == 6 and t.best is None
        t.train()
        assert t.take_best() == 8


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
