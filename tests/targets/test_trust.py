"""Code that comes with a bundle: a stranger's does not run, the user's own and what is trusted does."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_commands
from lower_layer import moments

from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.targets import get_target, trust
from dfssm.targets.bundle import MANIFEST, file_entry, open_bundle, read_manifest, sealed
from dfssm.targets.ort_cpu import LIBRARY, find_library

ALARM = r"""
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void loaded() { FILE* file = fopen(getenv("ALARM"), "w"); if (file) fclose(file); }
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A library that leaves a mark where $ALARM says as soon as it is loaded."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "alarm.c").write_text(ALARM)
    subprocess.run(["gcc", "-shared", "-fPIC", folder / "alarm.c", "-o", folder / LIBRARY], check=True)
    return folder / LIBRARY


@pytest.fixture
def bundle(cpu_target, tiny_bundle, tmp_path) -> Path:
    if cpu_target != "ort-cpu":
        pytest.skip("the op library is not built")
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def put(bundle: Path, library: Path, listed: bool) -> None:
    """`library` as the bundle's own, in its manifest or not."""
    shutil.copyfile(library, bundle / LIBRARY)
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"].pop(LIBRARY, None)
    if listed:
        document["files"][LIBRARY] = file_entry(library)
    del document["manifest_sha256"]
    (bundle / MANIFEST).write_text(sealed(document))


def run(bundle: Path, alarm: Path, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dfssm.cli.main", "run", str(bundle), "-p", "a", "-n", "3", *options]
    environment = os.environ | {"ALARM": str(alarm)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


@pytest.mark.parametrize("listed", [True, False], ids=["in the manifest", "not in the manifest"])
def test_a_strangers_library_is_not_loaded(bundle, hostile, listed, tmp_path):
    expected = run(bundle, tmp_path / "alarm").stdout
    put(bundle, hostile, listed)
    done = run(bundle, tmp_path / "alarm")
    assert done.returncode == 0 and done.stdout == expected, done.stderr
    assert not (tmp_path / "alarm").exists()


def test_the_library_of_the_working_directory_is_not_loaded(bundle, hostile, tmp_path):
    """`dlopen` of a bare name searches folders that anybody may write to."""
    put(bundle, hostile, listed=False)
    done = run(Path("."), tmp_path / "alarm", cwd=bundle)
    assert done.returncode == 0 and not (tmp_path / "alarm").exists(), done.stderr


@pytest.mark.parametrize("command", [["run", ".", "-p", "a", "-n", "1"], ["verify", ".", "--bisect"]])
def test_a_trusted_library_is_that_of_the_working_directory(bundle, tmp_path, command):
    """Whose bare name would be looked for in the folders of the system, too."""
    expected, trusted = run_commands([["dfssm", *command], ["dfssm", *command, "--trust"]], bundle)
    assert (trusted.status, trusted.out) == (expected.status, expected.out), trusted.err
    assert expected.status == 0 and expected.out


def test_a_module_of_the_working_directory_is_not_imported(bundle, tmp_path):
    """A command starts other processes, which look for modules where they run unless they are told not to."""
    (bundle / "json.py").write_text(f"open({str(tmp_path / 'alarm')!r}, 'w')")
    command = [sys.executable, "-P", "-m", "dfssm.cli.main", "bench", ".", *"--rounds 1 --prompt 2 --tokens 2".split()]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not (tmp_path / "alarm").exists(), done.stderr


def test_a_library_may_be_named_from_the_working_directory(bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    monkeypatch.setenv("DFSSM_ORT_LIBRARY", LIBRARY)
    assert Engine.load(bundle).generate("a", max_tokens=1).prompt_tokens == 1


def test_a_trusted_library_is_that_of_the_manifest_while_files_are_replaced(bundle, hostile, tmp_path):
    """In the lower layer of an overlay mount: it may not be in its place yet."""
    new, found = shutil.copytree(bundle, tmp_path / "new"), set()
    put(new, hostile, listed=True)
    for place in moments(bundle, new, tmp_path):
        with open_bundle(place) as opened:
            library = trust.own_library(opened, LIBRARY, asked=True)
            assert library is not None and file_entry(library) == opened.manifest.files[LIBRARY]
            assert trust.own_library(opened, LIBRARY, asked=False) is None
            found.add(library.parent.name[0])
    assert found == {"b", "."}


@pytest.mark.parametrize("way", ["--trust", "DFSSM_TRUST"])
def test_bisecting_runs_the_own_library_of_a_trusted_bundle_alone(bundle, hostile, way, tmp_path):
    """It opens its sessions by itself."""
    command, alarm = ["dfssm", "verify", bundle, "--bisect"], tmp_path / "alarm"
    put(bundle, hostile, listed=True)
    (done,) = run_commands([command], tmp_path, ALARM=str(alarm))
    assert done.status == 0 and not alarm.exists(), done.err
    options, variables = (["--trust"], {}) if way == "--trust" else ([], {"DFSSM_TRUST": "1"})
    (done,) = run_commands([[*command, *options]], tmp_path, ALARM=str(alarm), **variables)
    assert alarm.exists() and done.status == 1 and "does not load into ONNX Runtime" in done.err


@pytest.mark.parametrize("way", ["--trust", "DFSSM_TRUST"])
def test_a_trusted_library_runs_if_the_manifest_lists_it(bundle, hostile, way, tmp_path, monkeypatch):
    options = ["--trust"] if way == "--trust" else []
    if not options:
        monkeypatch.setenv("DFSSM_TRUST", "1")
    put(bundle, hostile, listed=False)
    assert run(bundle, tmp_path / "alarm", *options).returncode == 0
    assert not (tmp_path / "alarm").exists()
    put(bundle, hostile, listed=True)
    done = run(bundle, tmp_path / "alarm", *options)
    assert (tmp_path / "alarm").exists()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "does not load into ONNX Runtime" in done.stderr


def test_a_trusted_bundle_runs_where_no_library_is_installed(bundle, monkeypatch):
    expected = "".join(Engine.load(bundle).generate("a", max_tokens=4))
    monkeypatch.setattr("dfssm.targets.library.installed", lambda library: None)
    monkeypatch.delenv("DFSSM_ORT_LIBRARY", raising=False)
    with pytest.raises(DfssmError, match="is not installed: .*trust the bundle's own with --trust"):
        Engine.load(bundle)
    assert "".join(Engine.load(bundle, trust=True).generate("a", max_tokens=4)) == expected


def test_trust_ends_with_the_command(invoke_run, bundle):
    invoke_run(bundle, "-p", "a", "-n", 1, "--trust")
    assert trust.VARIABLE not in os.environ


@pytest.fixture
def invoke_run():
    from click.testing import CliRunner

    from dfssm.cli.main import dfssm

    def run(*arguments):
        result = CliRunner().invoke(dfssm, ["run", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    return run


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/dfssm/engines"


def test_an_engine_runs_if_this_user_made_it_or_trusts_it(records, tmp_path):
    engine, own, other = tmp_path / "model.engine", "ab" * 32, "cd" * 32
    for _ in range(2):
        trust.record(own, trust.ENGINES)
    trust.require_engine(engine, own, asked=False)
    trust.require_engine(engine, other, asked=True)
    with pytest.raises(DfssmError, match=r"model.engine is a program, and no dfcompile of yours made it: .*--trust"):
        trust.require_engine(engine, other, asked=False)
    with pytest.raises(DfssmError):  # a part of a line is no record
        trust.require_engine(engine, own[:10], asked=False)


def test_without_a_place_for_records_nothing_fails_and_trust_is_asked(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    trust.record("ab" * 32, trust.ENGINES)
    with pytest.raises(DfssmError, match="--trust"):
        trust.require_engine(tmp_path, "ab" * 32, asked=False)


def test_the_bytes_of_an_engine_decide_not_its_manifest(tiny_bundle, records, tmp_path, monkeypatch):
    """A manifest may say anything, and hashes may be switched off: what is hashed is what would be run."""
    target = get_target("trt")
    (tmp_path / "model.engine").write_bytes(b"code")
    files = {"model.engine": file_entry(tmp_path / "model.engine") | {"sha256": "ab" * 32}}
    made = {"builder": "tensorrt", "lowering": "native"}
    manifest = dataclasses.replace(read_manifest(tiny_bundle), target="trt", layout=0, files=files, engine=made)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    trust.record("ab" * 32, trust.ENGINES)
    monkeypatch.setattr("dfssm.targets.trt.import_module", lambda name: pytest.fail("TensorRT was loaded"))
    with open_bundle(tmp_path) as bundle, pytest.raises(DfssmError, match="no dfcompile of yours made it"):
        target.open_engine(bundle, bundle.manifest)


def test_the_copy_in_a_bundle_is_the_installed_library(bundle):
    assert (bundle / LIBRARY).read_bytes() == find_library().read_bytes()


def test_a_user_without_a_home_has_no_records(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    trust.record("ab" * 32, trust.ENGINES)
    assert not trust.recorded("ab" * 32, trust.ENGINES) and not any(tmp_path.iterdir())


def test_records_are_never_below_the_working_directory(tmp_path, monkeypatch):
    """XDG base directories: a path that is not absolute counts as none."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.chdir(tmp_path)
    trust.record("ab" * 32, trust.ENGINES)
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and trust.recorded("ab" * 32, trust.ENGINES)


def test_a_record_that_is_a_pipe_is_not_waited_for(records):
    records.parent.mkdir(parents=True)
    os.mkfifo(records)
    trust.record("ab" * 32, trust.ENGINES)
    assert not trust.recorded("ab" * 32, trust.ENGINES)


def test_a_damaged_record_costs_its_own_line_alone(records):
    trust.record("ab" * 32, trust.ENGINES)
    records.write_bytes(b"\xff\0\n" + records.read_bytes())
    assert trust.recorded("ab" * 32, trust.ENGINES)
