"""Charts against cases worked by hand."""

import math

import pytest
from html_page import Page

from dfssm.base import chart
from dfssm.base.chart import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Series


class TestNumbers:
    @pytest.mark.parametrize(
        "value, text",
        [
            *[
                (0, "0"),
                (0.25, "0.25"),
                (3e-4, "3e-4"),
                (1.5e-3, "1.5e-3"),
                (0.01, "0.01"),
                (-2.5, "-2.5"),
                (27191, "27.2k"),
            ],
            *[(999.4, "999"), (999.7, "1k"), (12500, "12.5k"), (32e6, "32M"), (3e11, "300G"), (2e15, "2000T")],
        ],
    )
    def test_label(self, value, text):
        assert chart.label(value) == text


class TestTicks:
    @pytest.mark.parametrize(
        "low, high, expected",
        [
            (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
            (0, 10, [0, 2, 4, 6, 8, 10]),
            (52.2, 132.2, [40, 60, 80, 100, 120, 140]),
            (0.31, 0.34, [0.31, 0.32, 0.33, 0.34]),
            (-3, 4, [-4, -2, 0, 2, 4]),
            (0, 3.2e7, [0, 1e7, 2e7, 3e7, 4e7]),
            (1e-4, 9e-4, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
        ],
    )
    def test_round_and_around_the_values(self, low, high, expected):
        assert chart.ticks(low, high) == expected

    @pytest.mark.parametrize("value", [0.0, 1.0, -7.5, 3e38, 1e-30])
    def test_one_value_lies_within(self, value):
        found = chart.ticks(value, value * (1 + 1e-15))
        assert found[0] < value < found[-1] and found == sorted(set(found))

    @pytest.mark.parametrize(
        "low, high, expected",
        [
            *[(1, 1000, [1, 10, 100, 1000]), (0.02, 3, [0.01, 0.1, 1, 10]), (5, 5, [1, 10])],
            (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
        ],
    )
    def test_powers_of_ten(self, low, high, expected):
        assert chart.log_ticks(low, high) == pytest.approx(expected)

    def test_positions(self):
        assert [Axis.over([0, 10]).position(v) for v in (0, 2.5, 10)] == [0, 0.25, 1]
        axis = Axis.over([1, 60, 100], log=True)
        assert axis.log and [axis.position(v) for v in (1, 10, 100)] == pytest.approx([0, 0.5, 1])
        assert not Axis.over([1, 20], log=True).log and not Axis.over([0, 100], log=True).log
        assert Axis.until(7.0).position(3.5) == 0.5 and Axis.until(7.0).ticks == [0, 2, 4, 6]
        assert Axis.over([]).ticks[0] == 0 and Axis.over([]).ticks[-1] == 1


class TestLines:
    AXES = Axis.over([0, 10]), Axis.over([0, 1])

    def test_a_path(self):
        middle = f"{(LEFT + RIGHT) / 2:.1f} {(TOP + BOTTOM) / 2:.1f}"
        assert chart.path([(0, 0.0), (5, 0.5), (10, 1.0)], *self.AXES) == (
            f"M{LEFT:.1f} {BOTTOM:.1f}h0L{middle}L{RIGHT:.1f} {TOP:.1f}"
        )
        assert chart.path([], *self.AXES) == ""

    def test_smooth_is_the_weighted_mean_of_all(self):
        points = [(0.0, 1.0), (3.0, 5.0), (4.0, 2.0)]
        for (x, _), (at, found) in zip(points, chart.smooth(points, 2.0), strict=True):
            weights = [math.exp(-abs(x - other) / 2.0) for other, _ in points]
            expected = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / sum(weights)
            assert at == x and found == pytest.approx(expected)
        assert chart.smooth([], 1.0) == []

    def test_thin_keeps_extremes_and_order(self):
        points = [(float(i), math.sin(i)) for i in range(10_000)]
        points[4321] = (4321.0, 99.0)
        found = chart.thin(points, 100)
        assert len(found) <= 101 and found == sorted(found, key=lambda p: p[0]) and set(found) <= set(points)
        assert (4321.0, 99.0) in found and min(y for _, y in found) == min(y for _, y in points)
        assert chart.thin(points[:100], 100) == points[:100]

    def test_words_for_those_who_do_not_see_it(self):
        drawn = Chart("Loss", "nats", [Series("loss", [(0, 2.5), (2e6, 0.5)])], ("teacher", 0.25))
        assert chart.describe(drawn) == "loss: 2.5 at 0 tokens, 0.5 at 2M tokens. teacher: 0.25."
        page = Page(chart.svg(drawn, "a", Axis.until(2e6)))
        (svg,) = page.of("svg")
        assert svg["role"] == "img" and svg["aria-labelledby"] == "a-title a-desc"
        assert page.of("title") == [{"id": "a-title"}] and page.of("desc") == [{"id": "a-desc"}]
        assert len(page.of("path", "line")) == 1 and len(page.of("path", "reference")) == 1


class TestFigures:
    def test_numbered_things_have_whole_ticks_and_room_at_the_ends(self):
        assert Axis.numbers(1).ticks == [0] and Axis.numbers(2).ticks == [0, 1]
        axis = Axis.numbers(48)
        assert axis.ticks == [0, 10, 20, 30, 40] and 0 < axis.position(0) < axis.position(47) < 1

    def test_powers_are_logarithmic_however_near_the_values(self):
        axis = Axis.powers([2.0, 3.0])
        assert axis.log and axis.ticks == pytest.approx([1, 10]) and axis.position(10**0.5) == pytest.approx(0.5)

    def test_points_with_names_have_no_line_and_their_names_stay_inside(self):
        line, points = [(1.0, 1.0), (2.0, 2.0)], [(1.0, 1.0), (100.0, 2.0)]
        both = [Series("a", line), Series("b", points, dots=True, names=["left", "<right>"])]
        drawn = Chart("Roofline", "", both, across="ops", at="{} ops a byte")
        text = chart.figure(drawn, "a", Axis.powers([1.0, 100.0]))
        page = Page(text)
        assert len(page.of("path", "line")) == 1 and len(page.of("circle", "dot")) == 2
        assert "b: 1 at 1 ops a byte, 2 at 100 ops a byte." in page.text and "<right>" in page.text
        left, right = page.of("text")[-2:]
        assert float(left["x"]) > LEFT and right["class"] == "end" and float(right["x"]) < RIGHT
        assert len(page.of("i")) == 2, "a legend for two series"
