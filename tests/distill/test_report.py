"""The report page: its charts against cases worked by hand, and what it shows of a run."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from dfssm.distill import chart, report
from dfssm.distill.chart import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Series
from dfssm.opset import DfssmError


class Page(HTMLParser):
    """A page that is well formed: every element closed in order. Keeps tags with attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str, kind: str = "") -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag and kind in ["", *attrs.get("class", "").split()]]


def line(step: int, **values) -> dict:
    found = {"step": step, "tokens": 1000 * step, "loss": 2 / step, "kl": 1 / step, "lr": 1e-3, "blend": 0.5}
    return found | {"tok_s": 900.0, "grad_norm": 1.0, "seconds": 1.5 * step} | values


def evaluation(step: int, perplexity: float) -> dict:
    found = {"step": step, "tokens": 1000 * step, "held_out": 4.0, "perplexity": perplexity, "seconds": 1.5 * step}
    return found | {"held_out_kl": perplexity / 100, "held_out_same_top": 0.5}


RESULT = {
    "recipe": {"hard": "sign", "rank": 2, "data": ["a.txt", "b"]},
    "schedule": {"steps": 4, "batch": 8},
    "tokens": 4000,
    "seconds": 8.0,
    "held_out_tokens": 27191,
    "perplexity": {"teacher": 50.0, "data_free": 125.0, "student": 55.0, "float_low_rank": 55.5},
    "kl": {"data_free": 1.25, "student": 0.0625},
    "same_top": {"data_free": 0.25, "student": 0.875},
    "model": "model.pt",
}


@pytest.fixture
def written(tmp_path):
    """written(log lines, result) -> the page of that run."""

    def write(log, result) -> Page:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        (tmp_path / "result.json").write_text(json.dumps(result))
        path = report.write_report(tmp_path)
        assert path == tmp_path / "report.html" and not list(tmp_path.glob("*.tmp"))
        return Page(path.read_text(encoding="utf-8"))

    return write


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

    @pytest.mark.parametrize(
        "seconds, text",
        [
            (0, "0 s"),
            (42.4, "42 s"),
            (59.6, "1 min 0 s"),
            (303, "5 min 3 s"),
            (3600, "1 h 0 min"),
            (22350, "6 h 12 min"),
        ],
    )
    def test_duration(self, seconds, text):
        assert report.duration(seconds) == text


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
        page = Page(chart.svg(drawn, "a", 2e6))
        (svg,) = page.of("svg")
        assert svg["role"] == "img" and svg["aria-labelledby"] == "a-title a-desc"
        assert page.of("title") == [{"id": "a-title"}] and page.of("desc") == [{"id": "a-desc"}]
        assert len(page.of("path", "line")) == 1 and len(page.of("path", "reference")) == 1


class TestPage:
    def test_a_complete_run(self, written):
        page = written([evaluation(0, 125.0), *map(line, range(1, 5)), evaluation(4, 55.0)], RESULT)
        assert len(page.of("svg")) == 8 and len(page.of("circle", "dot")) == 6
        assert page.text.index("0.0625") < page.text.index("55.00")  # the divergence comes first
        for text in (
            "87.5 %",
            "4k",
            "8 s",
            "500",
            "55.00",
            "1.100 ×",
            "27.2k held-out tokens",
            '["a.txt", "b"]',
        ):
            assert text in page.text
        table = re.sub(r"\s+", " ", page.text)
        assert (
            "teacher50.001.000"
            "data-free conversion125.002.5001.2500student, as shipped55.001.1000.0625"
            "student with a float low rank55.501.110" in table
        )
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids)) == 16

    def test_nothing_is_fetched_and_nothing_runs(self, written):
        page = written([line(1)], RESULT)
        assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
        assert not any(key in ("src", "href") or key.startswith("on") for _, attrs in page.tags for key in attrs)
        assert "url(" not in page.text and "@import" not in page.text and "prefers-color-scheme: dark" in page.text

    def test_without_held_out_text(self, written):
        page = written([line(1), line(2)], RESULT | {"perplexity": {}, "kl": {}, "same_top": {}, "held_out_tokens": 0})
        assert len(page.of("svg")) == 5 and len(page.of("div", "tile")) == 3
        assert "no values" not in page.text and "teacher" not in page.text

    def test_a_chart_is_of_something(self, written):
        """Nothing is annealed, and the gradient is that of each group where it is known."""
        more = {"blend": 1.0, "flipped": 0.1, "grad_norm_scaffold": 1.0, "grad_norm_float": 2.0}
        page = written([line(i, **more) for i in (1, 2)], RESULT)
        assert len(page.of("svg")) == 5 and "Annealing" not in page.text and "Flipped signs" in page.text
        assert "scaffold: 1 at" in page.text and "float: 2 at" in page.text and "low rank:" not in page.text

    def test_numbers_that_are_not_finite_are_not_drawn(self, written):
        page = written([line(1), line(2, grad_norm=math.inf), evaluation(2, math.nan), line(3)], RESULT)
        numbers = " ".join(" ".join(map(str, attrs.values())) for _, attrs in page.tags)
        assert "nan" not in numbers and "inf" not in numbers
        assert page.of("path", "line")[-1]["d"].count("L") == 1  # from 1 to 3

    def test_parts_of_the_loss_are_drawn_where_there_are_several(self, written):
        page = written([line(1, hidden=0.5), line(2, hidden=0.4)], RESULT)
        assert {"loss", "KL", "hidden"} <= set(re.findall(r"\w+", page.text)) and len(page.of("i")) == 3
        assert "KL" not in written([line(1), line(2)], RESULT | {"kl": {}}).text

    def test_everything_is_escaped(self, tmp_path):
        evil = "<script>alert('&')</script>\"</style>"
        result = RESULT | {"recipe": {evil: evil}}
        text = report.page(evil, [line(1, **{evil: evil})], result)
        assert "<script" not in text and text.count("</style>") == 1
        assert Page(text).text.count(evil) == 4  # title, heading, option and value

    def test_a_long_log_makes_a_small_page(self, written, tmp_path):
        written([line(step, loss=1 + math.sin(step)) for step in range(1, 5001)], RESULT)
        assert (tmp_path / "report.html").stat().st_size < 150_000

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "log.jsonl").write_text(json.dumps(line(1)) + "\n")
        (tmp_path / "result.json").write_text(json.dumps(RESULT))
        (tmp_path / "report.html").mkdir()
        with pytest.raises(DfssmError, match="cannot write .*report.html"):
            report.write_report(tmp_path)
