"""The tables and plots of docs/performance.md, from figures of a tiny bundle."""

import json

import pytest

from dfssm.base import DfssmError
from dfssm.base.markdown import filled
from dfssm.bench import decode, plot, report, report_text


@pytest.fixture(scope="module")
def figures(tiny_bundle):
    """What `dfssm bench --json` prints, read back, for some of the points."""

    def bench(**options):
        return json.loads(json.dumps(decode.bench(str(tiny_bundle), prompt=2, tokens=2, rounds=1, **options)))

    full = bench(threads=2, batches=(2, 8), ops=True)
    return {
        "peers": bench(peers=("stock-ort",)) | {"tok_s": 40.0},
        "1.3b, 2 threads": full,
        "1.3b, 1 threads": full,
        "state int8-deferred, 2 threads": full | {"tok_s": 1e6, "state_dtype": "int8-deferred"},
        "size 130m": full,
        "prompt 8": full,
        "busy 1": full | {"tok_s": 40.0},
        "busy 2": full | {"tok_s": 30.0},
    }


def of_machine(figures, *isas):
    """The same, made by a machine with these instruction sets."""
    return {n: f | {"machine": f["machine"] | {"isas": ["scalar", *isas]}} for n, f in figures.items()}


def test_a_table_has_what_was_measured(figures):
    made = report_text.tables(of_machine(figures, "avx2"))
    goals = [line.split(" | ") for line in made["goals"].splitlines()]
    assert goals[0] == ["| ", "goal", "AVX2 |"] and {len(row) for row in goals} == {3}
    assert (
        goals[2][1] == "80 %"
        and goals[2][2].startswith("1000000.0 tok/s")
        and goals[2][2].endswith("int8-deferred states |")
    )
    share = 100 * figures["1.3b, 1 threads"]["floor_share"]
    assert goals[3][1] == "72 %" and f" {share:.0f} %" in goals[3][2]
    assert goals[-1][-1] == "25 % |"
    assert "| AVX2 | 2 | SelectiveScanStep (2) |" in made["ops"] and "| AVX2 | 1 | outside our kernels |" in made["ops"]
    assert "| stock-ort, 8-bit head |" in made["peers"] and "| 1.3b, 2 threads, batch 8 |" in made["points"]


def test_a_machine_with_more_than_avx2_has_a_column_for_it(figures):
    both = of_machine(figures, "avx2", "avx512vnni")
    both["avx2, 2 threads"] = both["1.3b, 2 threads"]
    goals = [line.split(" | ") for line in report_text.tables(both)["goals"].splitlines()]
    assert goals[0] == ["| ", "goal", "AVX-512 VNNI", "AVX2 |"] and {len(row) for row in goals} == {4}
    assert goals[2][1] == "85 %" and goals[3][3] == "not measured |" and goals[-1][-2:] == ["25 %", "not run |"]


def test_a_machine_fills_the_places_of_its_instruction_set(figures):
    made = report_text.tables(figures)
    page = "".join(f"{isa}\n<!-- measured: {isa} goals -->\nold\n<!-- end -->\nb\n" for isa in ("avx2", "dotprod"))
    once = filled(page, made, of="avx2")
    head, _, tail = once.partition("dotprod\n")
    assert "old" not in head and made["goals"] in head and page.endswith(tail)
    assert filled(once, made, of="avx2") == once
    with pytest.raises(DfssmError, match="there is no table 'other'"):
        filled(page.replace("goals", "other"), made, of="avx2")
    with pytest.raises(DfssmError, match="the page has no table of i8mm: add <!-- measured: i8mm goals -->"):
        filled(page, made, of="i8mm")


def test_plots_are_the_same_bytes_again(figures, tmp_path):
    plot.plots(figures, tmp_path / "a.svg")
    plot.plots(figures, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and len(drawn) < 200_000
    assert "limit of the memory" in drawn and "length of the prompt" in drawn


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_run_is_drawn_with_all_that_it_measured(figures, suffix, tmp_path):
    run = figures["1.3b, 2 threads"] | {"peers": figures["peers"]["peers"]}
    run["speculation"] = [{"right": 0.5, "tok_s": 3.0}, {"right": 1.0, "tok_s": 9.0}]
    for name in "ab":
        plot.plot_run(run, tmp_path / f"{name}.{suffix}")
    drawn = (tmp_path / f"a.{suffix}").read_bytes()
    assert drawn == (tmp_path / f"b.{suffix}").read_bytes()
    if suffix == "png":
        assert drawn.startswith(b"\x89PNG")
        return
    for text in ("limit of the memory", *run["peers"], "prompt of 2", "sequences at once", "100%", "SelectiveScanStep"):
        assert f">{text}<" in drawn.decode(), text


def test_every_point_has_its_bundle():
    points = report.points(["scalar", "avx2", "avx512vnni"])
    assert {of for of, _ in points.values()} == report.BUNDLES.keys()
    fewer = report.points(["scalar", "avx2"])  # its best: no points of their own
    assert points.keys() - fewer.keys() == {"avx2, 1 threads", "avx2, 2 threads"}
