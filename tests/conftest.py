"""Fixtures that more than one folder of tests uses. (That it is here also puts this folder on the path.)"""

import json

import pytest
import tiny
from tokenizers import Tokenizer

from dfssm.targets import get_target


@pytest.fixture(scope="session", autouse=True)
def own_records(tmp_path_factory):
    """What dfcompile records of the engines it made goes to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("DFSSM_TRUST", raising=False)
        yield


@pytest.fixture(scope="session")
def cpu_target() -> str:
    """The CPU target where this machine has it: it runs the states in place; else the portable one."""
    return "ort-cpu" if get_target("ort-cpu").probe().usable else "onnx"


@pytest.fixture(scope="session")
def tiny_bundle(cpu_target, tmp_path_factory):
    """A bundle of the tiny student with fp16 states and a tokenizer. Not to be written to."""
    return tiny.write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", target=cpu_target, state_dtype="fp16")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.write_tokenizer(path)
    return Tokenizer.from_file(str(path))


@pytest.fixture
def write(tmp_path):
    """write(content, name="a.txt") -> path: text, bytes, rows as JSON lines, or columns as parquet, by the suffix."""

    def write(content, name="a.txt", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table(content), path, **options)
        else:
            content = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else content
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
