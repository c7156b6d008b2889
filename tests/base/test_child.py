"""A process for what a file from elsewhere decides: it answers, and whatever ends it is an error here."""

import os
import signal
import sys
import threading
import time

import pytest

from dfssm.base import child
from dfssm.base.child import Child, ChildError


def work(request):
    match request:
        case ["abort"]:
            os.abort()
        case ["exit", status]:
            os._exit(status)
        case ["hang"]:
            time.sleep(1000)
        case ["nap", seconds]:
            time.sleep(seconds)
        case ["spin", seconds]:
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
        case ["spin in C"]:
            sum(range(10**12))
        case ["memory", size]:
            return len(bytearray(size))
        case ["raise", text]:
            raise ValueError(text)
        case ["print", text]:
            os.write(1, text.encode())
            print(text)
    return [os.getpid(), request]


@pytest.fixture
def ask(monkeypatch):
    """A process with a second of the processor's time for each request."""
    monkeypatch.setattr(child, "SECONDS", 1.0)
    with Child(__name__, "work") as one:
        yield one.ask


@pytest.fixture
def ask_soon(monkeypatch):
    """One with a second by the clock."""
    monkeypatch.setattr(child, "WAIT", 1.0)
    with Child(__name__, "work") as one:
        yield one.ask


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file, for the child to import."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    monkeypatch.setattr(sys.modules[__name__], "__name__", "test_child")


def test_one_process_answers_until_it_ends(ask):
    first = ask("é\ud800")
    assert first == [first[0], "é\ud800"] and first[0] != os.getpid()
    assert ask(["print", '{"answer": 3}\n'])[0] == ask(2)[0] == first[0]
    with pytest.raises(ChildError, match="^one$"):
        ask(["raise", "one\ntwo"])
    assert ask(3) == [first[0], 3]
    with pytest.raises(ChildError):
        ask(["exit", 3])
    again = ask(4)
    assert again == [again[0], 4] and again[0] != first[0]


@pytest.mark.parametrize(
    "request_, words",
    [
        (["abort"], "it ends the process that tries it: SIGABRT"),
        (["exit", 3], "it ends the process that tries it: status 3"),
        (["spin in C"], "it takes more than 1 s"),
        (["memory", 1 << 40], "MemoryError"),
        (["raise", ""], "ValueError"),
    ],
)
def test_whatever_ends_it_is_an_error(ask, request_, words):
    with pytest.raises(ChildError, match=f"^{words}$"):
        ask(request_)


def test_an_interrupted_request_leaves_no_answer_for_the_next(ask):
    """Ctrl-C while it waits: the process would answer the first request at the second."""
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        first = ask(1)[0]
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            ask(["nap", 0.5])
        again = ask(2)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert again == [again[0], 2] and again[0] != first


def test_it_ends_with_its_block_and_at_the_end_of_its_user():
    with Child(__name__, "work") as one:
        pid = one.ask(1)[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    one = Child(__name__, "work")
    pid = one.ask(1)[0]
    one._process.stdin.close()  # as when the user is killed
    assert one._process.wait(timeout=60) == 0
    one._process.stdout.close()


def test_what_waits_ends_by_the_clock(ask_soon):
    with pytest.raises(ChildError, match="^it takes more than 1 s$"):
        ask_soon(["hang"])


def test_time_that_others_take_is_not_its_own(ask):
    """As on a busy machine, where it waits for its turn; and each request has its second anew."""
    for request in (["nap", 1.2], ["spin", 0.4], ["spin", 0.4], ["spin", 0.4]):
        assert ask(request)[1] == request


def test_an_alarm_that_its_user_ignores_ends_it(ask_soon):
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        with pytest.raises(ChildError, match="it takes more than 1 s"):
            ask_soon(["hang"])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.signal(signal.SIGALRM, before)


def test_no_python_to_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Child(__name__, "work") as one, pytest.raises(ChildError, match="^no process can be started .*: No such file"):
        one.ask(1)


def test_a_module_of_the_working_directory_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with Child(__name__, "work") as one:
        assert one.ask(1)[1] == 1


def test_threads_may_have_one_each():
    answers = []

    def run(number):
        with Child("test_child", "work") as one:
            answers.append(one.ask(number)[1])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [0, 1, 2]
