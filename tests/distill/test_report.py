"""The report page: what it shows of a run."""

import json
import math
import re

import pytest
from html_page import Page

from dfssm.base import DfssmError
from dfssm.distill import report


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
