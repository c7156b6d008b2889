"""Tables in Markdown, and their places in a page. Standard library only."""

import re
from collections.abc import Mapping, Sequence

from .errors import DfssmError

_PLACE = re.compile(r"(<!-- measured: (?:(\w+) )?([a-z]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without a line break at its end."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["-"] * len(head), *rows])


def filled(text: str, made: Mapping[str, str], of: str = "") -> str:
    """`text` with every table in its place, between `<!-- measured: NAME -->` and `<!-- end -->`; with `of`, between
    `<!-- measured: OF NAME -->`, and the places of others stay. DfssmError for a name that no table has, and where `of`
    has no place.
    """

    def found(match: re.Match[str]) -> str:
        if of and match[2] != of:
            return match[0]
        if match[3] not in made:
            raise DfssmError(f"there is no table '{match[3]}': choose one of {', '.join(made)}")
        return f"{match[1]}{made[match[3]]}\n"

    if of and of not in [match[2] for match in _PLACE.finditer(text)]:
        name = next(iter(made))
        raise DfssmError(f"the page has no table of {of}: add <!-- measured: {of} {name} --> and <!-- end -->")
    return _PLACE.sub(found, text)
