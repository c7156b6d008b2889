"""The one exception of dfssm that is a message to the user rather than a bug."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MOST = 4096  # characters; as long as a path can be


class DfssmError(Exception):
    """Something the user can mend: one line that names the thing, its value and the remedy.

    The commands print it without a traceback and exit with 1. Anything else that escapes is a bug and keeps its
    traceback. What a file or a library says may have line ends, be long, or hold what moves a terminal's cursor: the
    message does not.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text from elsewhere as one line of bounded length, with nothing that moves the cursor of a terminal."""
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", " ".join(text.splitlines()))
    return text if len(text) < 3 * _MOST else f"{text[: 2 * _MOST]} ... {text[-_MOST:]}"


def reason(error: BaseException) -> str:
    """What an error of the system or of a library says, in a line: its first one, else its type."""
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)
