"""`dfssm bench`: how fast a bundle runs on this machine."""

from __future__ import annotations

import click

from dfssm.opset import paths
from dfssm.opset.extras import require

from .options import (
    bundle_argument,
    json_option,
    megabytes,
    print_result,
    progress_bar,
    table,
    threads_option,
    trust_option,
)


@click.command()
@bundle_argument
@threads_option
@trust_option
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Tokens to read.")
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="To decode a round.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, metavar="N")
@click.option("--peer", "peers", multiple=True, type=click.Choice(["stock-ort"]), help="Measure it in the same rounds.")
@json_option
def bench(bundle: str, as_json: bool, **settings) -> None:
    """Decode and prefill speed of BUNDLE beside the machine's floor, its memory and its load time.

    The outputs are checked first, and a bundle that computes something else is not timed. docs/bench.md
    explains the figures.
    """
    folder = paths.bundle(bundle)
    if settings["peers"]:
        require({"compile": ["onnx"]})
    from dfssm.bench.decode import bench as run

    with progress_bar("bench") as progress:
        result = run(folder, progress=progress, **settings)
    print_result(result, as_json, _text)


def _text(result: dict) -> str:
    moved = result["step_bytes"]
    low, high = result["tok_s_quartiles"]
    rows = [
        [
            "decode",
            f"{result['tok_s']:.1f} tok/s",
            f"middle half {low:.1f} to {high:.1f}, {result['gb_s']:.1f} GB/s",
        ],
        [
            "floor",
            f"{result['floor_tok_s']:.1f} tok/s",
            f"{megabytes(moved['weights'])} read at {result['read_gb_s']:.1f} GB/s, state "
            f"{megabytes(moved['state_read'])} read and written at {result['read_write_gb_s']:.1f} GB/s",
        ],
        ["share", f"{100 * result['floor_share']:.0f} %", "of the floor's speed, by rounds"],
        ["prefill", f"{result['prefill_tok_s']:.1f} tok/s", f"prompt of {result['prompt']} tokens"],
    ]
    for name, peer in result["peers"].items():
        rows.append([name, f"{peer['tok_s']:.1f} tok/s", f"this bundle is {peer['ratio']:.2f} times as fast"])
    rows += [[f"batch {batch['batch']}", f"{batch['tok_s']:,.0f} tok/s", _beside(batch)] for batch in result["batches"]]
    rows += [
        ["memory", megabytes(result["rss_bytes"]), _memory(result)],
        ["load", f"{result['load_seconds']:.2f} s", "with the hashes of all files"],
    ]
    check = result["check"]
    return "\n".join(
        [
            f"{_what_ran(result)}, {result['state_dtype']} states",
            f"checked against {check['reference']}: logits off by {check['rms_rel']:.1e} (rms), "
            f"allowed {check['allowed']}",
            "",
            table(rows, right={1}),
            "",
            f"medians of {result['rounds']} rounds of {result['tokens']} tokens, batch 1",
        ]
    )


def _what_ran(result: dict) -> str:
    machine, gpu = result["machine"], result["gpu"]
    if gpu:
        return f"{gpu['name']}, {gpu['builder']} {gpu['version']}, lowering {gpu['lowering']}"
    return (
        f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores, kernels "
        f"{result['isa'] or 'of ONNX Runtime'}, ONNX Runtime {machine['packages']['onnxruntime']}"
    )


def _beside(batch: dict) -> str:
    """What one batch size is compared with."""
    floor = f"the step alone; {100 * batch['floor_share']:.0f} % of its floor, {batch['floor_tok_s']:,.0f} tok/s"
    predicted = f"; {batch['predicted_tok_s']:,.0f} tok/s were predicted" if batch["predicted_tok_s"] else ""
    return floor + predicted + ("" if batch["recorded"] else "; not recorded as a CUDA graph")


def _memory(result: dict) -> str:
    return (
        f"while decoding: {megabytes(result['file_bytes'])} of files (weights), "
        f"{megabytes(result['anonymous_bytes'])} its own; peak {megabytes(result['peak_rss_bytes'])}"
    )
