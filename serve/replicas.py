"""The application as a deployment of Ray Serve: replicas of it, each a process with an engine of its own."""

from __future__ import annotations

import logging
import os
import signal
import threading

from fastapi import FastAPI

from dfssm.base.errors import DfssmError

from . import log
from .app import Served
from .http import listen

CLUSTER = "RAY_ADDRESS"
"""The variable by which Ray is told of a cluster that runs; without it, one is made on this machine."""
NAME = "dfssm"
"""Of the application and of its one deployment, to Ray."""
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's processes then listen on this machine alone, on Linux too."""
_PATIENCE = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
"""Three times so long may its HTTP server take to come up: here the 60 s that `serve.start` waits, by itself 15."""


def run(served: Served, host: str, port: int, least: int, most: int, grace: float, as_json: bool) -> None:
    """Serve on `host` and `port` until SIGTERM or Ctrl-C, with `least` to `most` replicas as there is work for. At the
    end running requests have `grace` seconds.
    """
    served.open()  # what is wrong with the bundle is said here, not by a replica
    with listen(host, port) as free:  # Ray says less clearly that it is not, and knows no port 0
        port = free.getsockname()[1]
    log.log_to(as_json)
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0"} | ({} if CLUSTER in os.environ else _LOOPBACK))
    os.environ.setdefault(_PATIENCE, "20")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that there is a token, each time
    cores = max(os.cpu_count() or 1, most * served.threads)
    new = {"num_cpus": cores, "object_store_memory": 100 << 20, "include_dashboard": False}
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        try:
            ray.init(log_to_driver=False, configure_logging=False, **({} if CLUSTER in os.environ else new))
            serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
            serve.run(_deployment(served, least, most, grace, as_json), name=NAME, logging_config=quiet)
        except Exception as error:  # Ray's errors have no common base but Exception
            why = str(error).partition("\n")[0].partition(". ")[0]
            raise DfssmError(
                f"Ray cannot be started ({why}): see /tmp/ray/session_latest/logs, or try again"
            ) from error
        logs = ray.get_runtime_context().worker.node.get_logs_dir_path()
        log.serving(host, port, bundle=str(served.bundle), logs=logs)
        _wait()
        serve.delete(NAME)
    finally:
        ray.shutdown()


def _deployment(served: Served, least: int, most: int, grace: float, as_json: bool) -> object:
    from ray import serve

    alone = CLUSTER not in os.environ

    def build() -> FastAPI:
        if alone:
            _listen_on_loopback()
        log.log_to(as_json)
        return served.open()[0]

    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            """A replica that makes no texts any longer is replaced."""
            if not self.app.state.scheduler.open:  # type: ignore[attr-defined]
                raise DfssmError("the scheduler has ended")

    # Beyond what a replica has room for it answers 429 by itself; these bounds are for what is on the way.
    room = 2 * (served.slots + served.queue)
    scaled = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": served.slots}
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options={"num_cpus": served.threads},
        max_ongoing_requests=room,
        max_queued_requests=room,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.1,
        **({"num_replicas": least} if least == most else {"autoscaling_config": scaled}),
    ).bind()


def _listen_on_loopback() -> None:
    """A replica has a server for other deployments, of which there are none. It listens on all addresses, asks for no
    key and unpickles what it gets, and Ray has no option for it.
    """
    from ray.serve._private import replica

    listens = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listens(server, address.replace("[::]", "127.0.0.1"))


def _wait() -> None:
    """Until SIGTERM or Ctrl-C."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(1) if ended.is_set() else ended.set())
    while not ended.wait(1):
        pass
