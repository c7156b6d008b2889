"""Every option that takes a number: what it refuses, and that the refusal is one line which names the bounds."""

import math

import click
import pytest
from examples_as_modules import load

from dfssm.cli.compile import command as dfcompile
from dfssm.cli.main import dfssm
from dfssm.cli.options import Number
from dfssm.cli.process import run

EXAMPLE = "01_train_teacher.py"


def commands(command, path):
    """(words, command) of a command and of all below it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), [*path, name])
    else:
        yield path, command


FOUND = [
    *commands(dfssm, ["dfssm"]),
    *commands(dfcompile, ["dfcompile"]),
    *commands(load(EXAMPLE).train_teacher, [EXAMPLE]),
]
NUMBERS = [
    pytest.param(path, command, option, id=f"{' '.join(path)} {option.opts[0]}")
    for path, command in FOUND
    for option in command.params
    if isinstance(option.type, Number)
]


def test_no_number_is_without_bounds():
    """Neither click's own types, nor those that it guesses from a default."""
    loose = (click.types.IntParamType, click.types.FloatParamType)
    assert len(NUMBERS) > 50
    assert [(path, p.opts) for path, command in FOUND for p in command.params if isinstance(p.type, loose)] == []


@pytest.mark.parametrize("path, command, option", NUMBERS)
def test_what_it_takes_and_refuses(path, command, option, capsys):
    kind, flag = option.type, option.opts[0]
    context = click.Context(command)
    assert math.isfinite(kind.least) and math.isfinite(kind.most)
    for value in (kind.least, kind.most):
        assert kind.convert(str(value), option, context) == value
    beyond = [kind.least - 1, kind.most + 1] if kind.kind is int else [kind.least - 1, kind.most * 2]
    for value in [*beyond, "nan", "inf", "-inf", "x", "", 10**30, -(10**30), "9" * 5000]:
        with pytest.raises(SystemExit) as end:
            run(command, "it", [f"{option.opts[-1]}={value}"])
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"it: error: Invalid value for '{flag}'")
        assert f"{kind.least:,} to {kind.most:,}" in err


def test_defaults_are_within_their_bounds():
    for path, command in FOUND:
        for option in command.params:
            if isinstance(option.type, Number) and isinstance(option.default, int | float):
                assert option.type.least <= option.default <= option.type.most, (path, option.opts)
