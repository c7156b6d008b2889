"""Load on a running `dfssm serve`: are the texts those that the engine makes alone, how long do they take, what grows.

python tests/tools/load.py clients BUNDLE [--clients 8] [--requests 500] [--tokens 32]
python tests/tools/load.py overload BUNDLE [--seconds 600]        twice as many clients as there is room for
python tests/tools/load.py idle BUNDLE [--connections 2000]       while a few clients ask
python tests/tools/load.py batching BUNDLE [--tokens 64]          many texts at a time against one at a time, no HTTP

Each starts a server of its own on loopback, prints one JSON object, and ends with 1 where a text is wrong or missing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dfssm.runtime import Engine, Scheduler

SLOTS, QUEUE = 8, 16


@contextmanager
def server(bundle: str, threads: int) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server."""
    limits = ["--max-sequences", str(SLOTS), "--max-queue", str(QUEUE), "--threads", str(threads)]
    command = [sys.executable, "-m", "dfssm.cli.main", "serve", bundle, "--port", "0", "--json", *limits]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    port = urlsplit(json.loads(process.stdout.readline())["url"]).port
    assert port
    log = threading.Thread(target=lambda: [None for _ in process.stdout or ()])
    log.start()
    try:
        yield port, process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0
        log.join()


def job(seed: int, tokens: int) -> dict[str, Any]:
    """A request of its own for each seed."""
    rng = np.random.default_rng(seed)
    words = " ".join(
        rng.choice(["Once", "upon", "a", "time", "Tom", "and", "Lily", "saw", "the", "cat"], 1 + seed % 40)
    )
    return {"prompt": words, "max_tokens": 1 + seed % tokens, "temperature": seed % 2, "seed": seed}


def expected(engine: Engine, seed: int, tokens: int) -> str:
    body = job(seed, tokens)
    return "".join(engine.generate(body.pop("prompt"), **body))


def ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text. Every third request is a stream."""
    stream = body["seed"] % 3 == 0
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream": stream}), {"content-type": "application/json"}
    )
    answer = connection.getresponse()
    content = answer.read().decode()
    if answer.status != 200:
        return answer.status, ""
    if not stream:
        return 200, json.loads(content)["choices"][0]["text"]
    events = [event.removeprefix("data: ") for event in content.split("\n\n") if event]
    assert events.pop() == "[DONE]", content
    return 200, "".join(json.loads(event)["choices"][0]["text"] for event in events)


def clients(port: int, pid: int, count: int, more: Callable[[int], int | None], tokens: int) -> dict[str, Any]:
    """`count` clients ask with the seeds that `more(client)` gives, until None."""
    found: list[tuple[int, int, str, float]] = []
    lock = threading.Lock()

    def client(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while (seed := more(index)) is not None:
            begin = time.perf_counter()
            status, text = ask(connection, job(seed, tokens))
            with lock:
                found.append((seed, status, text, time.perf_counter() - begin))
            if status == 429:
                time.sleep(0.05)

    memory = [anonymous(pid)]
    threads = [threading.Thread(target=client, args=(index,)) for index in range(count)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(anonymous(pid))
    seconds = time.perf_counter() - begin
    times = sorted(taken for _, status, _, taken in found if status == 200)
    return {
        "found": found,
        "seconds": seconds,
        "answers": dict(Counter(str(status) for _, status, _, _ in found)),
        "p50_seconds": statistics.median(times),
        "p99_seconds": times[int(0.99 * len(times))],
        "memory_bytes": memory,
    }


def checked(engine: Engine, run: dict[str, Any], tokens: int, asked: int) -> dict[str, Any]:
    """The run without its texts, which are compared with those of the engine alone."""
    found, memory = run.pop("found"), run.pop("memory_bytes")
    texts = {seed: expected(engine, seed, tokens) for seed in {seed for seed, *_ in found}}
    wrong = sum(text != texts[seed] for seed, status, text, _ in found if status == 200)
    half = memory[len(memory) // 2 :]
    return {
        "passed": not wrong and len(found) == asked and set(run["answers"]) <= {"200", "429"},
        "asked": asked,
        "wrong": wrong,
        **run,
        "memory_bytes": memory[-1],
        "grown_bytes_second_half": half[-1] - half[0],
    }


def run_clients(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    left = {index: list(range(index, given.clients * given.requests, given.clients)) for index in range(given.clients)}
    with server(bundle, given.threads) as (port, pid):
        for seed in range(8):  # what is made at the first use is no growth
            ask(http.client.HTTPConnection("127.0.0.1", port), job(seed, given.tokens))
        run = clients(port, pid, given.clients, lambda index: left[index].pop() if left[index] else None, given.tokens)
    return checked(engine, run, given.tokens, given.clients * given.requests)


def run_overload(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    asked, end = [0], time.monotonic() + given.seconds
    lock = threading.Lock()

    def more(_: int) -> int | None:
        with lock:
            asked[0] += time.monotonic() < end
        return asked[0] % 500 if time.monotonic() < end else None

    with server(bundle, given.threads) as (port, pid):
        run = clients(port, pid, 2 * (SLOTS + QUEUE), more, given.tokens)
    return checked(engine, run, given.tokens, len(run["found"]))


def run_idle(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    left = list(range(100))
    with server(bundle, given.threads) as (port, pid):
        before = anonymous(pid)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(given.connections)]
        run = clients(port, pid, 4, lambda _: left.pop() if left else None, given.tokens)
        taken = anonymous(pid) - before
        with suppress(OSError):
            for connection in idle:
                connection.close()
    return checked(engine, run, given.tokens, 100) | {"idle": len(idle), "memory_of_all_bytes": taken}


def run_batching(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    """Greedy texts: 2 one at a time, then 2 * SLOTS together, in turns; tokens a second of the medians."""
    options = {"max_tokens": given.tokens, "ignore_eos": True}
    alone, together = [], []
    for _ in range(given.rounds):
        begin = time.perf_counter()
        for _ in range(2):
            text = "".join(engine.generate("Once upon a time", **options))
        alone.append(2 * given.tokens / (time.perf_counter() - begin))
        with Scheduler(engine, SLOTS) as scheduler:
            begin = time.perf_counter()
            requests = [scheduler.submit("Once upon a time", **options) for _ in range(2 * SLOTS)]
            passed = all("".join(request) == text for request in requests)
            together.append(2 * SLOTS * given.tokens / (time.perf_counter() - begin))
    ratios = [both / one for both, one in zip(together, alone, strict=True)]
    rates = {"alone_tok_s": statistics.median(alone), "together_tok_s": statistics.median(together)}
    return {"passed": passed, "slots": SLOTS, **rates, "ratio": statistics.median(ratios), "ratios": ratios}


def anonymous(pid: int) -> int:
    """Resident memory of a process that no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    runs = {"clients": run_clients, "overload": run_overload, "idle": run_idle, "batching": run_batching}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=runs)
    parser.add_argument("bundle")
    for name, value in (
        ("clients", 8), ("requests", 500), ("tokens", 32), ("seconds", 600), ("connections", 2000), ("threads", 1),
        ("rounds", 7),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    run = runs[given.what](Engine.load(given.bundle, threads=given.threads), given.bundle, given)
    print(json.dumps(run))
    sys.exit(not run["passed"])


if __name__ == "__main__":
    main()
