"""What a signal does while there is nothing to remove. Imports next to nothing, as cli/entry.py."""

import os


def exit_at_once(number: int, frame: object) -> None:
    """Handler of a signal while modules are imported, and when the interpreter ends."""
    os._exit(128 + number)
