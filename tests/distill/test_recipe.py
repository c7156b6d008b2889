"""What a recipe asks for along a run, and the values that it refuses."""

import dataclasses
import math
import re

import pytest

from dfssm.base import DfssmError
from dfssm.distill.recipe import RECIPES, Recipe

PAPER = RECIPES["paper"]
SHARE = 12.3 / 32.3  # of the published steps, those of stage 1


class TestBlend:
    def test_without_annealing_the_hard_weights_are_there_from_the_start(self):
        assert [Recipe().blend(p) for p in (0, 0.5, 1)] == [1, 1, 1]

    @pytest.mark.parametrize("anneal", ["continuous", "levels"])
    def test_they_fade_in_over_a_share_of_the_steps(self, anneal):
        recipe = Recipe(anneal=anneal, anneal_share=0.4)
        assert [recipe.blend(p) for p in (0, 0.1, 0.2, 0.4, 0.9, 1)] == pytest.approx([0, 0.25, 0.5, 1, 1, 1])

    def test_over_no_share_they_are_there_at_once(self):
        assert Recipe(anneal="continuous", anneal_share=0).blend(0) == 1

    def test_the_share_is_of_the_steps_of_the_scaffold(self):
        recipe = Recipe(anneal="continuous", anneal_share=0.5, scaffold_share=0.5)
        assert [recipe.blend(p) for p in (0, 0.125, 0.25, 1)] == [0, 0.5, 1, 1]


class TestRates:
    def test_rise_then_a_cosine_to_the_last(self):
        recipe = Recipe(lr=1.0, warmup=0.2, final_lr=0.1)
        found = [recipe.rates(p)["scaffold"] for p in (0.1, 0.2, 0.6, 1 - 1e-9)]
        assert found == pytest.approx([0.5, 1.0, 0.1 + 0.9 / 2, 0.1])
        falling = [recipe.rates(0.2 + 0.8 * i / 20)["scaffold"] for i in range(20)]
        assert falling == sorted(falling, reverse=True)
        assert falling[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)

    def test_at_the_very_end(self):
        for recipe in (Recipe(lr=1.0, final_lr=0.1), Recipe(lr=1.0, final_lr=0.1, scaffold_share=0.5)):
            assert recipe.rates(1.0)["low_rank"] == pytest.approx(0.1)

    def test_warm_up_begins_near_zero(self):
        recipe = Recipe(lr=1.0, warmup=0.5)
        assert recipe.rates(0.0)["scaffold"] <= recipe.rates(0.01)["scaffold"] <= 0.03

    @pytest.mark.parametrize("warmup", [0, 1])
    def test_warm_up_of_nothing_and_of_all(self, warmup):
        recipe = Recipe(lr=1.0, warmup=warmup, final_lr=0.5)
        assert recipe.rates(0.0)["scaffold"] == (0 if warmup else 1)
        assert recipe.rates(0.75)["scaffold"] == pytest.approx(
            0.75 if warmup else 0.5 + 0.25 * (1 + math.cos(0.75 * math.pi))
        )

    @pytest.mark.parametrize("progress", [0.02, 0.3, 0.99])
    def test_groups_have_their_factors(self, progress):
        found = Recipe(low_rank_lr=3, float_lr=0.5).rates(progress)
        assert found["low_rank"] == pytest.approx(3 * found["scaffold"])
        assert found["float"] == pytest.approx(0.5 * found["scaffold"])
        assert Recipe(train_float=False).rates(progress)["float"] == 0


class TestWarmUpStableDecay:
    RECIPE = Recipe(curve="wsd", lr=1.0, warmup=0.1, decay=0.25, final_lr=0.2)

    def test_the_rate_rises_stays_and_falls(self):
        found = [self.RECIPE.rates(p)["scaffold"] for p in (0.05, 0.1, 0.5, 0.75, 0.875, 1.0)]
        assert found == pytest.approx([0.5, 1, 1, 1, 0.6, 0.2])

    def test_of_no_decay(self):
        assert dataclasses.replace(self.RECIPE, decay=0.0).rates(1.0)["scaffold"] == pytest.approx(1)

    def test_its_level_part_depends_on_no_length(self):
        assert self.RECIPE.level == (0.1, 0.75)

    @pytest.mark.parametrize("other", [{"curve": "cosine"}, {"anneal": "levels"}, {"scaffold_share": 0.5}])
    def test_others_have_none(self, other):
        assert dataclasses.replace(self.RECIPE, **other).level is None


class TestPaper:
    """Stage 1: the scaffold alone at 3e-4, annealed; stage 2: the low rank alone at 1e-3, of a frozen scaffold."""

    def test_first_stage(self):
        for progress in (0.0, SHARE / 2, SHARE - 1e-9):
            rates = PAPER.rates(progress)
            assert rates["low_rank"] == 0 and rates["float"] == rates["scaffold"] and PAPER.low_rank(progress) == "none"
        assert PAPER.rates(0.05 * SHARE)["scaffold"] == pytest.approx(3e-4)

    def test_the_ramp_is_as_long_as_the_first_stage(self):
        assert [PAPER.blend(p * SHARE) for p in (0.25, 0.5, 1)] == pytest.approx([0.25, 0.5, 1])

    def test_second_stage(self):
        for progress in (SHARE, 0.7, 1 - 1e-9):
            rates = PAPER.rates(progress)
            assert rates["scaffold"] == rates["float"] == 0 and PAPER.low_rank(progress) == "float"
            assert PAPER.blend(progress) == 1
        assert PAPER.rates(SHARE + 0.05 * (1 - SHARE))["low_rank"] == pytest.approx(1e-3)

    def test_each_stage_has_a_curve_of_its_own_that_ends_at_zero(self):
        assert PAPER.rates(SHARE - 1e-9)["scaffold"] == pytest.approx(0, abs=1e-12)
        assert PAPER.rates(1 - 1e-9)["low_rank"] == pytest.approx(0, abs=1e-12)

    def test_it_is_the_published_one(self):
        published = {
            "hard": "levels",
            "anneal": "continuous",
            "rank": 16,
            "planes": 1,
            "levels": 17,
            "temperature": 2.0,
        }
        assert published.items() <= dataclasses.asdict(PAPER).items()


def test_the_default_trains_what_ships():
    assert RECIPES["binary"] == Recipe()
    assert Recipe().low_rank(0) == Recipe().low_rank(1) == "int8"
    assert (Recipe().hard, Recipe().activations, Recipe().blend(1)) == ("sign", "int8", 1)


KNOWN = {field.name: field.metadata for field in dataclasses.fields(Recipe)}
CHOICES = {name: known["choices"] for name, known in KNOWN.items() if "choices" in known}
RANGES = {name: known["range"] for name, known in KNOWN.items() if "range" in known}


def test_every_ingredient_has_its_values():
    assert {*KNOWN} == {*CHOICES, *RANGES, "train_float"}


class TestErrors:
    @pytest.mark.parametrize("name", CHOICES)
    def test_a_choice(self, name):
        with pytest.raises(DfssmError, match=f"^{name} is 'x'; choose one of {', '.join(CHOICES[name])}$"):
            Recipe(**{name: "x"})
        for value in CHOICES[name]:
            Recipe(**{name: value})

    @pytest.mark.parametrize("name", RANGES)
    def test_a_number(self, name):
        least, most = RANGES[name]
        for value in (least - 1e-3, most + 1, math.nan, math.inf, -math.inf, 10**30):
            message = f"{name} is {value}; give a number from {least:,} to {most:,}"
            with pytest.raises(DfssmError, match=f"^{re.escape(message)}$"):
                Recipe(**{name: value})
        for value in RANGES[name]:
            Recipe(**{name: value})
