"""The log of a server: a line for each record, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys

from dfssm.base.errors import one_line


class Lines(logging.Formatter):
    """Of each record a line: its time, and its message or, as JSON, its fields."""

    def __init__(self, as_json: bool):
        super().__init__("%(asctime)s %(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {"message": record.getMessage()})
        if not self._as_json:
            line = one_line(" ".join(f"{name}={value}" for name, value in fields.items()))  # a path may have anything
            return super().format(logging.makeLogRecord(record.__dict__ | {"msg": line, "args": None}))
        failed = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({"time": record.created, "level": record.levelname.lower()} | fields | failed)


def log_to(as_json: bool) -> None:
    """Log to stderr or, as JSON, to stdout."""
    handler = logging.StreamHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(Lines(as_json))
    for name, level in (("dfssm.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def serving(host: str, port: int, **fields: object) -> None:
    """The first line: where the server listens, and what it serves."""
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logging.getLogger("dfssm.serve").info("serving", extra={"fields": {"url": url} | fields})
