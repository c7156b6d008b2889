"""`dfssm distill`: its options, its plan and its output. What it does is tested in tests/distill."""

import dataclasses
import json
import re

import pytest
import tiny
import torch

from dfssm.base import DfssmError
from dfssm.cli.main import main
from dfssm.distill.recipe import RECIPES, Recipe
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import save_teacher
from dfssm.model.teacher import Mamba2LM

END = tiny.CONFIG.eos_token_id
CHOICES = {f.name: f.metadata["choices"] for f in dataclasses.fields(Recipe) if "choices" in f.metadata}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    shape = Mamba2Config(END + 1, 32, 2, d_state=8, headdim=8, eos_token_id=END)
    save_teacher(Mamba2LM(shape), folder)
    tiny.write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("hello world or so. " * 200)
    return file


@pytest.fixture
def distill(invoke, teacher, text, tmp_path, monkeypatch):
    """distill(*more) -> click's result of a run of two steps into tmp_path / "out"."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()

    def run(*more):
        size = ("--tokens", 16, "--batch", 2, "--total-tokens", 64, "--held-out", 0.1, "--rank", 2, "--threads", 1)
        return invoke("distill", teacher, "--data", text, "-o", tmp_path / "out", *size, *more)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def help(invoke):
    """The help in one line."""
    return re.sub(r"\s+", " ", invoke("distill", "--help").stdout)


class TestHelp:
    def test_lists_every_ingredient_with_what_it_is(self, help):
        for field in dataclasses.fields(Recipe):
            flag = f"--{field.name.replace('_', '-')}"
            assert re.search(rf" {flag}\b", help), flag
            if field.type == "bool":
                assert f"{flag} / --no-{flag[2:]}" in help
            if field.name in CHOICES:
                assert f"{flag} [{'|'.join(CHOICES[field.name])}]" in help
            assert field.metadata["help"] in help

    @pytest.mark.parametrize(
        "flag, default",
        [
            ("--planes X", "[default: 1]"),
            ("--hard", "[default: sign; paper: levels]"),
            ("--temperature X", "[default: 1; paper: 2]"),
            ("--no-train-float", "[default: yes]"),
            ("--scaffold-share X", "[default: 1; paper: 0.381]"),
        ],
    )
    def test_lists_the_defaults_of_both_recipes(self, help, flag, default):
        assert help.split(f" {flag} ")[1].split(" --")[0].endswith(default)

    def test_lists_the_rest(self, help):
        for flag in "--data --output --recipe --total-tokens --resume --plan --json --recompute --micro-batch".split():
            assert re.search(rf" {flag}\b", help), flag
        assert "[binary|paper]" in help


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--recipe", "best"],
            *(["--" + name.replace("_", "-"), "x"] for name in CHOICES),
            ["--lr", "fast"],
            ["--rank", "1.5"],
            ["--total-tokens", 0],
            ["--tokens", 1],
            ["--batch", 0],
            ["--micro-batch", 0],
            ["--held-out", 0.6],
            ["--held-out", -0.1],
            ["--held-out-documents", -1],
            ["--seed", -1],
            ["--threads", 0],
            ["--log-every", 0],
            ["--save-every", 0],
            ["--evaluate-every", 0],
            ["--range-test", -1],
            ["--nonsense"],
        ],
        ids=lambda a: " ".join(map(str, a)),
    )
    def test_wrong_values(self, distill, arguments, tmp_path):
        result = distill(*arguments)
        assert result.exit_code == 2 and arguments[0] in result.stderr
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("missing", ["TEACHER", "--data", "--output"])
    def test_missing_ones(self, invoke, missing):
        given = {"TEACHER": ["t"], "--data": ["--data", "d"], "--output": ["-o", "o"]}
        result = invoke("distill", *(part for name, parts in given.items() if name != missing for part in parts))
        assert result.exit_code == 2 and missing in result.stderr

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--device", "tpu"], "device 'tpu' is not known; choose cpu or cuda"),
            (["--batch", 4, "--micro-batch", 3], "batch is 4 windows; give a multiple of ranks x micro-batch = 1 x 3"),
            (["--resume"], "has no checkpoint to resume from; leave out --resume to begin"),
        ],
        ids=lambda a: " ".join(map(str, a)) if isinstance(a, list) else "",
    )
    def test_values_that_do_not_go(self, distill, arguments, message, tmp_path):
        with pytest.raises(DfssmError, match=re.escape(message)):
            distill(*arguments)
        assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))

    def test_an_error_is_one_line_and_1(self, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with pytest.raises(SystemExit) as end:
            main(["distill", str(tmp_path / "none"), "--data", "d", "-o", str(tmp_path / "out"), "--device", "cpu"])
        output, errors = capsys.readouterr()
        assert end.value.code == 1 and not output
        assert re.fullmatch(r"dfssm: error: .*none does not exist: give a checkpoint folder .*\n", errors)


class TestPlan:
    def test_prints_memory_and_time_and_does_nothing(self, distill, tmp_path):
        result = distill("--plan")
        assert result.exit_code == 0 and not (tmp_path / "out").exists()
        assert "AdamW" in result.stdout and " GB" in result.stdout and " h" in result.stdout

    def test_json(self, distill):
        result = distill("--plan", "--json")
        assert result.stdout.count("\n") == 1
        found = json.loads(result.stdout)
        assert found["total"] == pytest.approx(sum(found["memory"].values())) and found["total"] > 0

    def test_is_of_these_options(self, distill):
        def total(*options):
            return json.loads(distill("--plan", "--json", *options).stdout)["total"]

        usual = total("--batch", 8)
        assert total("--batch", 8, "--micro-batch", 1) < usual < total("--batch", 32)
        assert total("--batch", 8, "--recompute") < usual < total("--batch", 8, "--planes", 2)
        assert total("--batch", 8, "--devices", 2) < usual < total("--batch", 8, "--tokens", 64)
        assert total("--batch", 8, "--hidden", 0.1) > usual
        assert total("--batch", 8, "--recipe", "paper") > usual

    def test_without_a_teacher(self, invoke, tmp_path):
        with pytest.raises(DfssmError, match="none"):
            invoke("distill", tmp_path / "none", "--data", "d", "-o", tmp_path / "out", "--plan")


class TestRangeTest:
    def test_suggests_a_rate(self, distill, tmp_path):
        result = distill("--range-test", 4)
        assert result.exit_code == 0
        found = json.loads((tmp_path / "out" / "rates.json").read_text())
        assert result.stdout == (
            f"{tmp_path / 'out'}: least loss at a rate of {found['least']:.2g}, after {len(found['rates'])} steps; "
            f"suggested: --lr {found['suggested']:g}\n"
        )

    def test_json(self, distill, tmp_path):
        result = distill("--range-test", 2, "--json")
        assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "rates.json").read_text())


class TestRun:
    def test_says_what_came_of_it(self, distill, tmp_path):
        result = distill()
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert lines[0].startswith(f"{tmp_path / 'out'}: 64 tokens in ")
        assert lines[1].split() == ["perplexity", "/", "teacher's", "KL", "from", "teacher"]
        rows = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines[2:]}
        assert list(rows) == ["teacher", "data_free", "student", "float_low_rank", "float_embedding"]
        assert rows["teacher"][1:] == [1]
        kl = json.loads((tmp_path / "out" / "result.json").read_text())["kl"]
        for name, (value, ratio, *divergence) in rows.items():
            assert ratio == pytest.approx(value / rows["teacher"][0], abs=2e-3)
            assert name == "teacher" or divergence == [pytest.approx(kl[name], abs=1e-4)]
        assert "trainable parameters" in result.stderr

    def test_json(self, distill, tmp_path):
        result = distill("--json")
        assert result.exit_code == 0 and result.stdout.count("\n") == 1
        found = json.loads(result.stdout)
        assert found.pop("output") == str(tmp_path / "out")
        assert found == json.loads((tmp_path / "out" / "result.json").read_text())
        assert (tmp_path / "out" / found["model"]).is_file()

    def test_without_held_out_text(self, distill):
        result = distill("--held-out", 0)
        assert result.exit_code == 0 and "no held-out text" in result.stdout

    def test_tokens_are_those_of_whole_steps_at_least_as_many_as_asked_for(self, distill):
        assert json.loads(distill("--total-tokens", 65, "--json").stdout)["tokens"] == 96

    def test_options_change_the_recipe_that_is_named(self, distill):
        options = "--recipe paper --cross-entropy 0.5 --train-float --activations int8 --warmup 0 --planes 2"
        found = json.loads(distill(*options.split(), "--json").stdout)["recipe"]
        changed = {"cross_entropy": 0.5, "train_float": True, "activations": "int8", "warmup": 0.0, "planes": 2}
        assert found == dataclasses.asdict(dataclasses.replace(RECIPES["paper"], rank=2, **changed))

    def test_a_flag_that_is_off(self, distill):
        assert json.loads(distill("--no-train-float", "--json").stdout)["recipe"]["train_float"] is False

    def test_the_rest_reaches_the_run(self, distill):
        options = "--seed 3 --micro-batch 1 --log-every 1 --save-every 1 --evaluate-every 2 --keep 1"
        found = json.loads(distill(*options.split(), "--json").stdout)["schedule"]
        expected = {"steps": 2, "batch": 2, "micro_batch": 1, "tokens": 16, "seed": 3}
        assert found == expected | {"log_every": 1, "save_every": 1, "evaluate_every": 2, "keep": 1, "seconds": None}

    def test_best_is_named_by_its_step_and_samples_are_logged(self, distill, tmp_path):
        found = json.loads(distill("--best", "--sample", "hello", "--evaluate-every", 1, "--json").stdout)
        lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
        measured = {line["step"]: line["held_out_kl"] for line in lines if "held_out_kl" in line}
        assert found["step"] == min(measured, key=measured.get) and len(measured) == 2
        assert found["kl"]["student"] == pytest.approx(min(measured.values()), rel=1e-5)
        assert sum("samples" in line for line in lines) == 2

    def test_best_needs_text_to_tell_it_by(self, distill):
        with pytest.raises(DfssmError, match="^--best: no text is held out to tell it by; give --held-out, or leave"):
            distill("--best", "--held-out", 0)

    def test_resume(self, distill):
        first = json.loads(distill("--json").stdout)
        with pytest.raises(DfssmError, match="holds a run already; go on with --resume"):
            distill()
        again = json.loads(distill("--resume", "--json").stdout)
        assert again["sha256"] == first["sha256"] and again["perplexity"] == first["perplexity"]
