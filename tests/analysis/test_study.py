"""`dfssm analyze` of a teacher, a student and its bundle: the report, what is read again, and what is refused."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import tiny
import torch

from dfssm.analysis.material import MODEL, Material
from dfssm.analysis.prompts import Prompt, read_prompts, to_csv, tokenize
from dfssm.analysis.report import plain
from dfssm.analysis.run import STUDIES, analyze
from dfssm.analysis.states import collect
from dfssm.analysis.subject import open_subject, random_twin
from dfssm.base import DfssmError
from dfssm.cli.main import main
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import save_student
from dfssm.model.config import Mamba2Config
from dfssm.model.convert import convert
from dfssm.model.hf_import import save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.opset.tolerances import model_tolerance

NAMES = ["separation", "atlas", "heatmap", "centroids", "ranks", "contrast", "swaps", "dimension"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, a student of it, its bundle with taps, and prompts in three categories, two of one wording."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(1)
    config = Mamba2Config(vocab_size=288, d_model=32, n_layer=3, headdim=8, d_state=16, eos_token_id=264)
    teacher = Mamba2LM(config)
    save_teacher(teacher, folder / "teacher")
    for where in (folder, folder / "teacher"):
        tiny.write_tokenizer(where / "tokenizer.json")
    save_student(folder / "model.pt", *convert(teacher, rank=2))
    compile_model(Request(folder / "model.pt", "onnx", folder / "b", taps=True))
    rows = [
        Prompt(f"{word} {number}", answer, word, "one" if word != "c" else f"wording {number % 2}")
        for word in ("hello", "b", "c")
        for number, answer in enumerate("wxyz")
    ]
    (folder / "prompts.csv").write_text(to_csv(rows))
    return folder


@pytest.fixture(scope="module")
def report(place, tmp_path_factory):
    """The report of the teacher, and what `analyze` gave."""
    folder = tmp_path_factory.mktemp("report") / "out"
    return folder, analyze(place / "teacher", folder, prompts=place / "prompts.csv", draws=10)


@pytest.fixture
def command(capsys):
    """Runs dfssm analyze: (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["analyze", *map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    return run


def check(folder, result, names):
    assert list(result["studies"]) == names and result["count"] == 12 and result["layers"] == 3
    assert result["answers"] == {"one_token": 3, "different": 2}
    arrays = json.loads((folder / "arrays.json").read_text())
    assert list(arrays) == names and len(arrays["separation"]["category"]["model"]) == 4
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == len(names)
    assert not [loads for loads in ("<script", "src=", '"refresh"', "@import") if loads in page]
    for name, study in result["studies"].items():
        assert study["says"] and study["null"]
        for form, mark in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
            assert (folder / f"{name}.{form}").read_bytes().startswith(mark)
    for part in page.split("<figure>")[1:]:
        root = ElementTree.fromstring(part.split("</figure>")[0])
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)) and page.count(f'id="{ids[0]}"') == 1
        assert "width" not in root.keys() and root.get("viewBox")
    assert {*result["files"], "states"} == {path.name for path in folder.iterdir()}


def test_the_report_is_complete_in_itself(report):
    check(*report, NAMES)


def test_a_bundle_beside_its_teacher(place, tmp_path, command):
    options = ["--prompts", place / "prompts.csv", "-o", tmp_path / "out", "--draws", 10, "--json"]
    status, out, err = command(place / "b", "--against", place / "teacher", *options)
    assert (status, err) == (0, "")
    check(tmp_path / "out", json.loads(out), [*NAMES, "teacher"])


def test_the_same_study_is_the_same_bytes_and_reads_its_states_again(place, report, tmp_path):
    first, result = report
    shutil.copytree(first / "states", tmp_path / "states")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()}
    again = analyze(place / "teacher", tmp_path, prompts=place / "prompts.csv", draws=10)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()} == kept and len(kept) == 2
    assert {**result, "seconds": 0} == {**again, "seconds": 0}
    for name in result["files"]:
        assert (first / name).read_bytes() == (tmp_path / name).read_bytes(), name


def states(place, name, folder):
    subject = open_subject(place / name)
    prompts = tokenize(read_prompts(place / "prompts.csv"), subject.tokenizer)
    return collect(subject, prompts, folder, lambda done, total: None)


def test_a_bundle_has_the_states_of_its_student_at_every_layer(place, tmp_path):
    ours, theirs = states(place, "b", tmp_path), states(place, "model.pt", tmp_path)
    bound = model_tolerance(3, 32)
    assert ours.shape == (4, 12, 32) and not np.array_equal(ours[0], ours[1])
    for layer, pair in enumerate(zip(ours, theirs, strict=True)):
        assert bound.error(*pair) <= bound.relative, (layer, bound.reason)


def test_states_are_of_their_weights_and_tokens_and_damaged_ones_are_read_again(place, tmp_path):
    whole = states(place, "teacher", tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert np.array_equal(states(place, "teacher", tmp_path), whole) and file.read_bytes() == content
    subject = open_subject(place / "teacher")
    rows = read_prompts(place / "prompts.csv")
    other = tokenize([*rows[:-1], Prompt("other", "w", "c", "one")], subject.tokenizer)
    assert not np.array_equal(collect(subject, other, tmp_path, lambda *_: None)[:, -1], whole[:, -1])
    assert not np.array_equal(collect(random_twin(subject), other, tmp_path, lambda *_: None)[:, 0], whole[:, 0])
    assert len(list(tmp_path.iterdir())) == 3


def test_logits_of_states_are_those_of_the_model(place, tmp_path):
    for name in ("teacher", "model.pt", "b"):
        subject = open_subject(place / name)
        found = subject.model.hidden([[1, 2, 3], [4, 5]])
        assert subject.logits(found.states[-1]) == pytest.approx(found.logits, abs=1e-5)


def test_stages_are_at_the_published_depths():
    subjects = {MODEL: type("Subject", (), {"n_layer": 48})}
    assert Material(None, subjects, {}).stages == [2, 14, 32, 46]
    subjects[MODEL].n_layer = 2
    assert Material(None, subjects, {}).stages == [0, 1, 2]


def test_json_has_no_number_that_json_lacks():
    assert plain({"a": np.array([np.nan, 1.23456789]), "b": (np.int64(3), np.True_)}) == {
        "a": [None, 1.23457],
        "b": [3, True],
    }


def test_what_is_refused(place, tiny_bundle, tmp_path, command):
    def error(*arguments):
        status, out, err = command(*arguments, "-o", tmp_path / "out")
        assert (status, out) == (1, "") and err.count("\n") == 1 and not (tmp_path / "out").exists()
        return err

    assert "bundle shows no hidden states: compile it again with --taps" in error(tiny_bundle)
    assert "gone.csv does not exist" in error(place / "teacher", "--prompts", tmp_path / "gone.csv")
    torch.manual_seed(0)
    save_teacher(Mamba2LM(Mamba2Config(vocab_size=288, d_model=32, n_layer=1, headdim=8)), tmp_path / "other")
    tiny.write_tokenizer(tmp_path / "other" / "tokenizer.json")
    assert "has n_layer 3" in error(place / "teacher", "--against", tmp_path / "other")
    with pytest.raises(DfssmError, match="does not exist"):
        analyze(tmp_path / "gone", tmp_path / "out")
    assert len(STUDIES) == len(NAMES)
