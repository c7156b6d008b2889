"""Opening what is to be measured, and what every kind of it can do."""

import subprocess
import sys

import numpy as np
import pytest
import tiny

from dfssm.base import DfssmError
from dfssm.eval.scorer import locate, log_probs, open_scorer, score

IDS = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (3, 150))


def test_kinds_are_told_by_their_files(teacher, student, bundle):
    beside = [path.with_name("tokenizer.json") for path in (teacher / "config.json", student)]
    assert locate(teacher) == locate(teacher / "model.safetensors") == ("teacher", teacher, beside[0])
    assert locate(student) == ("student", student, beside[1]) and locate(bundle) == ("bundle", bundle, None)
    assert locate(bundle, beside[1]) == ("bundle", bundle, beside[1])
    assert open_scorer(teacher / "model.safetensors").kind == "teacher"


def test_log_probs_are_exact():
    logits = np.random.default_rng(0).normal(0, 30, (2, 5, 1000)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 1000, (2, 5))
    targets[0, 0] = logits[0, 0].argmax()
    found, likeliest = log_probs(logits, targets)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-6)
    assert likeliest[0, 0] and likeliest.sum() == (logits.argmax(-1) == targets).sum()


def test_reading_in_pieces_is_reading_at_once(scorer, assert_close):
    whole, _ = scorer.logits(IDS, scorer.new_state(3))
    last, state = scorer.read(IDS[:, :70], scorer.new_state(3))
    rest, _ = scorer.logits(IDS[:, 70:], state)
    assert_close(scorer, last, whole[:, 69], 1e-3)
    assert_close(scorer, rest, whole[:, 70:], 1e-3)
    found, _ = score(scorer, IDS[:, :-1], IDS[:, 1:], scorer.new_state(3))
    assert_close(scorer, found, log_probs(whole[:, :-1], IDS[:, 1:])[0], 1e-3)


def test_selected_rows_are_copies(scorer, assert_close):
    _, state = scorer.read(IDS[:, :9], scorer.new_state(3))
    again = scorer.select(state, [0, 1, 2])
    chosen = scorer.select(state, (2, 0, 2))
    scorer.logits(IDS[:, 30:40], state)  # what happens to the first must not show in the others
    found, _ = scorer.logits(IDS[[2, 0, 2], 9:20], chosen)
    expected, _ = scorer.logits(IDS[:, 9:20], again)
    assert_close(scorer, found, expected[[2, 0, 2]], 1e-3)


def test_a_bundle_is_measured_without_torch(bundle, tmp_path):
    (tmp_path / "a.txt").write_text("hello world, hello")
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'lm_eval'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from dfssm.cli.main import main\n"
        "main(sys.argv[1:])"
    )

    def run(model):
        command = [sys.executable, "-c", code, "eval", "perplexity", model, "--data", tmp_path / "a.txt"]
        return subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=60)

    done = run(bundle)
    assert done.returncode == 0 and "(bundle): perplexity" in done.stdout, done.stderr
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "tokenizer.json").touch()
    done = run(tmp_path / "model.pt")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "torch is not installed: pip install 'dfssm[compile]'" in done.stderr


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(DfssmError, match="nothing does not exist: give a bundle"):
            open_scorer(tmp_path / "nothing")

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(DfssmError, match="it has no manifest.json and no config.json; give a bundle"):
            open_scorer(tmp_path)

    def test_no_tokenizer(self, student, tmp_path):
        (tmp_path / "model.pt").write_bytes(student.read_bytes())
        with pytest.raises(
            DfssmError, match="tokenizer.json does not exist: give the tokenizer.json of the model with --tokenizer"
        ):
            open_scorer(tmp_path / "model.pt")

    def test_a_tokenizer_that_is_none(self, student, bundle, tmp_path):
        (tmp_path / "t.json").write_text("{}")
        for model in (student, bundle):
            with pytest.raises(DfssmError, match="t.json: is no tokenizer.json"):
                open_scorer(model, tmp_path / "t.json")

    def test_devices(self, student, bundle):
        with pytest.raises(DfssmError, match="leave out the device cuda"):
            open_scorer(bundle, device="cuda")
        with pytest.raises(DfssmError, match="device 'toaster' cannot be used"):
            open_scorer(student, device="toaster")

    def test_no_end_of_text(self, tmp_path, student):
        from dataclasses import replace

        from dfssm.model.checkpoint import load_student_tensors, save_student

        config, tensors = load_student_tensors(student)
        save_student(tmp_path / "model.pt", replace(config, eos_token_id=None), tensors)
        with pytest.raises(DfssmError, match="neither the config has an eos_token_id"):
            open_scorer(tmp_path / "model.pt", student.with_name("tokenizer.json"))
