"""Load on a running `dfssm serve`: are the texts those that the engine makes alone, how long do they take, what grows.

python tests/tools/load.py clients BUNDLE [--clients 8] [--requests 500] [--tokens 32]
python tests/tools/load.py killed BUNDLE [--replicas 2]           and after a third of the requests a replica is killed
python tests/tools/load.py scaled BUNDLE --replicas 1 --max-replicas 2    until there are as many replicas as may be
python tests/tools/load.py overload BUNDLE [--seconds 600]        twice as many clients as there is room for
python tests/tools/load.py idle BUNDLE [--connections 2000]       while a few clients ask
python tests/tools/load.py batching BUNDLE [--slots 8]            many texts at a time against one at a time, no HTTP

Each starts a server of its own on loopback, by Ray with so many --replicas, prints one JSON object, and ends with 1
where a text is wrong or missing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import signal
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

QUEUE = 16

DEFAULTS = {
    "clients": 8, "requests": 500, "tokens": 32, "seconds": 600, "connections": 2000, "threads": 1, "rounds": 7,
    "replicas": 0, "max_replicas": 0, "slots": 8, "temperature": 0.0,
}  # fmt: skip


def options(**others: float) -> argparse.Namespace:
    """What is not given is as on the command line."""
    return argparse.Namespace(**DEFAULTS | others)


@contextmanager
def server(bundle: str, given: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server."""
    limits = ["--max-sequences", str(given.slots), "--max-queue", str(QUEUE), "--threads", str(given.threads)]
    most = max(given.replicas, given.max_replicas)
    by = ["--ray", "--replicas", str(given.replicas), "--max-replicas", str(most)] if given.replicas else []
    command = [sys.executable, "-m", "dfssm.cli.main", "serve", bundle, "--port", "0", "--json", *limits, *by]
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
    """`count` clients ask with the seeds that `more(client)` gives, until None. Status 0: no answer, or half of one."""
    found: list[tuple[int, int, str, float]] = []
    begun: list[float] = []
    lock = threading.Lock()

    def client(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while (seed := more(index)) is not None:
            begin = time.perf_counter()
            try:
                status, text = ask(connection, job(seed, tokens))
            except (OSError, http.client.HTTPException, AssertionError):
                connection.close()
                status, text = 0, ""
            with lock:
                found.append((seed, status, text, time.perf_counter() - begin))
                begun.append(begin)
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
        "begun": begun,
        "seconds": seconds,
        "answers": dict(Counter(str(status) for _, status, _, _ in found)),
        "p50_seconds": statistics.median(times),
        "p99_seconds": times[int(0.99 * len(times))],
        "memory_bytes": memory,
    }


def checked(engine: Engine, run: dict[str, Any], tokens: int, asked: int) -> dict[str, Any]:
    """The run without its texts, which are compared with those of the engine alone."""
    found, memory, _ = run.pop("found"), run.pop("memory_bytes"), run.pop("begun")
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
    with server(bundle, given) as (port, pid):
        warm(port, given.tokens)
        run = clients(port, pid, given.clients, lambda index: left[index].pop() if left[index] else None, given.tokens)
    return checked(engine, run, given.tokens, given.clients * given.requests)


def warm(port: int, tokens: int) -> None:
    """What is made at the first use is no growth."""
    for seed in range(16):
        ask(http.client.HTTPConnection("127.0.0.1", port), job(seed, tokens))


def run_killed(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    """Only requests that ran when the replica was killed may fail: those that began before it, one a client at most."""
    count = given.clients * given.requests
    left, killed = list(range(count)), [math.inf]

    def more(_: int) -> int | None:
        with lock:
            if len(left) <= 2 * count // 3 and killed[0] == math.inf:
                killed[0] = time.perf_counter()
                os.kill(replicas(pid)[0], signal.SIGKILL)
            return left.pop() if left else None

    lock = threading.Lock()
    with server(bundle, given) as (port, pid):
        warm(port, given.tokens)
        open_to_others = [address for process in tree(pid) for address in listening(process) if address != "127.0.0.1"]
        run = clients(port, pid, given.clients, more, given.tokens)
        end = time.monotonic() + 60
        while len(replicas(pid)) < given.replicas and time.monotonic() < end:
            time.sleep(0.2)
        again = len(replicas(pid))
    failed = [
        begin for begin, (_, status, _, _) in zip(run["begun"], run["found"], strict=True) if status not in (200, 429)
    ]
    late = sum(begin > killed[0] for begin in failed)
    answers = run["answers"]
    found = checked(engine, run, given.tokens, count)
    passed = not (found["wrong"] or late or open_to_others) and len(failed) <= given.clients and again == given.replicas
    return found | {
        "passed": passed, "answers": answers, "failed": len(failed), "failed_late": late, "replicas_again": again,
        "addresses": open_to_others,
    }  # fmt: skip


def run_scaled(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    """Three times as many clients as a replica makes texts for ask until others have been started, and 10 s longer."""
    asked, there, end = [0], [0], [time.monotonic() + given.seconds]
    lock = threading.Lock()

    def more(client: int) -> int | None:
        if client == 0 and there[-1] < given.max_replicas:  # one look at all processes at a time
            there.append(len(replicas(pid)))
            if there[-1] == given.max_replicas:
                end[0] = min(end[0], time.monotonic() + 10)
        with lock:
            asked[0] += 1
        return asked[0] % 500 if time.monotonic() < end[0] else None

    with server(bundle, given) as (port, pid):
        begun = len(replicas(pid))
        run = clients(port, pid, 3 * given.slots, more, given.tokens)
    found = checked(engine, run, given.tokens, len(run["found"]))
    scaled = begun == given.replicas and there[-1] == given.max_replicas
    return found | {"passed": found["passed"] and scaled, "replicas_begun": begun, "replicas_then": there[-1]}


def run_overload(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    asked, end = [0], time.monotonic() + given.seconds
    lock = threading.Lock()

    def more(_: int) -> int | None:
        with lock:
            asked[0] += time.monotonic() < end
        return asked[0] % 500 if time.monotonic() < end else None

    with server(bundle, given) as (port, pid):
        run = clients(port, pid, 2 * (given.slots + QUEUE), more, given.tokens)
    return checked(engine, run, given.tokens, len(run["found"]))


def run_idle(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    left = list(range(100))
    with server(bundle, given) as (port, pid):
        before = anonymous(pid)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(given.connections)]
        run = clients(port, pid, 4, lambda _: left.pop() if left else None, given.tokens)
        taken = anonymous(pid) - before
        with suppress(OSError):
            for connection in idle:
                connection.close()
    return checked(engine, run, given.tokens, 100) | {"idle": len(idle), "memory_of_all_bytes": taken}


def run_batching(engine: Engine, bundle: str, given: argparse.Namespace) -> dict[str, Any]:
    """By turns texts, 2 one at a time, then 2 * `slots` together, and steps of the engine alone, of 1 and `slots` rows.
    Tokens a second are medians. `engine_ratio` is what the engine allows: without choosing and text.
    """
    options = {"max_tokens": given.tokens, "ignore_eos": True, "temperature": given.temperature, "seed": 1}
    slots = engine.slots(given.slots)
    places = [slots.join() for _ in range(given.slots)]
    rates: dict[str, list[float]] = {name: [] for name in ("alone", "together", "engine_alone", "engine_together")}
    for _ in range(given.rounds):
        begin = time.perf_counter()
        for _ in range(2):
            text = "".join(engine.generate("Once upon a time", **options))
        rates["alone"].append(2 * given.tokens / (time.perf_counter() - begin))
        with Scheduler(engine, given.slots) as scheduler:
            begin = time.perf_counter()
            requests = [scheduler.submit("Once upon a time", **options) for _ in range(2 * given.slots)]
            passed = all("".join(request) == text for request in requests)
            rates["together"].append(2 * given.slots * given.tokens / (time.perf_counter() - begin))
        for name, rows in (("engine_alone", 1), ("engine_together", given.slots)):
            begin = time.perf_counter()
            for _ in range(given.tokens):
                slots.read(places[:rows], [[1]] * rows)
            rates[name].append(rows * given.tokens / (time.perf_counter() - begin))
    ratios = [both / one for both, one in zip(rates["together"], rates["alone"], strict=True)]
    limits = [both / one for both, one in zip(rates["engine_together"], rates["engine_alone"], strict=True)]
    found = {f"{name}_tok_s": statistics.median(values) for name, values in rates.items()}
    found |= {"ratio": statistics.median(ratios), "engine_ratio": statistics.median(limits)}
    return {"passed": passed, "slots": given.slots, **found, "ratios": ratios}


def anonymous(pid: int) -> int:
    """Resident memory, that no file backs, of a process or, of one with replicas, of these together."""
    return sum(int(status(process).get("RssAnon", "0 kB").split()[0]) * 1024 for process in replicas(pid) or [pid])


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status; {} of one that has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {}


def tree(pid: int) -> list[int]:
    """The process and those that it started, and they, and so on."""
    parents = {int(path.name): status(int(path.name)).get("PPid") for path in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == str(one)]
    return found


def replicas(pid: int) -> list[int]:
    """The processes of Ray's replicas."""
    found = []
    for process in tree(pid):
        with suppress(OSError):
            if b"ServeReplica" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def listening(pid: int) -> list[str]:
    """The addresses that a process listens on."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    found = []
    for name, local in (("tcp", "0100007F"), ("tcp6", "0" * 24 + "01000000")):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                address = fields[1].split(":")[0]
                mapped = address == "0" * 16 + "FFFF0000" + "0100007F"
                found.append("127.0.0.1" if address == local or mapped else address)
    return found


def main() -> None:
    runs = {
        "clients": run_clients,
        "killed": run_killed,
        "scaled": run_scaled,
        "overload": run_overload,
        "idle": run_idle,
        "batching": run_batching,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=runs)
    parser.add_argument("bundle")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    run = runs[given.what](Engine.load(given.bundle, threads=given.threads), given.bundle, given)
    print(json.dumps(run))
    sys.exit(not run["passed"])


if __name__ == "__main__":
    main()
