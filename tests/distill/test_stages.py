"""The three stages of a run, each on its own."""

import dataclasses

import pytest
import torch

from dfssm.distill.data import open_tokens
from dfssm.distill.density import projections
from dfssm.distill.distributed import Ranks
from dfssm.distill.run import open, prepare, train
from dfssm.distill.topk import TopK

ALONE = Ranks(0, 1, torch.device("cpu"))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_opened_there_is_nothing_on_the_disk(job, tmp_path):
    opened = open(job(tmp_path / "out"), ALONE)
    assert not (tmp_path / "out").exists()
    assert opened.end == opened.teacher.config.eos_token_id and opened.stream is None
    assert opened.tokenizer.encode("hello world").ids


def test_prepared_there_are_tokens_and_a_student_that_ships(job, tmp_path):
    out = tmp_path / "out"
    prepared = prepare(open(job(out, held_out=0.1), ALONE))
    assert names(out) == {"tokens"}
    tokens = open_tokens(out / "tokens")
    assert prepared.measured.windows.shape == ((len(tokens.held_out) - 1) // 32, 32 + 1)
    assert list(prepared.measured.perplexity) == ["teacher", "data_free"]
    layers = projections(prepared.student)
    assert len(layers) == 4 and all(layer.ships for layer in layers)


def test_prepared_with_top_k_the_teacher_has_run_and_is_gone(job, tmp_path):
    prepared = prepare(open(job(tmp_path, top_k=5), ALONE))
    assert names(tmp_path) == {"tokens", "topk"}
    assert isinstance(prepared.teacher, TopK) and len(prepared.teacher) == 4 * 4
    assert prepared.measured.teacher is None


def test_one_after_the_other_they_are_the_run(job, distill, tmp_path):
    prepared = prepare(open(job(tmp_path / "stages"), ALONE))
    torch.randn(7)  # what others draw between the stages changes nothing
    result = train(prepared)
    assert result["sha256"] == distill(tmp_path / "run")["sha256"]


def test_what_was_drawn_before_changes_no_student(job, tmp_path):
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        student = prepare(open(job(tmp_path / str(seed), recipe="paper"), ALONE)).student
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_their_results_do_not_change(job, tmp_path):
    opened = open(job(tmp_path), ALONE)
    for given in (opened, prepare(opened)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            given.job = None
