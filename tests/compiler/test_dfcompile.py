"""dfcompile: whole bundles of a grid of students, and what it refuses before it begins."""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import student_ref
import tiny
import torch
from compiles import RUN_HERE, fails, save

from dfssm.base import DfssmError
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.opset import OPS
from dfssm.opset.schema import STATE_DTYPES
from dfssm.runtime import Engine
from dfssm.targets import get_target, ort_cpu
from dfssm.targets.bundle import check_files, read_manifest

PASSES = ["load", "lower", "export", "write", "build", "verify", "golden", "taps", "emit", "finish"]


@pytest.mark.parametrize("isa, layout", [("avx512vnni", 1), ("avx2", 2)])
def test_the_bits_lie_as_an_instruction_set_reads_them(model, command, tmp_path, isa, layout):
    report = json.loads(command(model, "--target", "ort-cpu", "--isa", isa, "--json")[1])
    assert report["layout"] == layout and report["verification"]["passed"]


def test_a_bundle_for_another_machine(model, command, tmp_path, monkeypatch):
    """It is verified here and refused here; the machine that it is for runs it with its own library."""
    other = "x86_64" if platform.machine() == "aarch64" else "aarch64"
    status, out, _, names = command(model, "--target", "ort-cpu", "--machine", other)
    assert status == 0 and f"for {other}, verified with the kernels of this machine: `dfssm verify` it there\n" in out
    folder = tmp_path / "out" / names[0]
    manifest = read_manifest(folder)
    assert manifest.machine == other and manifest.verification["passed"]
    assert "golden.safetensors" in manifest.files and "libdfssm_ort_cpu.so" not in manifest.files
    here = platform.machine()
    with pytest.raises(DfssmError, match=f"is for {other}, this machine is {here}: compile the model again here$"):
        Engine.load(folder)
    monkeypatch.setattr(platform, "machine", lambda: other)
    assert np.isfinite(Engine.load(folder).logits([[1, 2, 3]])).all()


def test_a_triton_repository_for_another_machine_is_refused(model, command):
    other = "x86_64" if platform.machine() == "aarch64" else "aarch64"
    done = command(model, "--target", "ort-cpu", "--machine", other, "--emit", "triton-repository")
    fails(done, f"--machine is {other}: make a Triton repository on such a machine")


def test_a_working_directory_that_is_gone(model, command, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    fails(command(model, "--target", "onnx"), "cannot write model-onnx: No such file or directory")


@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_bundle(target, state_dtype, model, command, tmp_path):
    tiny.write_tokenizer(tmp_path / "in" / "tokenizer.json")
    vocab = student_ref.config("plain").vocab_size
    save(model, tiny.CONFIG)  # the tokenizer has more entries than the grid's models know
    status, out, err, names = command(model, "--target", target, "--state-dtype", state_dtype, "--json")
    assert (status, names) == (0, [f"model-{target}"]) and tiny.CONFIG.vocab_size > vocab
    report = json.loads(out)
    expected = {"model.onnx", "model.onnx.data", "tokenizer.json", "golden.safetensors"}
    expected |= {"libdfssm_ort_cpu.so"} if target == "ort-cpu" else set()
    assert set(report["files"]) == expected
    assert [record["name"] for record in report["passes"]] == PASSES
    assert report["bytes"] == sum(entry["bytes"] for entry in report["files"].values())

    documented = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    for key in {*report, *report["verification"], *report["passes"][0]}:
        assert f"`{key}`" in documented or f'"{key}"' in documented, key

    folder = tmp_path / "out" / names[0]
    manifest = read_manifest(folder)
    check_files(folder)
    assert {path.name for path in folder.iterdir()} == expected | {"manifest.json"}
    for key in ("target", "state_dtype", "layout", "config", "files", "verification"):
        assert report[key] == getattr(manifest, key)
    assert (manifest.target, manifest.state_dtype) == (target, state_dtype)
    assert manifest.layout == get_target(target).layout()
    assert manifest.machine == (platform.machine() if target == "ort-cpu" else None)
    assert manifest.model_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert type(tiny.CONFIG).from_dict(manifest.config) == tiny.CONFIG
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()


def test_a_chat_template_goes_with_the_tokenizer(model, command, tmp_path):
    """And --force replaces a bundle that has one."""
    tokenizer = tmp_path / "in" / "tokenizer.json"
    tiny.write_tokenizer(tokenizer)
    save(model, tiny.CONFIG)
    names = json.dumps({"bos_token": "<|end|>", "unknown": "key"})
    (tmp_path / "in" / "tokenizer_config.json").write_text(names)
    status, out, _, _ = command(model, "--target", "onnx", "--no-verify", "--json")
    assert status == 0 and "tokenizer_config.json" not in json.loads(out)["files"], "there is no template"
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tmp_path / "in" / "chat_template.jinja").write_text(template)
    for _ in range(2):
        status, out, err, (folder,) = command(model, "--target", "onnx", "--no-verify", "--json", "--force")
        assert status == 0, err
        assert {"chat_template.jinja", "tokenizer_config.json"} <= set(json.loads(out)["files"])
    engine = Engine.load(tmp_path / "out" / folder)
    talk = [{"role": "user", "content": "hello"}]
    assert engine.chat_template(talk) == "<|end|>[hello]"
    assert engine.chat_prompt(talk) == engine.tokenizer.encode("<|end|>[hello]", add_special_tokens=False).ids
    del engine.chat_template
    (tmp_path / "out" / folder / "chat_template.jinja").write_text("another")
    with pytest.raises(DfssmError, match="chat_template.jinja: has changed since the model was opened"):
        engine.chat_prompt(talk)

    (tmp_path / "in" / "chat_template.jinja").write_text("{% if %}")
    fails(command(model, "--target", "onnx", "--force"), "its chat template cannot be read (", [folder])


@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize("name", student_ref.CONFIGS)
def test_verified(target, name, tmp_path):
    """Every config of the grid passes op by op, against the torch student."""
    model = save(tmp_path / "model.safetensors", student_ref.config(name))
    report = compile_model(Request(model, target, tmp_path / "bundle"))
    verification = report.manifest.verification
    assert verification["passed"] is True
    assert (verification["tokens"], verification["steps"]) == (64, get_target(target).VERIFY_STEPS)
    ops = {output.split(".")[0] for output in verification["outputs"]}
    assert ops == set(OPS) - {"Int8MatMul"} | {"Embedding", "logits"}
    assert verification["max_rel"] == max(error["max_rel"] for error in verification["outputs"].values())
    assert all(0 <= error["max_rel"] <= error["tolerance"] < 0.01 for error in verification["outputs"].values())
    promised = {"ort-cpu": "fp16", "onnx": "fp32"}
    assert report.manifest.state_dtype == promised.get(target, get_target(target).DEFAULT_STATE_DTYPE)


def test_no_verify(model, command):
    status, out, err, names = command(model, "--target", "ort-cpu", "--no-verify", "--json")
    assert status == 0
    assert json.loads(out)["verification"] == {"passed": None}


def test_report_for_people(model, command):
    status, out, err, names = command(model, "--target", "ort-cpu", "-o", "b")
    assert status == 0 and [line.split()[0] for line in out.splitlines()[: len(PASSES)]] == PASSES
    assert "verified against PyTorch, op by op, over 64 + 8 tokens" in out and "target ort-cpu, fp16 states" in out
    status, out, err, names = command(model, "--target", "ort-cpu", "-o", "c", "--no-verify")
    assert "not verified (--no-verify)" in out


@pytest.mark.parametrize("target", RUN_HERE)
def test_same_model_same_bytes(target, model, tmp_path):
    reports = [compile_model(Request(model, target, tmp_path / name)) for name in ("a", "b")]
    assert reports[0].manifest == reports[1].manifest
    for name in (*reports[0].manifest.files, "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_command_line():
    """The entry point as a user starts it; help and wrong flags do not wait for torch."""
    code = "import sys; from dfssm.cli.main import dfcompile; sys.modules['torch'] = None; dfcompile(sys.argv[1:])"
    run = [sys.executable, "-c", code]
    result = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "--state-dtype" in result.stdout
    result = subprocess.run([*run, "model.pt", "--target", "gpu"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "dfcompile: error: unknown target 'gpu': choose one of ort-cpu, onnx, trt\n"
    result = subprocess.run([*run, "model.pt"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "--target" in result.stderr


def test_bad_flags(model, command):
    cpu = ("--target", "ort-cpu")
    fails(command("nowhere.pt", *cpu), "nowhere.pt does not exist: give a model.pt or .safetensors")
    fails(command(model.parent, *cpu), f"is a folder with a student: give {model}")
    fails(command(model, *cpu, "--state-dtype", "fp8"), "unknown state dtype 'fp8': choose one of fp32, fp16, int8")
    fails(command(model, *cpu, "--tokenizer", "nowhere.json"), "nowhere.json does not exist: give a tokenizer.json")
    fails(command(model, *cpu, "-o", "no/where"), "there is no folder no; create it first: mkdir -p no")
    fails(command(model, *cpu, "-o", model / "x"), f"cannot write {model / 'x'}: {model} is a file")
    fails(command(model, *cpu, "--sm", "86"), "target ort-cpu has no option --sm: leave it out")


def test_bad_models(model, command, tmp_path):
    def compile(content=None, suffix=".pt", **saved):
        path = tmp_path / "in" / f"bad{suffix}"
        if content is None:
            torch.save(saved, path)
        else:
            path.write_bytes(content)
        return command(path, "--target", "ort-cpu")

    good = torch.load(model, weights_only=True)
    whole = model.read_bytes()
    fails(compile(b""), "bad.pt")
    fails(compile(b"not a model\n" * 100), "bad.pt")
    fails(compile(whole[: len(whole) // 2]), "bad.pt")
    fails(compile(b"\xff" * 1000, ".safetensors"), "bad.safetensors")
    fails(compile(**good | {"format": "other"}), "bad.pt")
    fails(compile(**good | {"version": 3}), "version")
    fails(compile(**good | {"config": good["config"] | {"rank": 5}}), "layers.0.in_proj.down")
    tensors = dict(good["tensors"])
    del tensors["layers.1.out_proj.up"]
    fails(compile(**good | {"tensors": tensors}), "layers.1.out_proj.up")


def test_bad_tokenizers(model, command, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    fails(command(model, "--target", "ort-cpu", "--tokenizer", path), "is no tokenizer.json")
    tiny.write_tokenizer(path)
    last = tiny.CONFIG.vocab_size - 1
    fails(command(model, "--target", "ort-cpu", "--tokenizer", path), f"has id {last}, the model knows ids 0 to 40")


def test_no_library(model, command, monkeypatch):
    monkeypatch.setenv(ort_cpu.LIBRARY_VARIABLE, "/nowhere/lib.so")
    fails(command(model, "--target", "ort-cpu"), "target ort-cpu cannot be used here: DFSSM_ORT_LIBRARY")


def test_progress_reaches_its_end(model, tmp_path):
    seen = {}

    def progress(name, done, total):
        assert done == seen.get(name, (0, total))[0] + 1 and total == seen.get(name, (0, total))[1]
        seen[name] = done, total

    compile_model(Request(model, "ort-cpu", tmp_path / "b"), progress)
    assert list(seen) == ["write", "verify", "golden"] and all(done == total for done, total in seen.values())


def test_python_errors_are_dfssm_errors(tmp_path):
    with pytest.raises(DfssmError, match="unknown target"):
        compile_model(Request(tmp_path / "model.pt", "gpu"))
