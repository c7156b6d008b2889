"""TensorBoard and W&B: what they are handed, by stand-ins and by TensorBoard itself where it is installed."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dfssm.base import DfssmError
from dfssm.distill.log import Log, open_sinks

LINES = [
    {"step": 10, "tokens": 640, "seconds": 1.5, "loss": 3.0, "lr": 1e-3},
    {"step": 20, "tokens": 1280, "seconds": 3.0, "loss": 2.5, "lr": 5e-4},
    {"step": 20, "tokens": 1280, "seconds": 3.0, "held_out": 2.75, "perplexity": 15.6},
]


@pytest.fixture
def fake_tensorboard(monkeypatch):
    """The calls of SummaryWriter, in order."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            calls.append("flush")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    return calls


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in for wandb: `begun` are the arguments of each init, `lines` what was logged."""
    module = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.begun, module.lines, module.failure = [], [], None

    def init(**arguments):
        if module.failure:
            raise module.failure
        module.begun.append(arguments)
        return SimpleNamespace(log=lambda values, step: module.lines.append((step, values)))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(folder, sinks, lines=LINES):
    log = Log(folder, True, sinks)
    for line in lines:
        log.write(line)


def test_nothing_asked_for_is_nothing_imported(tmp_path, monkeypatch):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_sinks(tmp_path) == [] and not list(tmp_path.iterdir())


def test_tensorboard_gets_what_was_measured_line_by_line(tmp_path, fake_tensorboard):
    sinks = open_sinks(tmp_path, tensorboard=True)
    assert fake_tensorboard == []
    write(tmp_path, sinks)
    assert fake_tensorboard == [
        *(("open", str(tmp_path / "tensorboard"), 10), ("loss", 3.0, 10), ("lr", 1e-3, 10), "flush"),
        *(("loss", 2.5, 20), ("lr", 5e-4, 20), "flush"),
        *(("held_out", 2.75, 20), ("perplexity", 15.6, 20), "flush"),
    ]


def test_wandb_gets_every_line_and_a_resumed_run_goes_on_in_its_own(tmp_path, fake_wandb):
    folder = tmp_path / "student"
    folder.mkdir()
    write(folder, open_sinks(folder, wandb="one-bit"))
    assert fake_wandb.lines == [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in LINES]
    open_sinks(folder, wandb="one-bit")
    other = tmp_path / "other"
    open_sinks(other, wandb="one-bit")
    first, again, third = fake_wandb.begun
    assert first == again and first["id"] != third["id"]
    assert first | {"id": None} == {
        **{"project": "one-bit", "name": "student", "id": None, "resume": "allow", "dir": str(folder)},
    }


def test_they_get_numbers_only(tmp_path, fake_tensorboard, fake_wandb):
    line = LINES[2] | {"samples": [{"prompt": "a", "text": "b"}]}
    write(tmp_path, open_sinks(tmp_path, tensorboard=True, wandb="p"), [line])
    assert [call[0] for call in fake_tensorboard[1:-1]] == ["held_out", "perplexity"]
    assert "samples" not in fake_wandb.lines[0][1] and '"prompt": "a"' in (tmp_path / "log.jsonl").read_text()


def test_both(tmp_path, fake_tensorboard, fake_wandb):
    write(tmp_path, open_sinks(tmp_path, tensorboard=True, wandb="p"))
    assert len(fake_wandb.lines) == 3 and fake_tensorboard.count("flush") == 3


@pytest.mark.parametrize(
    "module, asked, message",
    [
        ("tensorboard", {"tensorboard": True}, "tensorboard is not installed: pip install tensorboard$"),
        ("wandb", {"wandb": "p"}, "wandb is not installed: pip install wandb$"),
    ],
)
def test_a_library_that_is_missing(tmp_path, monkeypatch, module, asked, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DfssmError, match=message):
        open_sinks(tmp_path, **asked)


def test_a_run_that_does_not_begin_is_said_in_one_line(tmp_path, fake_wandb):
    fake_wandb.failure = fake_wandb.Error("No API key configured.\nUse wandb login.")
    with pytest.raises(DfssmError, match=r"W&B project p: no run begins \(No API key configured.\); see") as found:
        open_sinks(tmp_path, wandb="p")
    assert "\n" not in str(found.value)


def test_the_event_files_of_tensorboard_itself(tmp_path):
    """Written, interrupted after step 20 and resumed at 10: step 20 is there once, with the later value."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    write(tmp_path, open_sinks(tmp_path, tensorboard=True))
    write(tmp_path, open_sinks(tmp_path, tensorboard=True), [LINES[1] | {"loss": 2.25}])
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(10, 3.0), (20, 2.25)]
    assert set(found.Tags()["scalars"]) == {"loss", "lr", "held_out", "perplexity"}


class TestLog:
    def test_is_cut_to_a_step_and_to_whole_lines(self, tmp_path):
        found = Log(tmp_path, writes=True)
        found.cut(3)  # nothing there
        for step in (1, 2, 3, 3, 4):
            found.write({"step": step, "loss": step / 2})
        with found.path.open("a") as file:
            file.write('{"step": 3, "lo')
        found.cut(3)
        lines = found.path.read_text()
        assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3, 3] and lines.endswith("\n")
        found.write({"step": 4, "loss": 7.0})
        assert found.path.read_text() == lines + '{"step": 4, "loss": 7.0}\n'
        assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]

    def test_a_damaged_one_is_cut_to_what_is_whole(self, tmp_path):
        log = Log(tmp_path, writes=True)
        log.path.write_bytes(b'{"step": 1}\n[2]\n{"loss": 1}\n{"step": "x"}\n\xff\0\n{"step": 2}\n{"step": 3}')
        log.cut(2)
        assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'

    def test_a_pipe_in_its_place_is_not_waited_for(self, tmp_path):
        log = Log(tmp_path, writes=True)
        os.mkfifo(log.path)
        with pytest.raises(DfssmError, match=r"log.jsonl: cannot be written \(No such device .*\); mend that, then"):
            log.write({"step": 1})
        reader = os.open(log.path, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(DfssmError, match=r"log.jsonl: cannot be written \(no regular file\); mend that, then"):
            log.write({"step": 1})
        os.close(reader)

    def test_only_one_rank_writes_it(self, tmp_path):
        Log(tmp_path, writes=True).write({"step": 1})
        other = Log(tmp_path, writes=False)
        other.write({"step": 2})
        other.cut(0)
        assert other.path.read_text() == '{"step": 1}\n'
