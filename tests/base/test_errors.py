"""Errors of the system and of libraries, as a part of one line of ours."""

import errno

import pytest

from dfssm.base import DfssmError
from dfssm.base.errors import reason


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


def test_a_message_moves_no_cursor_and_has_an_end():
    """What it quotes is from elsewhere: names of tensors and columns, values of a configuration."""
    assert str(DfssmError("red \x1b[31m bell\a nothing\0 \x9b é😀\udce9")) == (
        r"red \x1b[31m bell\x07 nothing\x00 \x9b é😀" + "\udce9"
    )
    text = str(DfssmError(f"b: unknown key {'k' * 10**6}: compile again"))
    assert len(text) < 13_000 and text.startswith("b: unknown key k") and text.endswith("k: compile again")
