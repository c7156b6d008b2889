"""`dfssm`: the group of subcommands, and how errors end."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

import click

from dfssm.opset.errors import DfssmError

# name -> module of this folder, attribute. A module is imported when its command is called: `dfssm --help` is
# quick and needs nothing but click, and no command waits for torch unless it uses it.
COMMANDS = {
    "run": (".run", "run"),
    "bench": (".bench", "bench"),
    "eval": (".eval", "evaluate"),
    "compare": (".compare", "compare"),
    "inspect": (".inspect", "inspect"),
    "doctor": (".doctor", "doctor"),
    "init": (".student", "init"),
    "convert": (".student", "convert"),
    "distill": (".distill", "distill"),
}


class LazyGroup(click.Group):
    """A click group whose commands are looked up in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        return getattr(import_module(module, __package__), attribute)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dfssm")
def dfssm() -> None:
    """Run, measure and inspect DF-SSM models. `dfcompile` makes the bundles."""


def main(args: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0; 1 for an error of the user's to mend, a failed check, or a pipe that nobody
    reads on; 2 for wrong usage; 130 for Ctrl-C. A bug keeps its traceback.
    """
    try:
        code = dfssm.main(args=args, prog_name="dfssm", standalone_mode=False)
        _flush()
    except DfssmError as error:
        code = fail(f"dfssm: error: {error}", 1)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = fail("", 130)
    except BrokenPipeError:
        # Nobody reads on: leave nothing in the buffer that the interpreter would try to write at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1  # as click does where it meets this first
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = fail(f"dfssm: error: the output cannot be written ({error.strerror}): make room", 1)
    sys.exit(code or 0)


def _flush() -> None:
    if sys.stdout is not None:  # as it is where the shell has closed it
        sys.stdout.flush()


def fail(message: str, code: int) -> int:
    """Print `message` to stderr, after what stdout still holds, and return `code`."""
    _flush()
    click.echo(message, err=True)
    return code


if __name__ == "__main__":
    main()
