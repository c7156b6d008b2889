"""`dfssm compare`: does the bundle compute what the student computes?"""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from .options import bundle_argument, json_option, print_result, table


@click.command()
@bundle_argument
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tokens", type=click.IntRange(2), default=64, show_default=True, metavar="N", help="Tokens to run."
)
@json_option
def compare(bundle: str, model: Path, tokens: int, as_json: bool) -> None:
    """Compare BUNDLE with the torch student in MODEL, teacher-forced. Exits 1 when an output is off by more
    than its tolerance.

    Most tokens run as one prompt, the last ones step by step from the student's state. The outputs are those
    of the bundle as it is; the layers are compared each on the student's input.
    """
    from dfssm.bench.comparison import compare as run

    with tqdm(desc="compare", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = run(Path(bundle), model, tokens, progress)
    print_result(result, as_json, _text)
    if not result["passed"]:
        raise click.exceptions.Exit(1)


def _text(result: dict) -> str:
    lines = [f"{result['tokens']} tokens; errors as shares of the largest expected value", ""]
    rows = [["output", "max error", "allowed", ""]]
    for name, found in _by_kind(result["outputs"]).items():
        rows.append([name, f"{found['max_rel']:.2e}", f"{found['tolerance']:.2e}", _verdict(found)])
    lines += [table(rows, right={1, 2}), "", "each layer on the student's input:"]
    layers: dict[str, dict] = {}
    for name, found in result["layers"].items():
        layer, tap = name.rsplit(".", 1)
        layers.setdefault(layer, {})[tap] = found
    taps = list(next(iter(layers.values())))
    rows = [["layer", *taps]]
    for layer, found in layers.items():
        rows.append(
            [layer, *(f"{found[tap]['max_rel']:.1e}{'' if found[tap]['passed'] else ' !'}" for tap in taps)]
        )
    first = next(iter(layers.values()))
    rows.append(["allowed", *(f"{first[tap]['tolerance']:.1e}" for tap in taps)])
    lines.append(table(rows, right=set(range(1, len(taps) + 1))))
    typical = max(found["typical_rel"] for found in result["layers"].values())
    lines += [f"typical error at most {typical:.1e}, allowed {first[taps[0]]['typical_tolerance']:.1e}", ""]
    lines.append("passed" if result["passed"] else "FAILED: an output above is marked")
    return "\n".join(lines)


def _by_kind(outputs: dict[str, dict]) -> dict[str, dict]:
    """Of the states of all layers, those that failed and the worst of each kind."""
    shown = {name: found for name, found in outputs.items() if "." not in name}
    kinds = dict.fromkeys(name.split(".")[0] for name in outputs if "." in name)
    for kind in kinds:
        of_kind = {name: found for name, found in outputs.items() if name.startswith(f"{kind}.")}
        worst = max(of_kind, key=lambda name: of_kind[name]["max_rel"] / of_kind[name]["tolerance"])
        shown |= {name: found for name, found in of_kind.items() if not found["passed"] or name == worst}
    return shown


def _verdict(found: dict) -> str:
    return "ok" if found["passed"] else "FAILED"
