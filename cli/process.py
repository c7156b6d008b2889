"""How every command ends: its exit status, errors in one line, an output that is closed or full."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from traceback import walk_tb
from typing import NoReturn

import click

from dfssm.base.errors import DfssmError, reason

from .signals import exit_at_once

# What the loader of libraries and torch say, who have no MemoryError.
_NO_MEMORY = re.compile("failed to map segment|cannot allocate memory|can't allocate memory", re.IGNORECASE)
_NO_PLACE = "No usable temporary directory"  # of Python's tempfile, also where torch is imported
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(command: click.Command, name: str, args: list[str] | None = None) -> NoReturn:
    """Run a command and exit: with 0; 1 for an error that the user can mend, for a failed check, and where nobody reads
    the output; 2 for wrong usage; 130 for Ctrl-C; 143 and 129 for SIGTERM and SIGHUP. A bug keeps its traceback.
    """
    with errors_in_one_line(name):
        status = command.main(args=args, prog_name=name, standalone_mode=False)
    sys.exit(status or 0)


@contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """In the `with` block, an error that is no bug ends the process as `run` says, with a line on stderr."""
    _open_standard_streams()
    try:
        with warnings.catch_warnings(), _ends_by_signal():
            warnings.showwarning = partial(_warn, name)
            yield
        sys.stdout.flush()
    except DfssmError as error:
        _exit(1, f"{name}: error: {_of_the_system(error) or error}")
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click < 8.2 prints it and ends
            _exit(error.exit_code, error.format_message())
        path = _command(error) or name
        message = " ".join(error.format_message().split())
        _exit(error.exit_code, f"{path}: error: {message.rstrip('.')}: see {path} --help")
    except (click.Abort, KeyboardInterrupt):
        _exit(130)
    except OSError as error:
        if error.errno == errno.EPIPE:
            _exit(1)
        if message := _of_the_system(error):
            _exit(1, f"{name}: error: {message}")
        if error.errno not in _FULL or error.filename is not None:
            raise
        _exit(1, f"{name}: error: the output cannot be written ({error.strerror}): make room")
    except (MemoryError, ImportError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        _exit(1, f"{name}: error: there is too little memory ({reason(error)}): free some, or ask for less")


@contextmanager
def _ends_by_signal() -> Iterator[None]:
    """In the `with` block a signal ends the process as an error would, so that drafts are removed: Ctrl-C, SIGTERM and
    SIGHUP. One that is ignored, as under nohup, or handled stays so.
    """

    def end(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: end, signal.SIGHUP: end}
        for number, handler in handlers.items():
            if signal.getsignal(number) in (signal.SIG_DFL, exit_at_once):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def _command(error: click.ClickException) -> str:
    """The command that an error is about. One about an option without its value does not say: there it is the one
    whose options were being read.
    """
    frames = (frame.f_locals.get("ctx") for frame, _ in walk_tb(error.__traceback__))
    contexts = [getattr(error, "ctx", None), *reversed([ctx for ctx in frames if isinstance(ctx, click.Context)])]
    return next((context.command_path for context in contexts if context), "")


def _of_the_system(error: BaseException | None) -> str:
    """What to say where too many open files are behind an error, or no folder for temporary ones, whatever that says
    itself; else "".
    """
    while error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"too many files are open, {limit} may be: raise the limit, with ulimit -n 1024"
        if isinstance(error, OSError) and str(error.strerror).startswith(_NO_PLACE):
            return "there is no folder for temporary files that can be written to: set TMPDIR to one"
        error = error.__cause__ or error.__context__
    return ""


def _warn(name: str, message: Warning | str, *_: object) -> None:
    click.echo(f"{name}: warning: {' '.join(str(message).split())}", err=True)


def _open_standard_streams() -> None:
    """Where the shell has closed stdin, stdout or stderr, /dev/null takes its place: the next file that is opened would
    get its number, and what a library prints would be written there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a path that is not UTF-8, say; as stderr has it


def _exit(status: int, message: str = "") -> NoReturn:
    """Write what stdout still holds, then the message to stderr, and exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is sys.stderr and message:
                click.echo(message, err=True)
            stream.flush()
        except OSError:  # leave nothing that the interpreter would try to write at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(status) from None
