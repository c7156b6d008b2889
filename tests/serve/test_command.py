"""`dfssm serve` as a process: its log, its end, and what it refuses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from click.testing import CliRunner
from commands import run_commands
from documents import ROOT, commands

from dfssm.cli.serve import serve

SERVE = [sys.executable, "-m", "dfssm.cli.main", "serve"]


def start(*arguments, **options):
    return subprocess.Popen(
        [*SERVE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_it_logs_and_ends_with_0(tiny_bundle):
    options = ["--port", "0", "--json", "--name", "m", "--threads", "1", "--prefix-cache", "1", "--grace", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*SERVE, tiny_bundle, *options], **pipes)
    try:
        first = json.loads(process.stdout.readline())
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", first["url"]) and first["bundle"] == str(tiny_bundle)
        body = json.dumps({"prompt": "hello", "max_tokens": 3, "seed": 1, "model": "m", "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{first['url']}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    (line,) = map(json.loads, out.splitlines())
    assert (line["path"], line["status"], line["prompt_tokens"]) == ("/v1/completions", 200, 1)
    assert (line["generated_tokens"], line["finish_reasons"], line["level"]) == (3, ["length"], "info")
    assert 0 <= line["first_token_seconds"] <= line["seconds"]
    assert "hello" not in out, "no text is logged"


def test_a_name_that_is_not_utf8_and_a_path_of_several_lines(tiny_bundle, tmp_path):
    """The name of a model, by default its folder's, is in every answer; a path, decoded, in the log."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / os.fsdecode(b"caf\xe9"))
    process = start(bundle, "--port", "0", "--grace", "0", errors="backslashreplace")
    try:
        url = re.search(r"url=(\S+) ", process.stderr.readline())[1]
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["caf\ufffd"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/a%0A2026-11-30%20forged%1B%5B2J")
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    first, second = err.splitlines()
    assert "path=/v1/models status=200" in first and "path=/a 2026-11-30 forged\\x1b[2J status=404" in second


def test_wrong_uses_are_one_line(tiny_bundle, tmp_path):
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {
            (tiny_bundle, "--port", port): f"127.0.0.1 port {port}: cannot listen there (Address already in use); give",
            (
                tiny_bundle,
                "--api-key-file",
                "empty",
            ): "the API key of empty is empty or has other",
            (tiny_bundle, "--api-key-file", "none"): "none does not exist: give a file with the API key",
            (tiny_bundle, "--host", "no.such.host.invalid"): "no.such.host.invalid port 8000: cannot listen there",
            (tiny_bundle, "--host", "a" * 64): f"{'a' * 64} port 8000: cannot listen there (encoding with 'idna'",
            (tmp_path,): f"{tmp_path} is not a bundle",
        }
        found = run_commands([["dfssm", "serve", *arguments] for arguments in wrong], tmp_path)
    for message, done in zip(wrong.values(), found, strict=True):
        assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
        assert done.err.startswith(f"dfssm: error: {message}"), done.err


def test_numbers_of_replicas_that_do_not_fit(tiny_bundle):
    for options, message in (
        (["--replicas", "2"], "--replicas and --max-replicas are for --ray"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "--max-replicas 2 is less than --replicas 3"),
    ):
        result = CliRunner().invoke(serve, [str(tiny_bundle), *options])
        assert result.exit_code == 2 and message in result.output


CLIENT = "needs a server that runs"
NOT_RUN = {
    "curl": CLIENT,
    "dfssm serve": "runs until it is stopped",
    "docker": "needs a Docker engine",
    "pip install": "asks a package index",
}


def test_the_python_of_the_document_runs(server):
    """docs/serve.md's, against a server of this address."""
    text = (ROOT / "docs/serve.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(block.replace(":8000", f":{server.port}").replace("my-model", "tiny"), {})
    found = [command for command in commands(text) if not command.startswith(tuple(NOT_RUN))]
    assert found == [], "a command that nothing runs"
