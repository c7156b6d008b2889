"""The entry points of `dfssm` and `dfcompile`."""

from __future__ import annotations

from importlib import import_module

import click

from .process import errors_in_one_line, run

# name -> module of this folder, attribute. A module is imported when its command is called: `dfssm --help` is
# quick and needs nothing but click, and no command waits for torch unless it uses it.
COMMANDS = {
    "run": (".run", "run"),
    "serve": (".serve", "serve"),
    "bench": (".bench", "bench"),
    "eval": (".eval", "evaluate"),
    "compare": (".compare", "compare"),
    "verify": (".verify", "verify"),
    "inspect": (".inspect", "inspect"),
    "analyze": (".analyze", "analyze"),
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


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="dfssm")
def dfssm() -> None:
    """Tools for 1-bit Mamba-2 language models (DF-SSM). The command dfcompile compiles a model into a bundle."""


def main(args: list[str] | None = None) -> None:
    """Entry point of `dfssm`; always exits."""
    run(dfssm, "dfssm", args)


def dfcompile(args: list[str] | None = None) -> None:
    """Entry point of `dfcompile`; always exits. Whatever the failure, no bundle is left behind."""
    with errors_in_one_line("dfcompile"):
        from .compile import command
    run(command, "dfcompile", args)


if __name__ == "__main__":
    main()
