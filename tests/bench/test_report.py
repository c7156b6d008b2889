"""The tables and plots of docs/performance.md, from figures of a tiny bundle."""

import json

import pytest

from dfssm.bench import decode, report, report_text
from dfssm.opset import DfssmError
from dfssm.opset.markdown import filled


@pytest.fixture(scope="module")
def figures(tiny_bundle):
    """What `dfssm bench --json` prints, read back, for some of the points."""

    def bench(**options):
        return json.loads(json.dumps(decode.bench(str(tiny_bundle), prompt=2, tokens=2, rounds=1, **options)))

    full = bench(threads=2, batches=(8,), ops=True)
    return {
        "peers": bench(peers=("stock-ort",)) | {"tok_s": 40.0},
        "1.3b, 2 threads": full,
        "size 130m": full,
        "batches": full,
        "prompt 8": full,
        "busy 1": full | {"tok_s": 40.0},
        "busy 2": full | {"tok_s": 30.0},
    }


def test_a_table_has_what_was_measured(figures):
    made = report_text.tables(figures)
    goals = [line.split(" | ") for line in made["goals"].splitlines()]
    assert len({len(row) for row in goals}) == 1
    assert goals[-1][-2:] == ["25 %", "not run |"]
    share = 100 * figures["1.3b, 2 threads"]["floor_share"]
    assert goals[2][2].endswith(f" {share:.0f} %") and goals[2][3] == "not measured |"
    assert "| AVX-512 VNNI | 2 | SelectiveScanStep (2) |" in made["ops"]
    assert "| stock-ort, 8-bit head |" in made["peers"] and "| 1.3b, batch 8 |" in made["points"]


def test_the_page_is_filled_and_filled_again(figures):
    made = report_text.tables(figures)
    page = "a\n<!-- measured: goals -->\nold\n<!-- end -->\nb\n"
    once = filled(page, made)
    assert "old" not in once and made["goals"] in once and once.endswith("<!-- end -->\nb\n")
    assert filled(once, made) == once
    with pytest.raises(DfssmError, match="there is no table 'other'"):
        filled(page.replace("goals", "other"), made)


def test_plots_are_the_same_bytes_again(figures, tmp_path):
    pytest.importorskip("matplotlib", reason="`make bench-peers` installs it")
    report_text.plots(figures, tmp_path / "a.svg")
    report_text.plots(figures, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and len(drawn) < 200_000
    assert "limit of the memory" in drawn and "length of the prompt" in drawn


def test_every_point_has_its_bundle():
    assert {of for of, _ in report.POINTS.values()} == report.BUNDLES.keys()
