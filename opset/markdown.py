"""Tables in Markdown, and their places in a page. Standard library only."""

import re
from collections.abc import Mapping, Sequence

from .errors import DfssmError

_PLACE = re.compile(r"(<!-- measured: ([a-z]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without a line break at its end."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["-"] * len(head), *rows])


def filled(text: str, made: Mapping[str, str]) -> str:
    """`text` with every table in its place, between `<!-- measured: NAME -->` and `<!-- end -->`. DfssmError for a
    name that no table has.
    """

    def found(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise DfssmError(f"there is no table '{match[2]}': choose one of {', '.join(made)}")
        return f"{match[1]}{made[match[2]]}\n"

    return _PLACE.sub(found, text)
