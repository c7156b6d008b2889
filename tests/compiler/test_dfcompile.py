"""dfcompile: whole bundles of a grid of students, and, for every failure, one line, exit status 1 and nothing left."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import student_ref
import tiny
import torch

from dfssm.cli.main import dfcompile
from dfssm.compiler import pipeline
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.export.builder import GraphBuilder
from dfssm.model.checkpoint import save_student
from dfssm.opset import OPS, DfssmError
from dfssm.opset.schema import STATE_DTYPES
from dfssm.runtime import Engine
from dfssm.targets import TARGETS, get_target, ort_cpu
from dfssm.targets.bundle import check_files, read_manifest
from dfssm.verify.bundle import SEED, TOKENS

PASSES = ["load", "lower", "export", "write", "build", "verify", "golden", "taps", "emit", "finish"]

RUN_HERE = [name for name in TARGETS if name in get_target(name).VERIFIED_BY]
"""Targets whose bundles run on any machine; those of the others are in test_trt.py."""


def save(path, config=None, seed=0):
    config = config or student_ref.config("plain")
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors(config, seed).items()}
    save_student(path, config, tensors)
    return path


@pytest.fixture
def model(tmp_path):
    (tmp_path / "in").mkdir()
    return save(tmp_path / "in" / "model.pt")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs dfcompile in an empty folder `out`: (exit status, stdout, stderr, what is there afterwards)."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args):
        try:
            dfcompile([str(arg) for arg in args])
            status = 0
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err, sorted(path.name for path in folder.iterdir())

    return run


def fails(result, words, left=()):
    """One line on stderr with `words` in it, exit status 1, and nothing in the folder but what was there before."""
    status, out, err, names = result
    assert status == 1 and out == ""
    assert err.startswith("dfcompile: error: ") and err.count("\n") == 1 and words in err, err
    assert names == list(left)


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


def test_output_exists(model, command, tmp_path):
    out = tmp_path / "out"
    arguments = (model, "--target", "ort-cpu", "--no-verify", "-o", "b")
    assert command(*arguments)[0] == 0
    before = (out / "b" / "model.onnx").read_bytes()
    fails(command(*arguments), "b exists: choose another output with -o, or replace it with --force", ["b"])

    save(model, seed=1)
    assert command(*arguments, "--force", "--state-dtype", "int8")[0] == 0
    assert (out / "b" / "model.onnx").read_bytes() != before
    assert read_manifest(out / "b").state_dtype == "int8"

    (out / "b" / "manifest.json").unlink()
    fails(command(*arguments, "--force"), "is not a bundle, so --force does not replace it", ["b"])
    (out / "empty").mkdir()
    status, *_, names = command(*arguments[:-1], "empty")
    assert status == 0 and names == ["b", "empty"]


def test_force_deletes_nothing_but_a_bundle(model, command, tmp_path):
    """Neither the model that it reads, nor what a user keeps beside it, nor another model of a repository."""
    bundle, arguments = tmp_path / "out" / "b", ("--target", "ort-cpu", "--no-verify", "--force", "-o", "b")
    assert command(model, *arguments)[0] == 0
    shutil.copy(model, bundle / "model.pt")
    fails(command("b/model.pt", *arguments), "b also holds model.pt, which --force would delete: move it", ["b"])
    (bundle / "model.pt").unlink()
    (bundle / "notes").mkdir()
    assert command(model, *arguments)[0] == 0 and not (bundle / "notes").exists()
    (bundle / ".git").mkdir()
    (bundle / ".git" / "HEAD").touch()
    fails(command(model, *arguments), "b also holds .git/HEAD, which", ["b"])

    repository = ("--emit", "triton-repository", *arguments[:-1], "r")
    assert command(model, *repository)[0] == 0 and command(model, *repository)[0] == 0
    (tmp_path / "out" / "r" / "other" / "1").mkdir(parents=True)
    (tmp_path / "out" / "r" / "other" / "1" / "model.onnx").touch()
    fails(command(model, *repository), "r also holds other/1/model.onnx, which", ["b", "r"])


def test_output_is_a_link(model, command, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "b").symlink_to(tmp_path / "elsewhere")
    assert command(model, "--target", "onnx", "--no-verify", "-o", "b")[0] == 0
    assert (tmp_path / "out" / "b").is_symlink() and read_manifest(tmp_path / "elsewhere")


def test_failed_replacement_keeps_the_old(model, command, tmp_path, monkeypatch):
    arguments = (model, "--target", "onnx", "--no-verify", "-o", "b")
    assert command(*arguments)[0] == 0
    old = (tmp_path / "out" / "b" / "manifest.json").read_bytes()
    rename = Path.rename

    def refuse(self, to):
        if self.name.endswith(".dfssm-new"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    fails(command(*arguments, "--force", "--state-dtype", "int8"), "b: Input/output error", ["b"])
    assert (tmp_path / "out" / "b" / "manifest.json").read_bytes() == old


def test_full_disk(model, command, monkeypatch):
    def build(folder, progress):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ort_cpu, "build", build)
    fails(command(model, "--target", "ort-cpu"), ": No space left on device")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_forbidden_folder(model, command, tmp_path):
    (tmp_path / "out").chmod(0o500)
    try:
        fails(command(model, "--target", "ort-cpu"), "Permission denied")
    finally:
        (tmp_path / "out").chmod(0o700)


def test_folder_that_takes_no_files(model, command):
    fails(command(model, "--target", "ort-cpu", "-o", "/proc/bundle"), "cannot write /proc/bundle")


def test_interrupted(model, command, monkeypatch):
    def verify(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "verify", verify)
    status, out, err, names = command(model, "--target", "ort-cpu")
    assert (status, out, names) == (130, "", [])


def test_bug_keeps_its_traceback(model, monkeypatch, tmp_path):
    def export(job):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "export", export)
    with pytest.raises(RuntimeError, match="a bug"):
        dfcompile([str(model), "--target", "ort-cpu", "-o", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("target", RUN_HERE)
@pytest.mark.parametrize(
    "tensor, node",
    [
        ("embedding.weight", "Embedding.out of /embed"),
        ("layers.1.norm.weight", "RMSNorm.out of /layers.1/norm"),
        ("layers.1.in_proj.bits", "BinaryScaffoldMatMul.y of /layers.1/in_proj"),
        ("layers.0.out_proj.up", "BinaryScaffoldMatMul.y of /layers.0/out_proj"),
        ("layers.0.conv.bias", "CausalConv1dStep.y of /layers.0/conv"),
        ("layers.1.scan.D", "SelectiveScanStep.y of /layers.1/scan"),
        ("layers.0.scan.A_log", "SelectiveScanStep.new_state of /layers.0/scan"),
        ("norm_f.weight", "RMSNorm.out of /norm_f"),
        ("lm_head.scale", "logits of /lm_head"),
    ],
)
def test_one_changed_number_is_found(target, tensor, node, command, tmp_path, monkeypatch):
    """A single element that is not the student's fails the verification, and the message names the op it is in."""
    model = save(tmp_path / "untied.pt", student_ref.config("untied"))
    module = get_target(target)
    lower = module.lower

    def wrong(tensors, layout):
        changed = np.array(tensors[tensor])
        where = 0
        if tensor == "embedding.weight":  # a row of the table counts only where its token is drawn
            where = np.random.default_rng(SEED).integers(0, len(changed), TOKENS)[0] * changed.shape[1]
        number = changed.flat[where]
        changed.flat[where] = number * 1.01 + 0.01 if changed.dtype == np.float32 else number ^ 1
        return lower(dict(tensors) | {tensor: changed}, layout)

    monkeypatch.setattr(module, "lower", wrong)
    fails(command(model, "--target", target), f"the bundle does not compute what the student does: {node}")


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("SelectiveScanStep", lambda a: {"B_start": a["C_start"], "C_start": a["B_start"]}, "of /layers.0/scan"),
        ("SelectiveScanStep", lambda a: {"x_start": a["x_start"] + 1}, "of /layers.0/scan"),
        ("SelectiveScanStep", lambda a: {"dt_start": a["dt_start"] - 1}, "of /layers.0/scan"),
        ("CausalConv1dStep", lambda a: {"x_start": a["x_start"] + 1}, "CausalConv1dStep.y of /layers.0/conv"),
        ("GatedRMSNorm", lambda a: {"z_start": a["z_start"] + 1}, "GatedRMSNorm.out of /layers.0/gated_norm"),
    ],
    ids=["B and C", "x", "dt", "xBC", "z"],
)
def test_wrong_wiring_is_found(op, changes, words, model, command, monkeypatch):
    """Ops that are right, but read other columns: what an op made of its own inputs is not enough."""
    dfssm = GraphBuilder.dfssm

    def wired(self, kind, *args, **keywords):
        return dfssm(self, kind, *args, **keywords | (changes(keywords) if kind == op else {}))

    monkeypatch.setattr(GraphBuilder, "dfssm", wired)
    fails(command(model, "--target", "onnx"), words)


def test_states_are_carried(model, command, monkeypatch):
    """States of two layers exchanged on their way out: right in the prefill, wrong at the first step after it."""
    from dfssm.verify import bundle

    run = bundle.run

    def crossed(infer, *arguments):
        a, b = "ssm_state.0", "ssm_state.1"
        return run(lambda feeds: infer(feeds | {a: feeds[b], b: feeds[a]}), *arguments)

    monkeypatch.setattr(bundle, "run", crossed)
    fails(command(model, "--target", "ort-cpu"), "of /layers.0/scan")


def test_shipped_graph_must_agree(model, command, monkeypatch):
    from dfssm.verify import bundle

    calls_of = bundle.calls_of

    def drifting(infer, feeds, ids, calls):
        for call, outputs in enumerate(calls_of(infer, feeds, ids, calls), 1):
            yield outputs | {"logits": outputs["logits"] + (call == len(calls)) * np.float32(1e-3)}

    monkeypatch.setattr(bundle, "calls_of", drifting)
    fails(command(model, "--target", "ort-cpu"), "model.onnx gives other logits than its ops do one by one")


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
