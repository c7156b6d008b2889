"""`dfssm bench`: how fast a bundle runs on this machine."""

from __future__ import annotations

import click
from tqdm import tqdm

from .options import bundle_argument, json_option, megabytes, print_result, table, threads_option


@click.command()
@bundle_argument
@threads_option
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
    from dfssm.bench.decode import bench as run

    with tqdm(desc="bench", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = run(bundle, progress=progress, **settings)
    print_result(result, as_json, _text)


def _text(result: dict) -> str:
    machine, moved = result["machine"], result["step_bytes"]
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
    rows += [
        ["memory", megabytes(result["rss_bytes"]), _memory(result)],
        ["load", f"{result['load_seconds']:.2f} s", "with the hashes of all files"],
    ]
    check = result["check"]
    return "\n".join(
        [
            f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores, kernels {_isa(result)}, "
            f"ONNX Runtime {machine['packages']['onnxruntime']}, {result['state_dtype']} states",
            f"checked against {check['reference']}: logits off by {check['rms_rel']:.1e} (rms), "
            f"allowed {check['allowed']}",
            "",
            table(rows, right={1}),
            "",
            f"medians of {result['rounds']} rounds of {result['tokens']} tokens, batch 1",
        ]
    )


def _isa(result: dict) -> str:
    return result["isa"] or "of ONNX Runtime"


def _memory(result: dict) -> str:
    return (
        f"while decoding: {megabytes(result['file_bytes'])} of files (weights), "
        f"{megabytes(result['anonymous_bytes'])} its own; peak {megabytes(result['peak_rss_bytes'])}"
    )
