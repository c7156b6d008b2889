"""Errors of the system and of libraries, as a part of one line of ours."""

import errno

import pytest

from dfssm.opset import DfssmError
from dfssm.opset.errors import reason


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOENT, "No such file or directory", "/a/b"), "No such file or directory"),
        (OSError("of a library"), "of a library"),
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n one \n"), "one"),
        (ValueError(" \n"), "ValueError"),
        (MemoryError(), "MemoryError"),
        (OSError(), "OSError"),
        (KeyError("name"), "'name'"),
    ],
    ids=repr,
)
def test_the_reason_is_one_line(error, words):
    assert reason(error) == words


def test_a_message_is_one_line():
    assert str(DfssmError("a\nb\r\nc\u2028d")) == "a b c d"
