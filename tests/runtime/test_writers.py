"""tests/tools/writers.py for a moment."""

from pathlib import Path

from tools import writers

from dfssm.runtime import Engine


def test_threads_save_to_one_path(tiny_bundle, tmp_path):
    found = writers.saves(Engine.load(tiny_bundle, threads=1), tmp_path, threads=3, count=20)
    assert found["passed"] and found["saves"] == 60 and not found["failures"]


def test_a_torn_read_is_found(tiny_bundle, tmp_path, monkeypatch):
    engine = Engine.load(tiny_bundle, threads=1)
    whole = engine.new_state().to_bytes()
    monkeypatch.setattr("dfssm.runtime.State.save", lambda state, path: Path(path).write_bytes(whole[:-1]))
    found = writers.saves(engine, tmp_path, threads=2, count=5)
    assert not found["passed"] and (found["failures"] or found["torn"])
