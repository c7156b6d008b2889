"""The command of the fair bench: what it has measured, in the page of results."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from examples_as_modules import load

from dfssm.eval.fair.rows import FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    return load("03_fair_bench.py")


def call(bench, *arguments):
    return CliRunner().invoke(bench.fair_bench, [*map(str, arguments)])


def test_the_page_of_results_has_a_place_for_every_table(bench, tmp_path):
    row = next(row for row in bench.SECTIONS["facts"][0](tmp_path, [0]) if row.name.endswith("5%-by-1024"))
    figures = {"tokens": 100, "weights": 400, "ratio": 1.5, "kl": 0.25, "same_top": 0.5, "known": 0.125}
    (tmp_path / row.name).mkdir(parents=True)
    (tmp_path / row.name / FILE).write_text(json.dumps({"setup": row.setup, "figures": figures}))
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs/results.md").read_text())
    done = call(bench, "--folder", tmp_path, "--measured", "--json", "--docs", page)
    assert done.exit_code == 0 and json.loads(done.stdout) == {"rows": {row.name: figures}}
    filled = page.read_text()
    assert (
        "| 1 plane, rank 1, 5 % of the tokens, 1,024 a step | 1 | 100 | 0.25 | 1.500 | 0.250 | 50.0 % | 12.5 % |"
        in filled
    )
    for name in bench.SECTIONS:
        assert f"<!-- measured: {name} -->\n| " in filled
    assert "| 12.5 % |" in call(bench, "--folder", tmp_path, "--measured").output


def test_what_does_not_fit_is_said(bench, tmp_path):
    assert "needs --text" in call(bench, "--folder", tmp_path, "--only", "text").output
    assert call(bench, "--folder", tmp_path, "--only", "other").exit_code == 2
