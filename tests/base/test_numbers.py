"""Times for people."""

import pytest

from dfssm.base.numbers import duration


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (42.4, "42 s"), (59.6, "1 min 0 s"), (303, "5 min 3 s"), (3600, "1 h 0 min"), (22350, "6 h 12 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
