"""The bundle of dfcompile in its place: whole there, or nothing left, whatever fails."""

import os
import shutil
from pathlib import Path

import pytest
from compiles import fails, save

from dfssm.base.files import part_of
from dfssm.cli.main import dfcompile
from dfssm.compiler import pipeline
from dfssm.targets import ort_cpu
from dfssm.targets.bundle import read_manifest


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

    shutil.rmtree(bundle / ".git")
    part = bundle / part_of(b"another")  # of a writer that was killed
    part.mkdir()
    (part / "model.onnx").touch()
    assert command(model, *arguments)[0] == 0 and not part.exists()
    part.mkdir()
    (part / "notes.txt").touch()
    fails(command(model, *arguments), f"b also holds {part.name}/notes.txt, which", ["b"])

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
