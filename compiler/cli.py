"""The command `dfcompile`."""

import json
import sys
from collections.abc import Callable
from typing import Self

import click
from tqdm import tqdm

from dfssm.opset import DfssmError
from dfssm.targets import TARGETS, get_target

from .pipeline import Report, Request, compile_model


def _options_of_targets(command: Callable[..., None]) -> Callable[..., None]:
    """Adds a flag for every option that some target declares; one that is not given is None or False."""
    declared = [(target, option) for target in TARGETS for option in get_target(target).OPTIONS]
    for target, option in reversed(declared):  # as decorators are applied
        is_flag, is_path = option.default is False, option.default is None
        default = option.default_text or ("" if is_flag or is_path else option.default)
        help = f"{target}: {option.help}" + (f"  [default: {default}]" if default else "")
        kind = None if is_flag else click.Path() if is_path else type(option.default)
        command = click.option(option.flag, is_flag=is_flag, type=kind, metavar=option.metavar, help=help)(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path())
@click.option(
    "--target",
    required=True,
    help=" ".join(f"{name}: {get_target(name).SUMMARY}." for name in TARGETS),
)
@click.option("-o", "--output", type=click.Path(), help="Bundle to make.  [default: ./MODEL-TARGET]")
@click.option("--state-dtype", help="fp32, fp16 or int8: how the SSM state is stored.  [default: by target]")
@click.option("--tokenizer", type=click.Path(), help="[default: tokenizer.json beside MODEL, if any]")
@click.option("--verify/--no-verify", default=True, help="Compare the bundle with the student.  [default: verify]")
@click.option("--force", is_flag=True, help="Replace the output if it is a bundle.")
@_options_of_targets
@click.version_option(package_name="dfssm")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(as_json: bool, **options) -> None:
    """Compile MODEL (model.pt or model.safetensors) into a bundle: a folder that dfssm runs."""
    given = {option.name: options.pop(option.name) for name in TARGETS for option in get_target(name).OPTIONS}
    of_target = {name: value for name, value in given.items() if value is not None and value is not False}
    with _Bars() as bars:
        report = compile_model(Request(**options, options=of_target), bars)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        _print(report)


def main(args: list[str] | None = None) -> None:
    """Entry point. Exit status 0; 1 and one line on stderr for an error of the user's to mend; 2 for wrong usage; 130
    for Ctrl-C. A bug keeps its traceback. Whatever the failure, no bundle is left behind.
    """
    try:
        command(args, prog_name="dfcompile", standalone_mode=False)
    except DfssmError as error:
        print(f"dfcompile: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None


class _Bars:
    """One progress bar a pass, on stderr and only where that is a terminal."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._name != name:
            self.__exit__()
            self._name, self._bar = name, tqdm(desc=name, total=total, disable=None, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)


def _print(report: Report) -> None:
    for record in report.passes:
        click.echo(f"{record.name:<8}{record.seconds:8.2f} s   peak {record.peak_rss_bytes / 1e6:8.0f} MB")
    verification = report.manifest.verification
    if "why_not" in verification:
        click.echo(f"not run: {verification['why_not']}")
        verification = verification["graph"]
    if verification["passed"]:
        name, worst = max(verification["outputs"].items(), key=lambda item: item[1]["max_rel"] / item[1]["tolerance"])
        click.echo(
            f"verified op by op over {verification['tokens']} + {verification['steps']} tokens; worst is {name}: "
            f"{worst['max_rel']:.1e} of its largest value, {worst['tolerance']:.1e} allowed"
        )
    else:
        click.echo("not verified (--no-verify)")
    if engine := report.manifest.engine:
        sm = ", ".join(map(str, engine["sm"]))
        for name, nodes in engine["refused"].items():
            for node, why in nodes.items():
                click.echo(f"{name} left {node} as it is: {why}")
        click.echo(f"built by {engine['builder']} {engine['version']} ({engine['why']}) for SM {sm}")
    click.echo(
        f"{report.output}: {report.bytes / 1e6:.1f} MB, target {report.manifest.target}, "
        f"state {report.manifest.state_dtype}"
    )
