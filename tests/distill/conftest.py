import dataclasses
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from bigrams import IDS, TOKENS, Bigrams, rates

from dfssm.distill import run
from dfssm.distill.data import Windows
from dfssm.distill.distributed import Ranks
from dfssm.distill.recipe import RECIPES, Recipe
from dfssm.distill.run import Job
from dfssm.distill.trainer import Schedule, Trainer
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import save_teacher
from dfssm.model.teacher import Mamba2LM

END = tiny.CONFIG.eos_token_id
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory):
    """make_teacher(...) -> the folder of a random teacher with its tokenizer; options are those of Mamba2Config."""

    def make(**options):
        folder = tmp_path_factory.mktemp("teacher")
        torch.manual_seed(0)
        shape = {"vocab_size": END + 1, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 8, "eos_token_id": END}
        model = Mamba2LM(Mamba2Config(**shape | options))
        with torch.no_grad():
            model.embedding.weight.mul_(20)  # logits far from uniform
        save_teacher(model, folder)
        tiny.write_tokenizer(folder / "tokenizer.json")
        return folder

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher):
    """Not to be written to."""
    return make_teacher()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of about 6000 tokens."""
    words = np.random.default_rng(0).choice("hello world or he will not say the word".split(), 2000)
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture
def one_thread(monkeypatch):
    """One thread, and no bf16 where it is faster: both change the order or the size of roundings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("dfssm.distill.run.fast_bf16", lambda device: False)
    yield
    torch.set_num_threads(threads)


SHORT = {"steps": 4, "batch": 4, "micro_batch": 4, "tokens": 32, "log_every": 1, "save_every": 2, "evaluate_every": 2}


@pytest.fixture
def job(teacher, corpus, one_thread):
    """job(output, recipe="binary", ...) -> the Job of a short run; options are those of Job, Schedule and Recipe.

    `data` and `teacher` replace the usual ones, `recipe` is a name.
    """

    def job(output, recipe="binary", **options):
        def those(kind):
            return {f.name: options.pop(f.name) for f in dataclasses.fields(kind) if f.name in options}

        schedule = Schedule(**SHORT | those(Schedule))
        recipe = dataclasses.replace(RECIPES[recipe], **{"rank": 4} | those(Recipe))
        inputs = {"teacher": teacher, "data": [str(corpus)]} | options
        return Job(output=output, recipe=recipe, schedule=schedule, **inputs)

    return job


@pytest.fixture
def distill(job):
    """distill(output, resume=False, ...) -> the result of a short run; options are those of `job`."""

    def distill(output, resume=False, say=lambda line: None, **options):
        return run.distill(job(output, **options), ALONE, resume, say)

    return distill


@pytest.fixture(scope="session")
def command(teacher, corpus):
    """command(output, ...) -> the arguments of `dfssm` for what `distill(output, ...)` does, all of values."""

    def command(output, resume=False, **options):
        options = SHORT | {"rank": 4, "threads": 1} | options
        options["total-tokens"] = options.pop("steps") * options["batch"] * options["tokens"]
        given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        return ["distill", teacher, "--data", corpus, "-o", output, *given, *(["--resume"] if resume else [])]

    return command


@pytest.fixture(scope="session")
def tree():
    """tree(folder) -> the files below it, with what they hold."""

    def tree(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return tree


@pytest.fixture(scope="session")
def same_log():
    """same_log(folder) -> the lines of log.jsonl but for the values that are times."""

    def lines(folder):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in ("seconds", "tok_s")} for line in lines]

    return lines


_WORKER = """
import json, sys
import dfssm.distill.run as run
from dfssm.cli.main import main
run.fast_bf16 = lambda device: False
{setup}
codes = []
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        codes.append(end.code)
    except BaseException:
        import traceback
        traceback.print_exc()
        codes.append(-1)
sys.exit(max(map(abs, codes)))
"""


@pytest.fixture(scope="session")
def start():
    """start(commands, world=1, setup="") -> as many processes, which run `dfssm COMMAND` for each in turn.

    `setup` is Python that they run before. One thread each.
    """
    processes = []

    def start(commands, world=1, setup=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [sys.executable, "-c", _WORKER.format(setup=setup), json.dumps([[*map(str, c)] for c in commands])]
        shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = []
        for rank in range(world):
            own = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(arguments, env=os.environ | shared | own, **options))
        processes.extend(started)
        return started

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def trainer(tmp_path):
    """trainer(...) -> a Trainer of Bigrams; options are those of Schedule and Trainer."""

    def trainer(folder="run", **options):
        schedule = {"steps": 12, "batch": 8, "micro_batch": 8, "tokens": TOKENS, "log_every": 3, "save_every": 4}
        schedule |= {name: options.pop(name) for name in Schedule.__dataclass_fields__ if name in options}
        model = options.pop("model", None) or Bigrams()
        groups = {"matrix": [model.head.weight], "bias": [model.head.bias]}
        options = {"source": Windows(IDS, TOKENS, seed=0), "rates": rates} | options
        return Trainer(
            model=model, groups=groups, schedule=Schedule(**schedule), ranks=ALONE, folder=tmp_path / folder, **options
        )

    (tmp_path / "run").mkdir()
    return trainer
