"""The study of facts: its models are made once, each is studied on the same prompts, and what survives is told."""

import json

from click.testing import CliRunner
from examples_as_modules import load

from dfssm.analysis.prompts import read_prompts
from dfssm.base import paths
from dfssm.eval.fair.facts import Plan
from dfssm.eval.fair.train import Student, Teacher


def test_every_model_is_made_and_studied(tmp_path, monkeypatch):
    script = load("06_study.py")
    teacher = Teacher(d_model=32, n_layer=1, d_state=8, headdim=16, tokens=128, window=32, batch=2)
    student = Student(share=1.0, window=32, batch=2)
    monkeypatch.setattr(script, "PLAN", Plan(side=4, share=0.9, teacher=teacher, students=(student,)))
    asked = []

    def analyze(model, output, against, prompts, **options):
        asked.append((paths.find(model, "teacher", "student", "bundle")[0], against and against.name, prompts))
        found = {"teacher": None, "bundle": 0.5, "student": 1.0}[asked[-1][0]]
        return {"correlations": {"separation": {"model": found, "random weights": -0.25}}} if against else {}

    monkeypatch.setattr(script, "analyze", analyze)
    for _ in range(2):  # the second time all is there
        done = CliRunner().invoke(script.study, ["--folder", str(tmp_path)], catch_exceptions=False)
    prompts = tmp_path / "prompts.csv"
    once = [("teacher", None, prompts), ("student", "teacher", prompts), ("bundle", "teacher", prompts)]
    assert asked == 2 * once and len(read_prompts(prompts)) == 64
    assert "| separation | 1.00 (-0.25) | 0.50 (-0.25) |" in done.stdout
    manifest = json.loads((tmp_path / "bundle" / paths.MANIFEST).read_text())
    assert "taps.onnx" in manifest["files"] and manifest["verification"]["passed"]
