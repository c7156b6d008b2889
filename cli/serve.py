"""`dfssm serve`: a bundle over HTTP."""

from __future__ import annotations

import os
import resource
from dataclasses import replace

import click

from dfssm.base import paths
from dfssm.base.errors import DfssmError, reason
from dfssm.base.extras import require
from dfssm.base.reading import read_text
from dfssm.base.threads import default_threads

from .options import bundle_argument, real, threads_option, trust_option, whole

VARIABLE = "DFSSM_API_KEY"
PACKAGES = {"serve": ["fastapi", "uvicorn", "prometheus-client"]}
RAY = {"ray": ["ray"]}


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
@click.option("--ray", "use_ray", is_flag=True, help="Serve with Ray: several processes, on this machine or on many.")
@click.option("--replicas", type=whole(1, 4096), metavar="N", help="With --ray: processes.  [default: 1]")
@click.option(
    "--max-replicas",
    type=whole(1, 4096),
    metavar="N",
    help="With --ray: as many as N processes under load.  [default: --replicas]",
)
@threads_option
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Log to stdout, a JSON object a line (docs/serve.md).")
def serve(
    bundle, host, port, name, api_key_file, prefix_cache, grace, use_ray, replicas, max_replicas, threads, as_json,
    **given,
) -> None:  # fmt: skip
    """Serve BUNDLE over HTTP with the API of OpenAI, for many clients at a time.

    Ends with 0 after SIGTERM or Ctrl-C.
    """
    if not use_ray and (replicas or max_replicas):
        raise click.UsageError("--replicas and --max-replicas are for --ray.")
    replicas = replicas or 1
    max_replicas = max_replicas or replicas
    if max_replicas < replicas:
        raise click.UsageError(f"--max-replicas {max_replicas} is less than --replicas {replicas}.")
    require(PACKAGES, RAY if use_ray else {})
    bundle = paths.bundle(bundle)
    key = _key(api_key_file)
    from dfssm.serve import log
    from dfssm.serve.app import Served
    from dfssm.serve.http import Server, listen
    from dfssm.serve.service import Limits

    served = Served(
        bundle=bundle.absolute(),
        name=os.fsencode(name or bundle.resolve().name).decode(errors="replace"),  # JSON takes no other bytes
        key=key,
        threads=threads or default_threads(),
        slots=given["max_sequences"],
        queue=given["max_queue"],
        prefix_cache=None if prefix_cache is None else prefix_cache * 1_000_000,
        limits=Limits(prompt=given["max_prompt"], tokens=given["max_tokens"]),
    )
    _allow_connections()
    if use_ray:
        from dfssm.serve.replicas import run

        served = replace(served, threads=threads or max(1, served.threads // max_replicas))
        run(served, host, port, replicas, max_replicas, grace, as_json)
        return
    socket = listen(host, port)
    app, scheduler = served.open()
    log.log_to(as_json)
    log.serving(*socket.getsockname()[:2], bundle=str(bundle))
    Server(app, scheduler, grace).run(sockets=[socket])


def _key(file: str | None) -> str | None:
    """The API key; None where none is set. DfssmError for one that no header can have."""
    if file is None:
        key = os.environ.get(VARIABLE)
    else:
        try:
            key = read_text(paths.file(file, "a file with the API key")).partition("\n")[0].strip()
        except (OSError, ValueError) as error:
            raise DfssmError(f"{file}: cannot be read ({reason(error)}); give a file with the API key") from None
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise DfssmError(f"the API key of {file or VARIABLE} is empty or has other characters than ASCII: give another")
    return key


def _allow_connections() -> None:
    """As many open files as this user may have: each connection is one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
