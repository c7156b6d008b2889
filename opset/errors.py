"""The one exception of dfssm that is a message to the user rather than a bug."""


class DfssmError(Exception):
    """Something the user can mend: one line that names the thing, its value and the remedy.

    The commands print it without a traceback and exit with 1. Anything else that escapes is a bug and keeps its
    traceback. What a file or a library says may have line ends: the message has none.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def reason(error: BaseException) -> str:
    """What an error of the system or of a library says, in a line: its first one, else its type."""
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)
