"""A server in a thread of the tests, on a free port."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

from dfssm.runtime import Engine, Scheduler
from dfssm.serve.app import create_app
from dfssm.serve.http import Server, listen
from dfssm.serve.service import Limits

LIMITS = Limits(body=20_000, body_seconds=0.5, prompt=3000, tokens=400, texts=16, stops=4)
POST = {"content-type": "application/json"}


@dataclass
class Running:
    engine: Engine
    scheduler: Scheduler
    port: int
    server: Server

    def ask(self, path, body=None, headers=None):
        """(status, JSON or text, headers) of a request, a POST where there is a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, content, headers or (POST if body is not None else {})
        )
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        kind = answer.headers.get_content_type()
        return answer.status, json.loads(text) if kind == "application/json" else text, answer.headers

    def text(self, prompt, **body):
        status, answer, _ = self.ask("/v1/completions", {"prompt": prompt, **body})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def until(self, condition):
        """Wait for what another thread does."""
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


@contextmanager
def serving(engine, key=None, limits=LIMITS, grace=0.5, **options):
    scheduler, socket = Scheduler(engine, **options), listen("127.0.0.1", 0)
    server = Server(create_app(engine, scheduler, "tiny", key, limits), scheduler, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    running = Running(engine, scheduler, socket.getsockname()[1], server)
    running.until(lambda: server.started)
    try:
        yield running
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
