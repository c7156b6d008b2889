"""`dfssm serve`: a bundle over HTTP."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys

import click

from dfssm.opset import paths
from dfssm.opset.errors import DfssmError, reason
from dfssm.opset.extras import require

from .options import bundle_argument, real, threads_option, trust_option, whole

VARIABLE = "DFSSM_API_KEY"
PACKAGES = {"serve": ["fastapi", "uvicorn", "prometheus-client"]}


@click.command()
@bundle_argument
@click.option(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on; the default is this machine."
)
@click.option("--port", type=whole(0, 65535), default=8000, metavar="N", help="Port to listen on; 0: any free one.")
@click.option("--name", metavar="TEXT", help="Name of the model to clients; by default that of the bundle's folder.")
@click.option(
    "--api-key-file",
    type=click.Path(),
    metavar="FILE",
    help=f"Key that clients must send, on the file's first line; or set {VARIABLE}.",
)
@click.option("--max-sequences", type=whole(1, 4096), default=8, metavar="N", help="Texts that are made at a time.")
@click.option("--max-queue", type=whole(1, 1_000_000), default=64, metavar="N", help="Texts that may wait.")
@click.option(
    "--prefix-cache",
    type=whole(0),
    metavar="MB",
    help="Memory for what prompts have in common; 0: none.  [default: 16 states]",
)
@click.option("--max-prompt", type=whole(1), default=32_768, metavar="N", help="Tokens of a prompt, at most.")
@click.option("--max-tokens", type=whole(1), default=4096, metavar="N", help="Tokens of a text, at most.")
@click.option(
    "--grace",
    type=real(0, 86_400),
    default=30.0,
    metavar="SECONDS",
    help="Time that running requests get after SIGTERM or Ctrl-C.",
)
@threads_option
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Log to stdout, a JSON object a line (docs/serve.md).")
def serve(bundle, host, port, name, api_key_file, prefix_cache, grace, threads, as_json, **given) -> None:
    """Serve BUNDLE over HTTP with the API of OpenAI, for many clients at a time.

    Ends with 0 after SIGTERM or Ctrl-C.
    """
    require(PACKAGES)
    bundle = paths.bundle(bundle)
    key = _key(api_key_file)
    from dfssm.runtime import Engine, Scheduler
    from dfssm.serve.app import create_app
    from dfssm.serve.http import Server, listen
    from dfssm.serve.service import Limits

    socket = listen(host, port)
    engine = Engine.load(bundle, threads=threads)
    cache = None if prefix_cache is None else prefix_cache * 1_000_000
    scheduler = Scheduler(engine, given["max_sequences"], given["max_queue"], cache)
    limits = Limits(prompt=given["max_prompt"], tokens=given["max_tokens"])
    app = create_app(engine, scheduler, name or bundle.resolve().name, key, limits)
    _log(as_json)
    _allow_connections()
    host, port = socket.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logging.getLogger("dfssm.serve").info("serving", extra={"fields": {"url": url, "bundle": str(bundle)}})
    Server(app, scheduler, grace).run(sockets=[socket])


def _key(file: str | None) -> str | None:
    """The API key; None where none is set. DfssmError for one that no header can have."""
    if file is None:
        key = os.environ.get(VARIABLE)
    else:
        try:
            with open(paths.file(file, "a file with the API key")) as opened:
                key = opened.readline().strip()
        except (OSError, ValueError) as error:
            raise DfssmError(f"{file}: cannot be read ({reason(error)}); give a file with the API key") from None
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise DfssmError(f"the API key of {file or VARIABLE} is empty or has other characters than ASCII: give another")
    return key


class _Lines(logging.Formatter):
    """Of each record a line: its time, and its message or, as JSON, its fields."""

    def __init__(self, as_json: bool):
        super().__init__("%(asctime)s %(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {"message": record.getMessage()})
        if not self._as_json:
            line = " ".join(f"{name}={value}" for name, value in fields.items())
            return super().format(logging.makeLogRecord(record.__dict__ | {"msg": line, "args": None}))
        failed = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({"time": record.created, "level": record.levelname.lower()} | fields | failed)


def _log(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(_Lines(as_json))
    for name, level in (("dfssm.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _allow_connections() -> None:
    """As many open files as this user may have: each connection is one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
