"""Where a process of `dfssm` or `dfcompile` begins. It imports little: until its handlers are set, Ctrl-C ends in a
traceback.
"""

import signal

from .signals import exit_at_once


def dfssm() -> None:
    """The process of `dfssm`."""
    _take_signals()
    from .main import main

    main()


def dfcompile() -> None:
    """The process of `dfcompile`."""
    _take_signals()
    from .main import dfcompile

    dfcompile()


def _take_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not those that nohup ignores
            signal.signal(number, exit_at_once)
