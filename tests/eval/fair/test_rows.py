"""Rows are made once: a killed run leaves whole ones, and the next goes on from them."""

import json
import signal
import subprocess
import sys
import time

import pytest

from dfssm.base.errors import DfssmError
from dfssm.eval.fair.rows import FILE, Row, read, run

FOREVER = """
import sys, time
from pathlib import Path
from dfssm.eval.fair.rows import Row, run

def make(folder, found):
    (folder / "model").write_text("x")
    time.sleep(0.002)
    return {"rows_before": len(found), "value": 0.5, "long": list(range(20_000))}

run([Row(f"a/{i}", {"i": i}, 1.0, make) for i in range(100_000)], Path(sys.argv[1]), print)
"""


def rows(made, setup=None):
    def make(number):
        return lambda folder, found: made.append(number) or {"value": number / 2, "before": len(found)}

    return [Row(f"section/seed-0/{i}", setup or {"i": [i]}, i + 1.0, make(i)) for i in range(4)]


def test_a_run_goes_on_where_it_was(tmp_path):
    made, said = [], []
    first = run(rows(made)[:2], tmp_path, said.append)
    found = run(rows(made), tmp_path, said.append)
    assert made == [0, 1, 2, 3]
    assert found.keys() == {f"section/seed-0/{i}" for i in range(4)} and first.items() <= found.items()
    assert [figures["value"] for figures in found.values()] == [0, 0.5, 1, 1.5]
    assert [figures["before"] for figures in found.values()] == [0, 1, 2, 3]  # a row knows those before
    assert "section/seed-0/2: value 1, seconds 0; 1 of 2 rows, about 0 min left" in said
    assert run(rows(made), tmp_path, said.append) == found == read(rows([]), tmp_path)
    assert len(made) == len(said) == 4


def test_a_row_of_another_setup_is_refused(tmp_path):
    run(rows([]), tmp_path, lambda line: None)
    with pytest.raises(DfssmError, match="row.json: was measured with another setup; remove it, or choose another"):
        run(rows([], {"i": [7]}), tmp_path, lambda line: None)


def test_a_killed_run_leaves_whole_rows(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FOREVER, tmp_path], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob(FILE))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    files = list(tmp_path.rglob(FILE))
    assert len(files) >= 20
    for file in files:
        assert len(json.loads(file.read_text())["figures"]["long"]) == 20_000
