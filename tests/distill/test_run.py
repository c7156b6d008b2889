"""A whole distillation: what it writes is what it measured, recipes run, what cannot work is said before it starts."""

import dataclasses
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import tiny
import torch

from dfssm.base import DfssmError
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.distill.data import Windows, open_tokens
from dfssm.distill.density import DensityLinear
from dfssm.distill.distributed import Ranks
from dfssm.distill.held_out import cut_windows, figures
from dfssm.distill.recipe import RECIPES
from dfssm.distill.student import CALIBRATION, activation_sizes, train_as
from dfssm.eval.perplexity import measure
from dfssm.eval.scorer import open_scorer
from dfssm.eval.text import Text
from dfssm.model.checkpoint import load_student_tensors, save_student
from dfssm.model.config import DFSSMConfig
from dfssm.model.convert import convert
from dfssm.model.hf_import import load_teacher
from dfssm.model.ledger import model_bytes
from dfssm.model.quant import dequantized
from dfssm.model.student import DFSSMLM, load_student

END = tiny.CONFIG.eos_token_id
TOKENS = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Where the run of TestWhatARunLeaves lies, and what it gave."""
    return {"folder": tmp_path_factory.mktemp("run") / "out"}


class TestWhatARunLeaves:
    """One run of 24 steps for all of these."""

    @pytest.fixture
    def done(self, run, distill):
        if "result" not in run:
            run["said"] = []
            run["result"] = distill(
                run["folder"], steps=24, lr=5e-3, save_every=10, evaluate_every=8, held_out=0.1, say=run["said"].append
            )
        return run

    @pytest.fixture
    def held_out(self, done):
        """The held-out text in whole windows, as it is measured in training."""
        ids = open_tokens(done["folder"] / "tokens").held_out.astype(np.int64)
        ids = ids[: (len(ids) - 1) // TOKENS * TOKENS + 1]
        return Text(ids, np.arange(len(ids)))

    def test_files(self, done):
        names = {path.name for path in done["folder"].iterdir()}
        assert names == {
            "model.pt",
            "result.json",
            "log.jsonl",
            "report.html",
            "checkpoints",
            "tokens",
            "tokenizer.json",
        }
        assert {p.name for p in (done["folder"] / "checkpoints").iterdir()} == {"step-000020", "step-000024"}

    def test_the_result(self, done):
        result = json.loads((done["folder"] / "result.json").read_text())
        assert result == json.loads(json.dumps(done["result"]))
        assert result["tokens"] == 24 * 4 * TOKENS and result["seconds"] > 0 and result["recipe"]["lr"] == 5e-3
        assert result["sha256"] == hashlib.sha256((done["folder"] / result["model"]).read_bytes()).hexdigest()
        names = ["teacher", "data_free", "student", "float_low_rank", "float_embedding"]
        assert list(result["perplexity"]) == names and list(result["kl"]) == list(result["same_top"]) == names[1:]
        assert any(f"{result['perplexity']['teacher']:.2f}" in line for line in done["said"])

    def test_training_brings_the_student_near_the_teacher(self, done):
        found = done["result"]["perplexity"]
        assert found["student"] < 0.9 * found["data_free"]
        losses = [line["kl"] for line in map(json.loads, open(done["folder"] / "log.jsonl")) if "kl" in line]
        assert len(losses) == 24 and np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])

    def test_the_last_evaluation_is_of_what_ships(self, done):
        """Bit for bit the same arithmetic: only the sums of the losses may differ."""
        lines = [line for line in map(json.loads, open(done["folder"] / "log.jsonl")) if "held_out" in line]
        assert [line["step"] for line in lines] == [8, 16, 24]
        assert lines[-1]["perplexity"] == pytest.approx(done["result"]["perplexity"]["student"], rel=1e-6)
        assert lines[-1]["held_out_kl"] == pytest.approx(done["result"]["kl"]["student"], rel=1e-5)
        assert lines[-1]["held_out_same_top"] == done["result"]["same_top"]["student"]

    def test_the_log_says_how_many_signs_are_others_than_those_without_training(self, done, teacher):
        lines = [line for line in map(json.loads, open(done["folder"] / "log.jsonl")) if "flipped" in line]
        (_, free), (_, trained) = convert(load_teacher(teacher), 4), load_student_tensors(done["folder"] / "model.pt")
        bits = [np.unpackbits((free[name] ^ trained[name]).numpy()) for name in free if name.endswith(".bits")]
        assert len(lines) == 24 and 0 < lines[0]["flipped"] < lines[-1]["flipped"]
        assert lines[-1]["flipped"] == np.concatenate(bits).mean()

    def test_perplexity_of_the_teacher_is_that_of_dfssm_eval(self, done, held_out, teacher):
        found = measure(open_scorer(teacher), held_out, TOKENS + 1, TOKENS)
        assert found.tokens == len(held_out.ids) - 1
        assert done["result"]["perplexity"]["teacher"] == pytest.approx(found.perplexity, rel=1e-5)  # fp32 sums

    def test_perplexity_of_the_student_is_that_of_dfssm_eval(self, done, held_out):
        found = measure(open_scorer(done["folder"] / "model.pt"), held_out, TOKENS + 1, TOKENS)
        # An fp32 sum in another order moves an activation across a tie now and then.
        assert done["result"]["perplexity"]["student"] == pytest.approx(found.perplexity, rel=1e-4)

    def test_divergence_is_that_of_dfssm_eval(self, done, held_out, teacher):
        student = open_scorer(done["folder"] / "model.pt")
        found = measure(student, held_out, TOKENS + 1, TOKENS, reference=open_scorer(teacher)).against
        assert done["result"]["kl"]["student"] == pytest.approx(found.kl, rel=1e-3)
        tokens = done["result"]["held_out_tokens"]  # of which one may lie on a tie
        assert done["result"]["same_top"]["student"] == pytest.approx(found.same_top, abs=1.01 / tokens)
        assert 0 < done["result"]["kl"]["student"] < 0.9 * done["result"]["kl"]["data_free"]

    def test_perplexity_of_the_data_free_student_is_that_of_dfssm_convert(self, done, held_out, teacher, tmp_path):
        save_student(tmp_path / "model.pt", *convert(load_teacher(teacher), 4))
        shutil.copy(teacher / "tokenizer.json", tmp_path)
        found = measure(open_scorer(tmp_path / "model.pt"), held_out, TOKENS + 1, TOKENS)
        assert done["result"]["perplexity"]["data_free"] == pytest.approx(found.perplexity, rel=1e-4)

    def test_perplexity_of_the_bundle_is_the_students(self, done, held_out, cpu_target, tmp_path):
        bundle = tmp_path / "bundle"
        compile_model(
            Request(done["folder"] / "model.pt", cpu_target, bundle, state_dtype="fp32", verify=False), lambda *_: None
        )
        found = measure(open_scorer(bundle), held_out, TOKENS + 1, TOKENS)
        assert done["result"]["perplexity"]["student"] == pytest.approx(found.perplexity, rel=1e-3)  # the promise

    def test_again_it_is_refused_and_nothing_changes(self, done, distill, tree):
        before = tree(done["folder"])
        with pytest.raises(
            DfssmError, match=r"out: holds a run already; go on with --resume, or choose another folder$"
        ):
            distill(done["folder"])
        assert tree(done["folder"]) == before

    @pytest.mark.parametrize("other", [{"lr": 1e-3}, {"rank": 2}, {"planes": 2}, {"seed": 1}, {"steps": 30}])
    def test_resumed_with_other_options_it_is_refused(self, done, distill, other, tree):
        before = tree(done["folder"])
        options = {"steps": 24, "lr": 5e-3, "save_every": 10, "evaluate_every": 8, "held_out": 0.1} | other
        ((name, value),) = other.items()
        with pytest.raises(
            DfssmError, match=rf"out: was begun with {name} .+, not {value}; resume with the same, or choose"
        ):
            distill(done["folder"], resume=True, **options)
        assert tree(done["folder"]) == before


class TestRecipes:
    """Each runs, keeps falling, and says what its parts cost."""

    def losses(self, folder):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    def test_paper(self, distill, tmp_path, teacher):
        result = distill(tmp_path, recipe="paper", steps=8, save_every=100, evaluate_every=100)
        found = result["perplexity"]
        assert list(found) == ["teacher", "data_free", "student", "as_trained"]
        assert found["as_trained"] != found["student"]  # 17 levels, and their signs
        lines = self.losses(tmp_path)
        blends = [line["blend"] for line in lines]
        assert blends[0] < 0.5 and blends == sorted(blends) and blends[-1] == 1
        weight = 0.3 / (0.7 * 4 * 512)
        assert all(line["loss"] == pytest.approx(line["kl"] + weight * line["ce"], rel=1e-5) for line in lines)
        # Exported by sign: levels end at 1, so their mean size is below that of the weights, which are 1 in the mean.
        (_, data_free), (_, tensors) = convert(load_teacher(teacher), 4), load_student_tensors(tmp_path / "model.pt")
        for name in ("layers.0.in_proj.scale", "layers.1.out_proj.scale"):
            assert 0.5 < tensors[name].mean() / data_free[name].mean() < 0.9

    def test_the_low_rank_of_the_published_recipe_learns_in_its_second_stage_alone(
        self, distill, tmp_path, monkeypatch
    ):
        seen, step = [], torch.optim.AdamW.step

        def watched(self, *arguments, **options):
            step(self, *arguments, **options)
            named = {}
            for group in self.param_groups:
                named.setdefault(group["name"], []).extend(p.detach().clone() for p in group["params"])
            seen.append(named)

        monkeypatch.setattr(torch.optim.AdamW, "step", watched)
        distill(tmp_path, recipe="paper", steps=6, scaffold_share=0.5, save_every=100, evaluate_every=100)
        changed = [
            {name: any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)) for name in after}
            for before, after in zip(seen, seen[1:], strict=False)
        ]
        assert [c["scaffold"] for c in changed] == [True, True, False, False, False]
        assert [c["low_rank"] for c in changed] == [False, False, True, True, True]
        assert [c["float"] for c in changed] == [True, True, False, False, False]
        ups = [p for p in seen[-1]["low_rank"] if p.shape[1] == 4]
        assert len(ups) == 4 and all(up.abs().mean() > 1e-4 for up in ups)

    @pytest.mark.parametrize("planes", [1, 2])
    def test_a_calibrated_student_begins_nearer(self, distill, tmp_path, planes):
        for init in ("svd", "calibrated"):
            distill(tmp_path / init, init=init, init_tokens=1000, planes=planes, steps=1)
        free, calibrated = (self.losses(tmp_path / init)[0]["kl"] for init in ("svd", "calibrated"))
        assert calibrated < 0.8 * free

    @pytest.mark.parametrize(
        "options",
        [
            {"planes": 2, "state_dtype": "int8", "chunk": 8},
            {"init": "activations", "hidden": 0.5, "recompute": True, "micro_batch": 2},
            {"init": "zero", "anneal": "levels", "anneal_share": 1.0, "rank": 0},
            {"activations": "float", "anneal": "continuous", "anneal_share": 1.0, "train_float": False},
        ],
        ids=lambda o: "-".join(o),
    )
    def test_binary(self, options, distill, tmp_path, make_teacher):
        options = dict(options)
        if chunk := options.pop("chunk", None):  # a window of several chunks, between which the state is rounded
            options["teacher"] = make_teacher(chunk_size=chunk)
        result = distill(tmp_path, steps=6, save_every=100, evaluate_every=100, **options)
        lines = self.losses(tmp_path)
        assert len(lines) == 6 and all(math.isfinite(line["loss"]) for line in lines)
        if "anneal" in options:  # what is harder from step to step
            blends = [line["blend"] for line in lines]
            assert blends == sorted(blends) and blends[0] < 0.2 and blends[-1] > 0.9
        else:
            assert lines[-1]["kl"] < lines[0]["kl"]
        config, _ = load_student_tensors(tmp_path / "model.pt")
        assert (config.rank, config.planes) == (options.get("rank", 4), options.get("planes", 1))
        as_trained = "as_trained" in result["perplexity"]
        assert as_trained == (options.get("activations") == "float")

    def test_without_held_out_text_nothing_is_measured(self, distill, tmp_path):
        result = distill(tmp_path, steps=2, held_out=0.0)
        assert (result["perplexity"], result["kl"], result["same_top"]) == ({}, {}, {}) and result[
            "held_out_tokens"
        ] == 0

        def constant(name):
            raise AssertionError(f"{name} is no JSON")

        json.loads((tmp_path / "result.json").read_text(), parse_constant=constant)
        assert all("held_out" not in line for line in map(json.loads, open(tmp_path / "log.jsonl")))

    def test_of_the_held_out_text_some_windows_are_measured(self, distill, tmp_path):
        said = []
        result = distill(tmp_path, steps=2, held_out=0.1, held_out_tokens=3 * TOKENS + 1, say=said.append)
        assert result["held_out_tokens"] == 3 * TOKENS and f" {3 * TOKENS} held-out tokens" in said[0]
        windows = cut_windows(open_tokens(tmp_path / "tokens").held_out, TOKENS, 3 * TOKENS)
        loss = figures(load_student(tmp_path / "model.pt"), None, windows, Ranks(0, 1, torch.device("cpu")))["held_out"]
        assert result["perplexity"]["student"] == pytest.approx(math.exp(loss), rel=1e-9)

    def test_it_goes_on_from_another_model(self, distill, tmp_path, corpus):
        """Signs, scales, low rank and float parts are that model's; latents are as large as the teacher's weights."""
        first = distill(tmp_path / "first", steps=12, lr=5e-3, held_out=0.1, save_every=100)
        (tmp_path / "other.txt").write_text(corpus.read_text().upper().lower() + " the end")
        options = {"data": [str(corpus), str(tmp_path / "other.txt")], "held_out": 0.1}
        second = distill(tmp_path / "second", steps=1, lr=1e-9, init_from=tmp_path / "first" / "model.pt", **options)
        before, after = (load_student_tensors(tmp_path / name / "model.pt")[1] for name in ("first", "second"))
        for name, tensor in before.items():
            if tensor.dtype == torch.uint8:
                assert torch.equal(tensor, after[name]), name
            else:
                torch.testing.assert_close(tensor.float(), after[name].float(), rtol=1e-5, atol=1.01, msg=name)
        assert second["perplexity"]["student"] < 0.9 * second["perplexity"]["data_free"]
        assert first["sha256"] != second["sha256"]

    def test_it_has_the_rank_and_planes_of_the_model_that_it_goes_on_from(self, distill, tmp_path, teacher):
        config, tensors = convert(load_teacher(teacher), (2, 4, 0, 3), (1, 2, 1, 1))
        save_student(tmp_path / "mixed.pt", config, tensors)
        options = {"init_from": tmp_path / "mixed.pt", "held_out": 0.1}
        whole = distill(tmp_path / "out", **options)
        assert load_student_tensors(tmp_path / "out" / "model.pt")[0].scaffolds == config.scaffolds
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
        assert distill(tmp_path / "out", resume=True, **options)["sha256"] == whole["sha256"]

    def test_a_model_of_another_teacher_to_go_on_from_is_refused(self, distill, tmp_path, make_teacher):
        save_student(tmp_path / "model.pt", *convert(load_teacher(make_teacher(d_state=16)), 4))
        with pytest.raises(DfssmError, match=r"model.pt: d_state is 16, the teacher's is 8; give a student of"):
            distill(tmp_path / "out", init_from=tmp_path / "model.pt")

    def test_resumed_a_budget_buys_the_same(self, distill, tmp_path):
        options = {"init": "calibrated", "init_tokens": 1000, "budget": 0.026, "steps": 4, "save_every": 2}
        whole = distill(tmp_path, **options)
        (tmp_path / "model.pt").unlink()
        shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
        assert distill(tmp_path, resume=True, **options)["sha256"] == whole["sha256"]
        config = load_student(tmp_path / "model.pt").config
        assert not config.alike and sum(model_bytes(config.to_dict()).values()) <= 26_000

    @pytest.mark.parametrize("more", [{}, {"budget": 0.026}], ids=lambda more: next(iter(more), "rank"))
    def test_resumed_nothing_is_measured_or_begun_again(self, distill, tmp_path, monkeypatch, more):
        options = {"init": "calibrated", "init_tokens": 1000, "held_out": 0.1} | more
        whole = distill(tmp_path, **options)
        shutil.rmtree(tmp_path / "checkpoints" / "step-000004")

        def never(*_, **__):
            raise AssertionError("again")

        for name in ("begin", "data_free"):
            monkeypatch.setattr(f"dfssm.distill.run.{name}", never)
        again = distill(tmp_path, resume=True, **options)
        assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}

    def test_a_seed_repeats_it(self, distill, tmp_path):
        found = [distill(tmp_path / str(i), steps=2, seed=i % 2)["sha256"] for i in range(3)]
        assert found[0] == found[2] != found[1]

    def test_in_bf16_it_is_nearly_the_same(self, distill, tmp_path, monkeypatch):
        """Only gradients are rounded, to 8 bits; and AdamW's steps are of one size whatever theirs."""
        distill(tmp_path / "fp32", save_every=100)
        monkeypatch.setattr("dfssm.distill.run.fast_bf16", lambda device: True)
        distill(tmp_path / "bf16", save_every=100)
        found = [[line["loss"] for line in self.losses(tmp_path / name)] for name in ("fp32", "bf16")]
        assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.05)

    def test_resumed_it_stays_with_bf16_whatever_is_faster_now(self, distill, tmp_path, monkeypatch, same_log):
        monkeypatch.setattr("dfssm.distill.run.fast_bf16", lambda device: True)
        whole = distill(tmp_path / "out")
        lines = same_log(tmp_path / "out")
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
        monkeypatch.setattr("dfssm.distill.run.fast_bf16", lambda device: False)
        assert distill(tmp_path / "out", resume=True)["sha256"] == whole["sha256"]
        assert same_log(tmp_path / "out") == lines

    def test_resumed_it_may_be_saved_and_measured_more_often(self, distill, tmp_path):
        whole = distill(tmp_path / "out", steps=6, save_every=3)
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
        again = distill(
            tmp_path / "out", resume=True, steps=6, save_every=1, evaluate_every=1, log_every=2, keep=4, micro_batch=4
        )
        assert again["sha256"] == whole["sha256"]
        names = sorted(folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir())
        assert names == [f"step-00000{step}" for step in (3, 4, 5, 6)]

    def test_a_stream(self, distill, tmp_path, monkeypatch, same_log):
        pytest.importorskip("datasets", reason="datasets is not installed")
        monkeypatch.setattr("dfssm.distill.stream._BLOCK", 5)
        words = np.random.default_rng(0).choice("hello world or he will say".split(), (200, 20))
        rows = [json.dumps({"text": " ".join(row)}) + "\n" for row in words]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text("".join(rows))
        options = {"data": [f"hf:{tmp_path / 'data'}"], "held_out_documents": 20, "init": "activations"}
        whole = distill(tmp_path / "out", **options)
        lines = same_log(tmp_path / "out")
        assert whole["held_out_tokens"] > 20 * 20 and not (tmp_path / "out" / "tokens").exists()
        assert whole["perplexity"]["student"] > 1
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
        assert distill(tmp_path / "out", resume=True, **options)["sha256"] == whole["sha256"]
        assert same_log(tmp_path / "out") == lines

    def test_a_state_in_int8_is_rounded_in_training(self):
        student = DFSSMLM(DFSSMConfig(50, 32, 2, d_state=8, headdim=8, rank=4))
        train_as(student, RECIPES["binary"])
        assert all(block.scan.round_state is None for block in student.layers)
        layers = train_as(student, dataclasses.replace(RECIPES["binary"], state_dtype="int8", ste_window=0.7))
        assert all(block.scan.round_state is dequantized for block in student.layers)
        assert len(layers) == 4 and all(isinstance(m, DensityLinear) and m.window == 0.7 and m.ships for m in layers)


class TestActivationSizes:
    @pytest.mark.parametrize("world", [1, 2])
    def test_are_root_mean_squares_over_the_first_windows(self, world, teacher):
        model = load_teacher(teacher)
        ids = np.random.default_rng(0).integers(END, size=3000)
        sources = [Windows(ids, TOKENS, 0, rank, world) for rank in range(world)]
        means = []

        class Rank(Ranks):
            def mean(self, values):
                means[-1].append(values.clone())
                return values

        for rank, source in enumerate(sources):
            means.append([])
            names = activation_sizes(model, source, Rank(rank, world, torch.device("cpu"))).keys()
            assert source.state_dict() == {"position": 0}

        inputs, windows = {name: [] for name in names}, Windows(ids, TOKENS, 0)
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, given, name=name: inputs[name].append(given[0])
            )
            for name in names
        ]
        with torch.no_grad():
            model(torch.from_numpy(windows.take(CALIBRATION))[:, :-1])
        for hook in hooks:
            hook.remove()
        assert set(names) == {f"layers.{i}.{p}" for i in range(2) for p in ("in_proj", "out_proj")}
        for name, *squares in zip(names, *means, strict=True):
            expected = inputs[name][0].double().square().mean((0, 1))
            torch.testing.assert_close(sum(squares).double() / world, expected, rtol=1e-5, atol=1e-8)
