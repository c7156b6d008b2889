"""`dfssm verify`: a bundle against the goldens that it carries, where it runs."""

from __future__ import annotations

import click

from dfssm.base import paths
from dfssm.base.extras import require

from .options import bundle_argument, json_option, print_result, progress_bar, table, threads_option, trust_option


@click.command()
@bundle_argument
@click.option("--bisect", is_flag=True, help="Find the first op that the kernels compute otherwise than it is defined.")
@click.option(
    "--polygraphy", type=click.Path(), metavar="DIR", help="Write the goldens for `polygraphy run` to DIR; run nothing."
)
@threads_option
@trust_option
@json_option
def verify(bundle: str, bisect: bool, polygraphy: str | None, threads: int, as_json: bool) -> None:
    """Verify BUNDLE on this machine.

    The bundle runs a few tokens. Its logits and states are compared with those that dfcompile stored in it. The result
    is recorded for this user: an engine that was never verified on its machine says so when it is opened. Exits with 1
    if something is off.

    With --bisect each op gets what the kernels computed before it, and is compared with its definition in standard ops.
    """
    path = paths.bundle(bundle)
    if bisect and polygraphy is not None:
        raise click.UsageError("--bisect and --polygraphy are two commands: give one of them")
    if polygraphy is not None:
        folder = paths.output_folder(polygraphy, path)
        require({"compile": ["polygraphy"]})
        from dfssm.verify.polygraphy import write_golden

        print_result(write_golden(path, folder), as_json, _text_of_files)
        return
    if bisect:
        require({"compile": ["onnx"]})
        from dfssm.verify.bisect import bisect as run

        text = _text_of_bisect
    else:
        from dfssm.verify.golden import verify_here as run

        text = _text
    with progress_bar("bisect" if bisect else "verify") as progress:
        result = run(path, threads, progress)
    print_result(result, as_json, text)
    if not result["passed"]:
        raise click.exceptions.Exit(1)


def _text_of_files(result: dict) -> str:
    return f"for polygraphy run: --load-inputs {result['inputs']} --load-outputs {result['outputs']}"


def _text(result: dict) -> str:
    lines = [f"{result['target']}: {result['kernels']}", ""]
    outputs, rows = result["outputs"], [["output", "rms error", "allowed"]]
    for kind in dict.fromkeys(name.partition(".")[0] for name in outputs):
        of_kind = (name for name in outputs if name.partition(".")[0] == kind)
        worst = max(of_kind, key=lambda name: outputs[name]["rms_rel"] / (outputs[name]["tolerance"] or 1))
        rows.append([worst, *(f"{outputs[worst][key]:.1e}" for key in ("rms_rel", "tolerance"))])
    lines += [table(rows, right={1, 2}), ""]
    tokens = f"{result['tokens']} tokens in {len(result['calls'])} calls"
    if first := result["first"]:
        name, error, allowed = (first[key] for key in ("output", "rms_rel", "tolerance"))
        off = f"is off by {error:.3g} of its size, allowed is {allowed:.3g}" if error > allowed else "has other bits"
        lines.append(f"FAILED after token {first['token']}: {name} {off} ({first['reason']})")
    else:
        same = "the same bits as" if result["identical"] else "within what float noise moves of"
        lines.append(f"passed: over {tokens}, {same} the verified graph")
    return "\n".join(lines)


def _text_of_bisect(result: dict) -> str:
    rows = [["output", "max error", "allowed"]]
    rows += [[name, f"{d['max_rel']:.1e}", f"{d['tolerance']:.1e}"] for name, d in result["outputs"].items()]
    lines = [
        f"{result['tokens']} tokens; each op on equal inputs; the worst of all layers",
        "",
        table(rows, right={1, 2}),
        "",
    ]
    if first := result["first"]:
        lines.append(
            f"FAILED at {first['node']}, after token {first['token']}: {first['output']} is off by "
            f"{first['max_rel']:.3g} of its largest value, allowed is {first['tolerance']:.3g} ({first['reason']})"
        )
    else:
        lines.append("passed: every op is computed as it is defined")
    return "\n".join(lines)
