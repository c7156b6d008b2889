import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
import tiny

from dfssm.base import DfssmError
from dfssm.cli.main import COMMANDS
from dfssm.model.checkpoint import load_student_tensors
from dfssm.opset.layouts import LAYOUTS
from dfssm.targets.bundle import file_entry, read_manifest, sealed


def loads(result):
    """The one JSON object on stdout."""
    assert result.exit_code in (0, 1), result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_help_lists_every_command_in_a_line(invoke):
    text = invoke("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in text
        assert invoke(name, "--help").exit_code == 0


class TestRun:
    def test_text_streams_to_stdout_and_the_speed_to_stderr(self, invoke, tiny_bundle):
        result = invoke("run", tiny_bundle, "-p", "hello", "-n", 12)
        assert result.exit_code == 0 and len(result.stdout) > 12
        assert "tok/s" in result.stderr and "tok/s" not in result.stdout

    def test_json(self, invoke, tiny_bundle):
        result = loads(invoke("run", tiny_bundle, "-p", "hello world", "-n", 5, "--json"))
        assert result["text"] and result["new_tokens"] == len(result["tokens"]) == 5
        assert result["finish_reason"] == "length" and result["prompt_tokens"] == 4
        assert result["tok_s"] > 0 and result["prefill_tok_s"] > 0 and result["threads"] >= 1

    def test_a_seed_repeats_and_settings_reach_the_sampler(self, invoke, tiny_bundle):
        def text(*settings):
            return loads(invoke("run", tiny_bundle, "-p", "hello", "-n", 20, "--json", *settings))["tokens"]

        drawn = text("--temperature", 3, "--seed", 1)
        assert drawn == text("--temperature", 3, "--seed", 1) != text("--temperature", 3, "--seed", 2)
        assert text("--temperature", 3, "--top-k", 1) == text() == text("--temperature", 3, "--top-p", 1e-6)

    def test_every_option_of_sampling_reaches_the_engine(self, invoke, tiny_bundle):
        """The text is that of `Engine.generate` with these options, and another than without any one of them."""
        from dfssm.runtime import Engine

        engine = Engine.load(tiny_bundle, threads=1)
        base = {"temperature": 1.3, "seed": 4, "ignore_eos": True}
        options = ["-n", 30, "--temperature", 1.3, "--seed", 4, "--ignore-eos", "--threads", 1]
        for more, settings in (
            (["--min-p", 0.4], {"min_p": 0.4}),
            (["--repetition-penalty", 1.7], {"repetition_penalty": 1.7}),
            (["--presence-penalty", 1.5], {"presence_penalty": 1.5}),
            (["--frequency-penalty", 1.5], {"frequency_penalty": 1.5}),
            (["--logit-bias", "104=-9.5", "--logit-bias", "5=3"], {"logit_bias": {104: -9.5, 5: 3.0}}),
            (["--logprobs", 2], {"logprobs": 2}),
        ):
            found = loads(invoke("run", tiny_bundle, "-p", "hello", "--json", *options, *more))
            expected, free = (engine.generate("hello", max_tokens=30, **base | one) for one in (settings, {}))
            list(expected), list(free)
            assert found["tokens"] == expected.tokens and (free.tokens != expected.tokens) == (
                "logprobs" not in settings
            )
            told = [(one["token"], one["logprob"], len(one["top"])) for one in found["logprobs"] or []]
            assert told == [(one.token, one.logprob, 2) for one in expected.logprobs]
        stopped = loads(invoke("run", tiny_bundle, "-p", "hello", "--json", *options, "--stop-id", free.tokens[3]))
        assert (
            stopped["finish_reason"] == "stop" and stopped["tokens"] == free.tokens[: free.tokens.index(free.tokens[3])]
        )

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            (["--logit-bias", "5"], "5 is not ID=NUMBER"),
            (["--logit-bias", "a=1"], "a is not an integer from 0"),
            (["--logit-bias", "1=1e9"], "1e9 is not a number from -100 to 100"),
            (["--logprobs", "2"], "--logprobs is for --json"),
            (["--eos", "2", "--ignore-eos"], "Give either --eos or --ignore-eos"),
        ],
    )
    def test_options_that_do_not_fit_are_named(self, invoke, tiny_bundle, options, named):
        result = invoke("run", tiny_bundle, "-p", "hello", *options)
        assert result.exit_code == 2 and named in result.stderr

    def test_speculation_is_the_same_text_in_fewer_runs(self, invoke, tmp_path):
        run = (
            "run",
            tiny.write_bundle(tmp_path / "b", tiny.CONFIG, "ort-cpu", "fp16-deferred"),
            "-p",
            "hello",
            "-n",
            200,
            "--eos",
            1,
        )
        plain, found = loads(invoke(*run, "--json")), loads(invoke(*run, "--json", "--speculate"))
        counts = found["speculation"]
        assert plain["speculation"] is None and found["tokens"] == plain["tokens"]
        assert 0 < counts["kept"] <= counts["drafted"] and counts["runs"] + counts["kept"] == len(plain["tokens"]) - 1
        line = f"| {counts['kept']} of {counts['drafted']} drafts right, {counts['runs']} runs |"
        assert line in invoke(*run, "--speculate").stderr

    def test_stop(self, invoke, tiny_bundle):
        free = loads(invoke("run", tiny_bundle, "-p", "hello", "-n", 20, "--json"))["text"]
        stop = free[5:7]
        stopped = loads(invoke("run", tiny_bundle, "-p", "hello", "-n", 20, "--json", "--stop", stop))
        assert stopped["text"] == free[: free.find(stop)] and stopped["finish_reason"] == "stop"

    def test_a_saved_state_continues_the_text(self, invoke, tiny_bundle, tmp_path):
        whole = loads(invoke("run", tiny_bundle, "-p", "hello world", "-n", 12, "--json"))
        state = tmp_path / "a.state"
        first = loads(invoke("run", tiny_bundle, "-p", "hello world", "-n", 5, "--json", "--save-state", state))
        rest = loads(invoke("run", tiny_bundle, "-n", 7, "--json", "--load-state", state))
        assert first["tokens"] + rest["tokens"] == whole["tokens"]
        assert first["text"] + rest["text"] == whole["text"]

    def test_nothing_to_continue(self, invoke, tiny_bundle):
        with pytest.raises(DfssmError, match="give a prompt with -p or a state"):
            invoke("run", tiny_bundle)


class TestCompare:
    def test_a_bundle_of_the_student_passes(self, invoke, tiny_bundle, tiny_model):
        result = invoke("compare", tiny_bundle, tiny_model, "--tokens", 12, "--json")
        found = loads(result)
        assert result.exit_code == 0 and found["passed"] and found["identical"] and found["tokens"] == 12
        assert found["max_rel"] < 1e-5 and found["max_abs"] == found["outputs"]["logits"]["max_abs"]
        states = {f"{kind}_state_out.{i}" for kind in ("conv", "ssm") for i in (0, 1)}
        assert set(found["outputs"]) == {"logits"} | states
        assert len(found["layers"]) == 2 * 7

    def test_a_table_for_people(self, invoke, tiny_bundle, tiny_model):
        text = invoke("compare", tiny_bundle, tiny_model, "--tokens", 8).stdout
        assert "layers.1" in text and "gated_norm" in text and text.endswith("passed\n")

    @pytest.mark.parametrize("state_dtype", ["fp32", "int8", "fp16-deferred", "int8-deferred"])
    def test_other_state_dtypes_pass(self, invoke, cpu_target, tmp_path, tiny_model, state_dtype):
        bundle = tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype=state_dtype, tokenizer=False)
        assert invoke("compare", bundle, tiny_model, "--tokens", 10).exit_code == 0

    def test_one_wrong_weight_fails_in_its_layer_only(self, invoke, cpu_target, tmp_path, tiny_model, monkeypatch):
        tensors = tiny.tensors()
        tensors["layers.1.out_proj.scale"][3] *= 1.01  # one row of 64: less than a flipped activation at worst
        monkeypatch.setattr(tiny, "tensors", lambda config, seed: tensors)
        result = invoke("compare", tiny.write_bundle(tmp_path / "b", target=cpu_target), tiny_model, "--json")
        found = loads(result)
        failed = {name for part in ("outputs", "layers") for name, d in found[part].items() if not d["passed"]}
        assert result.exit_code == 1 and not found["passed"]
        assert failed == {"layers.1.out_proj", "layers.1.residual"}

    def test_numbers_that_overflow_fail(self, invoke, cpu_target, tmp_path, tiny_model, monkeypatch):
        tensors = tiny.tensors()
        tensors["layers.1.in_proj.scale"][0] = np.inf
        monkeypatch.setattr(tiny, "tensors", lambda config, seed: tensors)
        result = invoke("compare", tiny.write_bundle(tmp_path / "b", target=cpu_target), tiny_model, "--json")
        found = loads(result)
        assert result.exit_code == 1 and not found["passed"] and not found["layers"]["layers.1.in_proj"]["passed"]
        assert found["identical"]  # NaN in both graphs

    def test_another_student_is_refused_by_its_config(self, invoke, tiny_bundle, tmp_path):
        invoke("init", "--config", _config_file(tmp_path), "-o", tmp_path / "other.pt")
        with pytest.raises(DfssmError, match="their configs differ"):
            invoke("compare", tiny_bundle, tmp_path / "other.pt")


class TestInspect:
    def test_model_and_bundle_agree(self, invoke, tiny_model, tiny_bundle):
        model, bundle = (
            loads(invoke("inspect", tiny_model, "--json")),
            loads(invoke("inspect", tiny_bundle, "--json")),
        )
        assert model["config"] == bundle["config"]
        assert model["model_sha256"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
        manifest = read_manifest(tiny_bundle)
        assert (bundle["machine"], bundle["model_sha256"]) == (manifest.machine, manifest.model_sha256)
        assert model["target"] is None and bundle["target"] == manifest.target
        assert model["layout"] is None and bundle["layout"] == manifest.layout
        assert model["files"] == {"model.pt": tiny_model.stat().st_size}
        assert bundle["files"]["model.onnx.data"] == (tiny_bundle / "model.onnx.data").stat().st_size
        # the bundle's layout pads rows; everything else weighs the same
        assert {role for role, size in model["sizes"].items() if size != bundle["sizes"][role]} <= {
            "scaffold",
            "low rank",
        }

    def test_what_a_config_leaves_out_is_its_default(self, invoke, tiny_bundle, tmp_path):
        bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
        document = json.loads((bundle / "manifest.json").read_text())
        del document["config"]["norm_eps"], document["manifest_sha256"]
        (bundle / "manifest.json").write_text(sealed(document))
        expected = invoke("inspect", tiny_bundle).stdout.replace(str(tiny_bundle), str(bundle))
        assert invoke("inspect", bundle).stdout == expected
        assert loads(invoke("inspect", bundle, "--json"))["config"] == read_manifest(tiny_bundle).config

    def test_a_picture_for_people(self, invoke, tiny_bundle):
        text = invoke("inspect", tiny_bundle).stdout
        layout = LAYOUTS[read_manifest(tiny_bundle).layout].name
        assert "█" in text and "scaffold" in text and f"fp16 states, layout {layout}\n" in text
        assert f"student's sha256 {read_manifest(tiny_bundle).model_sha256}" in text

    def test_a_damaged_bundle_is_not_described(self, invoke, tiny_bundle, tmp_path):
        graph = shutil.copytree(tiny_bundle, tmp_path / "b") / "model.onnx"
        graph.write_bytes(bytes(graph.stat().st_size))
        with pytest.raises(DfssmError, match="model.onnx does not match the sha256 in its manifest"):
            invoke("inspect", tmp_path / "b")

    def test_a_missing_path_is_named(self, invoke, tmp_path):
        with pytest.raises(DfssmError, match="nothing does not exist"):
            invoke("inspect", tmp_path / "nothing")


class TestDoctor:
    def test_json(self, invoke):
        result = loads(invoke("doctor", "--json"))
        assert set(result) == {"machine", "packages", "isas", "environment", "targets", "usable_for"}
        assert result["targets"]["onnx"]["usable"] and result["machine"]["cores"] >= 1
        assert result["packages"]["onnxruntime"]

    def test_a_broken_library_is_a_reason(self, invoke, monkeypatch, tmp_path):
        (tmp_path / "lib.so").write_bytes(b"no library")
        monkeypatch.setenv("DFSSM_ORT_LIBRARY", str(tmp_path / "lib.so"))
        result = loads(invoke("doctor", "--json"))
        assert not result["targets"]["ort-cpu"]["usable"]
        assert "lib.so" in result["targets"]["ort-cpu"]["why_not"]
        assert "target ort-cpu: no: " in invoke("doctor").stdout


class TestStudents:
    def test_init_is_the_same_for_the_same_seed(self, invoke, tmp_path):
        files = [tmp_path / f"{n}.pt" for n in range(3)]
        for file, seed in zip(files, (0, 0, 1), strict=True):
            result = loads(invoke("init", "--config", _config_file(tmp_path), "--seed", seed, "-o", file, "--json"))
            assert result["bytes"] == file.stat().st_size and result["config"]["rank"] == 16
        tensors = [load_student_tensors(file)[1]["layers.0.in_proj.bits"].tolist() for file in files]
        assert tensors[0] == tensors[1] != tensors[2]

    def test_init_wants_one_shape(self, invoke, tmp_path):
        assert invoke("init", "-o", tmp_path / "a.pt").exit_code == 2
        assert invoke("init", "--preset", "a", "--config", "b", "-o", tmp_path / "a.pt").exit_code == 2
        with pytest.raises(DfssmError, match="preset 'a' is not known"):
            invoke("init", "--preset", "a", "-o", tmp_path / "a.pt")
        with pytest.raises(DfssmError, match="nothing.json does not exist: give a config as JSON"):
            invoke("init", "--config", tmp_path / "nothing.json", "-o", tmp_path / "a.pt")

    @pytest.mark.parametrize("change", [{"n_layer": 10**9}, {"vocab_size": 10**14}, {"n_layer": 10**30}])
    def test_init_of_more_than_the_memory_is_refused_at_once(self, invoke, tmp_path, change):
        (tmp_path / "big.json").write_text(json.dumps({"vocab_size": 64, "d_model": 32, "n_layer": 1} | change))
        with pytest.raises(DfssmError, match="the student takes [0-9,]+ MB, this machine has [0-9,]+ MB"):
            invoke("init", "--config", tmp_path / "big.json", "-o", tmp_path / "a.pt")
        assert [path.name for path in tmp_path.iterdir()] == ["big.json"]

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
    def test_a_config_that_is_no_json_is_named(self, invoke, tmp_path, text):
        (tmp_path / "c.json").write_text(text, encoding="latin-1")
        with pytest.raises(DfssmError, match="c.json cannot be read as JSON .*: give a config as in docs/format.md"):
            invoke("init", "--config", tmp_path / "c.json", "-o", tmp_path / "a.pt")

    def test_convert(self, invoke, tmp_path):
        import torch

        from dfssm.model.config import Mamba2Config
        from dfssm.model.hf_import import save_teacher
        from dfssm.model.teacher import Mamba2LM

        torch.manual_seed(0)
        config = Mamba2Config(vocab_size=50, d_model=32, n_layer=1, d_state=8, headdim=8)
        save_teacher(Mamba2LM(config), tmp_path / "teacher")
        result = loads(
            invoke("convert", tmp_path / "teacher", "--rank", 2, "--planes", 2, "-o", tmp_path / "s.pt", "--json")
        )
        assert (result["config"]["rank"], result["config"]["planes"]) == (2, 2)
        read, tensors = load_student_tensors(tmp_path / "s.pt")
        assert read.to_dict() == result["config"] and len(tensors) == result["tensors"]
        assert not (tmp_path / "tokenizer.json").exists()

        (tmp_path / "teacher" / "tokenizer.json").write_text("the teacher's")
        for there, kept in ((None, "the teacher's"), ("another", "another")):
            if there:
                (tmp_path / "tokenizer.json").write_text(there)
            invoke("convert", tmp_path / "teacher", "-o", tmp_path / "s.pt")
            assert (tmp_path / "tokenizer.json").read_text() == kept
        (tmp_path / "teacher" / "chat_template.jinja").write_text("{{ messages }}")
        invoke("convert", tmp_path / "teacher", "-o", tmp_path / "s.pt")
        assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def _config_file(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({"vocab_size": 40, "d_model": 32, "n_layer": 1, "d_state": 8, "headdim": 8}))
    return path


@pytest.mark.parametrize("command", [["run", "-p", "a"], ["verify", "--bisect"], ["compare", "model.pt"]])
def test_a_graph_that_fails_as_it_runs_is_one_line(command, tiny_bundle, tiny_model, invoke, tmp_path, capfd):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (head,) = [node for node in model.graph.node if "logits" in node.output]
    head.output[0] = "all"
    wrong = np.arange(tiny.CONFIG.vocab_size) + 1  # the last of them is none of the logits
    model.graph.initializer.append(onnx.numpy_helper.from_array(wrong, "wrong"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["all", "wrong"], ["logits"], axis=2))
    onnx.save(model, bundle / "model.onnx")
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"]["model.onnx"] = file_entry(bundle / "model.onnx")
    del document["manifest_sha256"]
    (bundle / "manifest.json").write_text(sealed(document))
    message = r"^ONNX Runtime cannot run .*model\.onnx \(.*Gather.*\): compile the model again$"
    with pytest.raises(DfssmError, match=message):
        invoke(command[0], bundle, *(tiny_model if word == "model.pt" else word for word in command[1:]))
    assert capfd.readouterr().err == ""  # ONNX Runtime logs nothing itself
