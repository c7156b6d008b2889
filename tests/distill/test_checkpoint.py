"""Checkpoints are whole or not there: full disks, damaged files, crashes in mid-save."""

import copy
import os
import resource

import pytest
import torch
from torch import nn

from dfssm.base import DfssmError
from dfssm.distill import checkpoint
from dfssm.distill.checkpoint import Checkpoints
from dfssm.distill.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


class Pair(nn.Module):
    """A trained part beside a frozen one."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.student, self.teacher = nn.Linear(40, 30), nn.Linear(5000, 30).requires_grad_(False)


def trained(seed=0, steps=3):
    model = Pair(seed)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.student(torch.randn(4, 40)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def values(model, optimizer):
    moments = [v for state in optimizer.state_dict()["state"].values() for v in state.values()]
    return [*model.state_dict().values(), *moments]


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", ALONE)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_saved_is_loaded_exactly_and_trains_on_alike(checkpoints):
    model, optimizer = trained()
    checkpoints.save(7, model, optimizer, '{"é": 1}')
    before = copy.deepcopy(values(model, optimizer))
    other, others = trained(seed=1, steps=1)
    other.teacher.load_state_dict(model.teacher.state_dict())  # it is not the checkpoint's to hold
    assert checkpoints.own(7) == '{"é": 1}'
    checkpoints.load(7, other, others)
    assert all(map(torch.equal, before, values(other, others)))
    for m, o in ((model, optimizer), (other, others)):
        o.zero_grad()
        m.student(torch.ones(1, 40)).sum().backward()
        o.step()
    assert torch.equal(model.student.weight, other.student.weight)


def test_the_frozen_part_is_not_kept(checkpoints):
    model, optimizer = trained()
    checkpoints.save(1, model, optimizer, "")
    size = sum(path.stat().st_size for path in checkpoints.folder.rglob("*") if path.is_file())
    assert size < model.teacher.weight.nbytes / 4
    other, others = trained(seed=1)
    frozen = other.teacher.weight.clone()
    checkpoints.load(1, other, others)
    assert torch.equal(other.teacher.weight, frozen)


def test_the_last_few_are_kept(checkpoints):
    model, optimizer = trained()
    assert checkpoints.steps() == []
    for step in (5, 10, 1000000, 999999):
        checkpoints.save(step, model, optimizer, "")
    assert checkpoints.steps() == [999999, 1000000]
    names = sorted(entry.name for entry in checkpoints.folder.iterdir())
    assert names == ["step-1000000", "step-999999"]
    more = Checkpoints(checkpoints.folder, ALONE, keep=3)
    more.save(1000001, model, optimizer, "")
    assert more.steps() == [999999, 1000000, 1000001]


def test_other_things_in_the_folder_are_no_checkpoints(checkpoints):
    for name in (".step-000004.tmp", "step-x", "step-12.old", "notes"):
        (checkpoints.folder / name).mkdir(parents=True)
    assert checkpoints.steps() == []


def test_the_same_step_again_replaces_it(checkpoints):
    model, optimizer = trained()
    checkpoints.save(3, model, optimizer, "a")
    checkpoints.save(3, model, optimizer, "b")
    assert checkpoints.steps() == [3] and checkpoints.own(3) == "b"


class TestAFullDisk:
    @pytest.fixture
    def before(self, checkpoints):
        """What lies there of an earlier checkpoint."""
        checkpoints.save(1, *trained(), "first")
        return contents(checkpoints.folder)

    def refuse(self, checkpoints, reason):
        with pytest.raises(
            DfssmError,
            match=rf"step-000002: cannot be written \(.*{reason}.*\); make room and go on with --resume$",
        ) as error:
            checkpoints.save(2, *trained(seed=1), "second")
        assert "\n" not in str(error.value)

    def check(self, checkpoints, before):
        assert contents(checkpoints.folder) == before and checkpoints.steps() == [1]
        model, optimizer = trained(seed=2)
        checkpoints.load(1, model, optimizer)
        assert torch.equal(model.student.weight, trained()[0].student.weight)
        checkpoints.save(2, model, optimizer, "")  # with room again
        assert checkpoints.steps() == [1, 2]

    def test_in_the_middle_of_a_file(self, checkpoints, before):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            self.refuse(checkpoints, "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.check(checkpoints, before)

    def test_after_half_of_it(self, checkpoints, before, monkeypatch):
        def save(state, checkpoint_id):
            checkpoint_id.mkdir()
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.state_dict_saver, "save", save)
            self.refuse(checkpoints, "No space left on device")
        self.check(checkpoints, before)

    def test_when_it_is_flushed(self, checkpoints, before, monkeypatch):
        def fsync(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            self.refuse(checkpoints, "No space left on device")
        self.check(checkpoints, before)


@pytest.mark.parametrize("where", ["written", "flushed"])
def test_a_crash_in_mid_save_leaves_the_one_before(checkpoints, monkeypatch, where):
    """As SIGKILL does: nothing is tidied up. The next save does that."""
    checkpoints.save(1, *trained(), "first")
    dcp_save = checkpoint.state_dict_saver.save

    def crash(*arguments, **options):
        if where == "flushed":
            dcp_save(*arguments, **options)
        else:
            (checkpoints.folder / ".step-000002.tmp" / "junk").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.state_dict_saver, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, *trained(), "second")
    assert (checkpoints.folder / ".step-000002.tmp").exists()
    assert checkpoints.steps() == [1] and checkpoints.own(1) == "first"
    checkpoints.save(2, *trained(), "second")
    assert sorted(e.name for e in checkpoints.folder.iterdir()) == ["step-000001", "step-000002"]
    assert checkpoints.own(2) == "second"


class TestDamage:
    @pytest.fixture
    def saved(self, checkpoints):
        checkpoints.save(4, *trained(), "mine")
        return checkpoints

    def refuse(self, checkpoints, act):
        with pytest.raises(
            DfssmError, match=r"step-000004: cannot be loaded \(.+\); remove it to use the one before"
        ) as error:
            act()
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
    def test_of_a_file(self, saved, name, damage):
        file = saved.folder / "step-000004" / name
        whole = file.read_bytes()
        file.unlink()
        if damage != "missing":
            content = {"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": bytes(range(256)) * 9}
            file.write_bytes(content[damage])
        model, optimizer = trained(seed=1)
        before = copy.deepcopy(model.state_dict())
        self.refuse(saved, lambda: saved.load(4, model, optimizer))
        if name == ".metadata":
            self.refuse(saved, lambda: saved.own(4))
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_of_the_bytes_within(self, saved):
        """A flipped block in the middle, as a bad disk leaves it: never loaded as if it were right."""
        file = saved.folder / "step-000004" / "__0_0.distcp"
        whole = bytearray(file.read_bytes())
        middle = whole.index(b"PK\x03\x04") + 8  # in the header of the first tensor's archive
        whole[middle : middle + 64] = bytes(64)
        file.write_bytes(whole)
        self.refuse(saved, lambda: saved.load(4, *trained(seed=1)))

    def test_another_models(self, saved):
        model = Pair()
        model.student = nn.Linear(40, 31)
        optimizer = torch.optim.AdamW(model.student.parameters())
        self.refuse(saved, lambda: saved.load(4, model, optimizer))
