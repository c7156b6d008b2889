"""Two ranks (gloo, FSDP2) take the steps of one at the same global batch, and go on with each other's checkpoints.

Not bit for bit: means over ranks are fp32 sums in another order, 2^-24 apart. A step of AdamW is the rate whatever the
size of a gradient, so a parameter whose gradients cancel may go the other way: by twice the rate, a step.
"""

import json

import pytest
import torch

from dfssm.base import DfssmError
from dfssm.distill.distributed import ranks
from dfssm.model.checkpoint import load_student_tensors

# What reduces over ranks: micro-batches, all losses, 11 held-out windows (8 and 3).
FULL = {"steps": 4, "micro_batch": 1, "held_out": 0.05}
FULL |= {"hidden": 0.5, "cross_entropy": 0.5, "anneal": "levels"}
# Parameters without a gradient for a while, 3 held-out windows: none of the second rank's.
PAPER = {"recipe": "paper", "micro_batch": 2, "held_out": 0.015}
# Parameters of no elements, and stacked ones.
PLANES = {"steps": 2, "micro_batch": 2, "rank": 0, "planes": 2}

# All commands in one group: a second store on the port of the first might be taken for it. Runs in folders named
# `grown` and `stopped` end like a crash after three steps, the first time; the first of them is of one rank alone.
_SETUP = """
import atexit, contextlib, os, shutil
from dfssm.distill import distributed, trainer

step, ended = trainer.Trainer._step, set()
def stop(self):
    name = self.folder.name
    if name in ("grown", "stopped") and self.step == 3 and name not in ended:
        ended.add(name)
        if name == "stopped" and self.ranks.first:
            shutil.copytree(self.folder, self.folder.with_name("shrunk"))
        sys.exit(0)
    return step(self)
trainer.Trainer._step = stop

if os.environ["RANK"] == "0":
    with contextlib.suppress(SystemExit):
        os.environ["WORLD_SIZE"] = "1"
        main(json.loads(sys.argv[1])[0][:-1])
    os.environ["WORLD_SIZE"] = "2"
ended.add("grown")
group = contextlib.ExitStack()
atexit.register(group.close)
those = group.enter_context(distributed.ranks("cpu"))
distributed.ranks = lambda device: contextlib.nullcontext(those)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory, start, command):
    """Folder of the runs of two ranks: full, stopped and resumed, paper, planes, grown; and shrunk, for one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [
        command(folder / "grown", resume=True, **FULL),
        command(folder / "full", **FULL),
        command(folder / "stopped", **FULL),
        command(folder / "stopped", resume=True, **FULL),
        command(folder / "paper", **PAPER),
        command(folder / "planes", **PLANES),
    ]
    for rank, process in enumerate(start(commands, world=2, setup=_SETUP)):
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert output.count("perplexity") == (5 if rank == 0 else 0)  # results are told once
    return folder


def read(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "result.json").read_text())


def assert_alike(one, two, rate):
    """Logs, results and students of two runs that differ in rounding only; `rate`: the sum of their learning rates."""
    (lines, result), (others, other) = read(one), read(two)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for a, b in zip(lines, others, strict=True):
        for name in a.keys() - {"seconds", "tok_s"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    for values in ("perplexity", "kl"):
        assert result[values].keys() == other[values].keys() and len(result[values]) >= 3
        for name, value in result[values].items():
            assert other[values][name] == pytest.approx(value, rel=1e-4), (values, name)

    config, tensors = load_student_tensors(one / "model.pt")
    other_config, others = load_student_tensors(two / "model.pt")
    assert config == other_config
    for name, tensor in tensors.items():
        off = (tensor.double() - others[name].double()).abs()
        if tensor.dtype == torch.float32:
            assert (off <= 2 * rate).all() and off.sum() <= 1e-2 * rate * off.numel(), name
        else:  # codes and bits: those that stand on a tie
            assert (off > 0).sum() <= 1e-2 * off.numel(), name


@pytest.mark.slow
class TestTwoRanks:
    def test_take_the_steps_of_one(self, two, distill, tmp_path):
        distill(tmp_path, **FULL)
        assert_alike(tmp_path, two / "full", rate=4 * 2e-3)

    def test_take_those_of_the_published_recipe_too(self, two, distill, tmp_path):
        distill(tmp_path, **PAPER)
        assert_alike(tmp_path, two / "paper", rate=4 * 1e-3)

    def test_take_those_of_two_planes_without_a_low_rank_too(self, two, distill, tmp_path):
        distill(tmp_path, **PLANES)
        assert_alike(tmp_path, two / "planes", rate=2 * 2e-3)

    def test_resume_as_if_they_had_never_stopped(self, two, same_log):
        assert same_log(two / "stopped") == same_log(two / "full")
        (_, stopped), (_, full) = read(two / "stopped"), read(two / "full")
        assert stopped["sha256"] == full["sha256"] and stopped["perplexity"] == full["perplexity"]

    def test_leave_checkpoints_that_one_goes_on_with(self, two, distill):
        shrunk = two / "shrunk"
        distill(shrunk, resume=True, **FULL)
        assert_alike(shrunk, two / "full", rate=4 * 2e-3)

    def test_go_on_with_those_of_one(self, two):
        lines, _ = read(two / "grown")
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert_alike(two / "full", two / "grown", rate=4 * 2e-3)


class TestRanks:
    def test_alone_without_a_group(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with ranks("cpu") as alone:
            assert (alone.rank, alone.world, alone.first) == (0, 1, True)
            value = torch.tensor([3.0])
            assert alone.mean(value) is value and value == 3
            assert alone.agree(True) is True and alone.agree(False) is False
            alone.barrier()
        assert not torch.distributed.is_initialized()

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_without_a_name_the_gpu_where_there_is_one(self, device, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        with ranks() as alone:
            assert alone.device == torch.device(device, 0 if device == "cuda" else None)

    @pytest.mark.parametrize("device", ["tpu", "meta", "cuda:0"])
    def test_a_device_that_is_not_known(self, device):
        with pytest.raises(DfssmError, match=f"^device '{device}' is not known; choose cpu or cuda$"), ranks(device):
            pass

    def test_a_gpu_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(DfssmError, match="^device cuda: torch sees no GPU here; leave out --device"), ranks("cuda"):
            pass
