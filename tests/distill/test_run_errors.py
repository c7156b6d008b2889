"""What cannot work is said in one line before any training, and leaves nothing behind."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfssm.base import DfssmError
from dfssm.base.files import alone
from dfssm.model.hf_import import load_teacher, save_teacher

TOKENS = 32


class TestWhatCannotWork:
    """One line, before any training, and nothing is left behind."""

    @pytest.fixture
    def refuse(self, distill, tmp_path, monkeypatch, tree):
        def refuse(message, **options):
            def train(self):
                raise AssertionError("it trains")

            monkeypatch.setattr("dfssm.distill.trainer.Trainer.train", train)
            output = tmp_path / "out"
            before = tree(output), sorted(output.rglob("*")), output.exists()
            with pytest.raises(DfssmError, match=message) as error:
                distill(output, **options)
            assert "\n" not in str(error.value)
            assert (tree(output), sorted(output.rglob("*")), output.exists()) == before

        return refuse

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_teacher_that_is_not_finite(self, refuse, teacher, tmp_path, value):
        shutil.copytree(teacher, tmp_path / "bad")
        tensors = load_file(teacher / "model.safetensors")
        tensors["backbone.layers.1.mixer.conv1d.bias"][3] = value
        save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
        refuse(r"bad.*: tensor .*layers.1.*conv.*bias.* holds NaN or infinity; ", teacher=tmp_path / "bad")

    def test_no_teacher(self, refuse, tmp_path):
        refuse("none does not exist: give a checkpoint folder", teacher=tmp_path / "none")

    def test_a_folder_that_another_run_writes_into(self, refuse, tmp_path):
        """Both wrote the same checkpoints and the same log."""
        with alone(tmp_path / "out"):
            refuse("out: another process writes into it now; wait for it, or choose another$")

    @pytest.mark.parametrize("content", ["", " \n"])
    def test_no_text(self, refuse, write, content):
        refuse("there is no text to train on; give --data more", data=[str(write(content))])

    def test_no_file(self, refuse, tmp_path):
        refuse("none.txt does not exist: give --data text", data=[str(tmp_path / "none.txt")])

    def test_a_text_of_less_than_two_windows(self, refuse):
        needs = "two windows of 10,000 need 20,000; give more --data or fewer --tokens"
        refuse(f"the training text has [0-9],[0-9]+ tokens, {needs}", tokens=10000)

    def test_one_token_too_few(self, refuse, distill, write, tmp_path):
        """The byte-level text of 62 letters is 62 tokens and the end: short of two windows of 32 by one."""
        refuse("has 63 tokens, two windows of 32 need 64;", data=[str(write("z" * 62))], held_out=0.0)

    def test_a_tokenizer_of_another_vocabulary(self, refuse, make_teacher):
        small = make_teacher(vocab_size=250, eos_token_id=0)
        named = r"token '<\|end\|>' has id 264, the model knows ids 0 to 249; give the teacher's own with --tokenizer"
        refuse(named, teacher=small)

    def test_a_tokenizer_without_an_end(self, refuse, make_teacher):
        refuse(
            r"tokenizer.json: has no <\|endoftext\|> among the teacher's 265 tokens$",
            teacher=make_teacher(eos_token_id=None),
        )

    @pytest.mark.parametrize("content", [None, "", "{}", "[1, 2"])
    def test_a_tokenizer_that_is_none(self, refuse, tmp_path, content):
        file = tmp_path / "t.json"
        if content is not None:
            file.write_text(content)
        problem = " does not exist:" if content is None else r": is no tokenizer.json \(.+\);"
        refuse(rf"t.json{problem} give the teacher's own with --tokenizer$", tokenizer=file)

    def test_a_folder_that_holds_a_run(self, refuse, tmp_path):
        (tmp_path / "out" / "checkpoints" / "step-000100").mkdir(parents=True)
        (tmp_path / "out" / "log.jsonl").write_text("{}\n")
        refuse(r"out: holds a run already; go on with --resume, or choose another folder$")

    def test_nothing_to_resume(self, refuse):
        refuse(r"out: has no checkpoint to resume from; leave out --resume to begin$", resume=True)

    def test_an_output_that_is_a_file(self, refuse, tmp_path):
        (tmp_path / "out").write_text("")
        refuse("cannot write .*out")

    def test_a_stream_with_other_data(self, refuse, corpus):
        refuse("^hf:x: a stream is the only --data of a run; leave out the others$", data=[str(corpus), "hf:x"])

    def test_a_stream_without_its_name(self, refuse):
        refuse("^hf:: is no name of a data set", data=["hf:"])

    def test_a_budget_without_calibration(self, refuse):
        refuse("budget is 0.5 MB, which needs --init calibrated, not svd", budget=0.5)

    def test_micro_batches_that_do_not_come_out_even(self, refuse):
        refuse("^batch is 4 windows; give a multiple of ranks x micro-batch = 1 x 3$", micro_batch=3)

    @pytest.mark.parametrize("name, value", [("rank", -1), ("planes", 0)])
    def test_a_student_that_there_is_not(self, refuse, name, value):
        refuse(f"{name} is {value}; give a number from", **{name: value})

    def test_what_a_killed_first_save_left_is_no_run(self, distill, tmp_path):
        (tmp_path / "checkpoints" / ".step-000002.tmp").mkdir(parents=True)
        with pytest.raises(DfssmError, match="leave out --resume to begin"):
            distill(tmp_path, resume=True)
        assert distill(tmp_path, steps=2)["tokens"] == 2 * 4 * TOKENS

    def test_a_resume_with_another_text(self, distill, tmp_path, write, tree):
        """The run is as it was: its own text is tokenised again."""
        first = distill(tmp_path / "out")
        before = {name: content for name, content in tree(tmp_path / "out").items() if "tokens" not in name}
        with pytest.raises(DfssmError, match="out: was begun with another data; resume with the same, or choose"):
            distill(tmp_path / "out", resume=True, data=[str(write("hello world " * 500))])
        assert before.items() <= tree(tmp_path / "out").items()
        assert distill(tmp_path / "out", resume=True)["sha256"] == first["sha256"]

    def test_a_resume_with_the_text_elsewhere_goes_on(self, distill, tmp_path, corpus):
        first = distill(tmp_path / "out")
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
        shutil.copy(corpus, tmp_path / "moved.txt")
        assert distill(tmp_path / "out", resume=True, data=[str(tmp_path / "moved.txt")])["sha256"] == first["sha256"]

    def test_a_resume_with_another_teacher(self, distill, tmp_path, teacher):
        distill(tmp_path / "out", steps=2)
        other = load_teacher(teacher)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        save_teacher(other, tmp_path / "other")
        shutil.copy(teacher / "tokenizer.json", tmp_path / "other")
        with pytest.raises(DfssmError, match="out: was begun with another teacher; resume with the same, or choose"):
            distill(tmp_path / "out", steps=2, resume=True, teacher=tmp_path / "other")


def test_compiling_without_a_compiler_is_refused_before_anything_is_written(distill, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DfssmError, match="^--compile: there is no C.. compiler no-such-compiler; install it, set CXX"):
        distill(tmp_path / "out", compiled=True)
    assert not (tmp_path / "out").exists()
