"""The range test of the learning rate: its steps, where it ends, and what it leaves."""

import json

import pytest
import torch

from dfssm.base import DfssmError
from dfssm.base.chart import label
from dfssm.distill import rates
from dfssm.distill.distributed import Ranks
from dfssm.distill.rates import LEAST, MOST, page, range_test, smoothed, summary
from dfssm.distill.recipe import RECIPES
from dfssm.distill.trainer import NotFinite, Trainer

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_smoothed_is_the_mean_of_five():
    assert smoothed([4.0, 2.0, 3.0, 7.0, 9.0, 1.0]) == pytest.approx([3, 4, 5, 22 / 5, 5, 17 / 3])
    assert smoothed([]) == [] and smoothed([2.0]) == [2.0]


def test_the_rate_suggested_is_below_that_of_the_least_loss():
    found = summary([1e-4, 1e-3, 1e-2, 1e-1, 1.0], [9.0, 5.0, 1.0, 3.0, 99.0])
    assert found["least"] == 1e-3 and found["suggested"] == 1e-3 / rates.BELOW


class TestARun:
    @pytest.fixture
    def test(self, job, tmp_path):
        """test(steps, ...) -> what the test of a tiny job finds, in tmp_path / "out"; options are those of `job`."""
        return lambda steps, **options: range_test(job(tmp_path / "out", **options), ALONE, steps)

    def test_takes_the_steps_of_training_at_rates_that_rise_evenly(self, test, distill, tmp_path):
        found = test(5)
        assert found["rates"] == pytest.approx([1e-5, 10**-3.75, 10**-2.5, 10**-1.25, 1])
        assert (LEAST, MOST) == (1e-5, 1)
        distill(tmp_path / "run", held_out=0.0)
        lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert found["loss"][0] == lines[0]["loss"]  # before any step
        assert len(set(found["loss"])) == 5

    def test_leaves_its_report_alone(self, test, tmp_path):
        found = test(3)
        assert {path.name for path in (tmp_path / "out").rglob("*")} == {"rates.html", "rates.json"}
        assert json.loads((tmp_path / "out" / "rates.json").read_text()) == found
        assert f"<b>{label(found['suggested'])}</b>" in (tmp_path / "out" / "rates.html").read_text()

    def test_all_groups_have_their_share_of_the_rate(self, test, monkeypatch):
        seen = []
        update = Trainer.update
        monkeypatch.setattr(Trainer, "update", lambda self, rates: seen.append(rates) or update(self, rates))
        test(2, recipe="paper")
        assert seen[1] == pytest.approx({"scaffold": 1.0, "low_rank": 0.0, "float": RECIPES["paper"].float_lr})

    def test_ends_where_the_loss_is_much_worse(self, test, monkeypatch):
        monkeypatch.setattr(rates, "WORSE", 1.0)
        found = test(40)
        values = found["smoothed"]
        assert 1 < len(values) < 40 and values[-1] > min(values)

    def test_ends_where_it_is_no_number(self, test, monkeypatch):
        step = Trainer._step

        def broken(self):
            if self.step == 2:
                raise NotFinite("step 3: the loss is nan")
            return step(self)

        monkeypatch.setattr(Trainer, "_step", broken)
        assert len(test(5)["loss"]) == 2

    def test_without_a_single_loss_it_is_said(self, test, monkeypatch, tmp_path):
        def broken(self):
            raise NotFinite("step 1: the loss is nan")

        monkeypatch.setattr(Trainer, "_step", broken)
        with pytest.raises(DfssmError, match="^--range-test: the loss is no number from the first step on"):
            test(5)
        assert not (tmp_path / "out").exists()

    def test_of_several_ranks_is_refused(self, job, tmp_path):
        with pytest.raises(DfssmError, match="--range-test runs on one device, not on 2: leave out torchrun"):
            range_test(job(tmp_path / "out"), Ranks(0, 2, torch.device("cpu")), 3)
        assert not (tmp_path / "out").exists()


def test_the_page_draws_both_lines_over_the_rates():
    found = summary([1e-4, 1e-3, 1e-2, 1e-1], [4.0, 3.0, 2.0, 8.0])
    text = page(found)
    assert "of a step: 4 at 1e-4, 8 at 0.1." in text and "smoothed: 3 at 1e-4" in text
    assert text.count("<svg") == 1 and ">0.01</text>" in text
