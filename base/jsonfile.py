"""JSON objects in files from elsewhere, which may be missing or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .reading import read_file


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where it is missing or none."""
    try:
        return parse_object(read_file(path))
    except OSError:
        return {}


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object that a file has as its content; an empty one where it is none."""
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
