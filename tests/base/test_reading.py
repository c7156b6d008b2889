"""Files that others may have put where one is read."""

import os

import pytest

from dfssm.base.reading import open_file, read_file, read_text


def test_a_regular_file_is_read_whole_and_a_link_followed(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "link") == b"\xef\xbb\xbfone\r\ntwo"
    assert read_text(tmp_path / "link", "utf-8-sig") == "one\ntwo"
    folder = os.open(tmp_path, os.O_RDONLY)
    with open_file("a", folder) as file:
        assert file.read(4) == b"\xef\xbb\xbfo"
    os.close(folder)


def test_what_is_no_regular_file_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="no regular file"):
            read_file(path)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


def test_a_file_that_says_to_have_no_bytes_is_empty(tmp_path):
    """Those of /proc, of which some wait for what comes (kmsg) or never end."""
    (tmp_path / "empty").touch()
    assert read_file(tmp_path / "empty") == read_file("/proc/self/status") == b""
