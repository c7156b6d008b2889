"""`dfssm bench`: the speed of a bundle on this machine."""

from __future__ import annotations

import click

from dfssm.base import paths
from dfssm.base.extras import require

from .options import (
    bundle_argument,
    json_option,
    megabytes,
    print_result,
    progress_bar,
    table,
    threads_option,
    trust_option,
    whole,
)

PEERS = {"stock-ort": {"compile": ["onnx", "onnx-ir"]}, "llama.cpp": {"": ["llama-cpp-python", "gguf"]}}


@click.command()
@bundle_argument
@threads_option
@trust_option
@click.option("--prompt", type=whole(1, 2**20), default=128, metavar="N", help="Length of the prompt (prefill).")
@click.option("--tokens", type=whole(1, 2**20), default=32, metavar="N", help="Tokens to decode in each round.")
@click.option("--rounds", type=whole(1, 10_000), default=7, metavar="N", help="Figures are medians over the rounds.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(list(PEERS)),
    help="Also time ONNX Runtime's own 2-bit operators, or llama.cpp (`make bench-peers`), in the same rounds.",
)
@click.option("--speculate", is_flag=True, help="Also time speculation, by the share of drafts that are right.")
@click.option("--batch", "batches", multiple=True, type=whole(1, 2**16), metavar="N", help="Also so many sequences.")
@click.option("--ops", is_flag=True, help="Also where the time of a token goes, op by op.")
@click.option(
    "--busy", type=whole(0, 1024), default=0, metavar="N", help="Beside N other processes that keep a core busy."
)
@click.option("--plot", type=click.Path(), metavar="FILE", help="Also draw what was measured: FILE.svg or FILE.png.")
@json_option
def bench(bundle: str, plot: str | None, as_json: bool, **settings) -> None:
    """Measure the speed of BUNDLE on this machine.

    Decode is compared with the limit that memory bandwidth sets; prefill, memory and load time are measured too. The
    outputs are checked first: a bundle that computes wrong values is not timed. docs/bench.md explains the figures.
    """
    folder = paths.bundle(bundle)
    file = paths.output_file(plot, folder) if plot else None
    if file and file.suffix not in (".svg", ".png"):
        raise click.UsageError(f"--plot {plot}: the name must end in .svg or .png.")
    require(*(PEERS[peer] for peer in settings["peers"]), {"analysis": ["matplotlib"]} if file else {})
    from dfssm.bench.decode import bench as run

    with progress_bar("bench") as progress:
        result = run(folder, progress=progress, **settings)
    if file:
        from dfssm.bench.plot import plot_run

        plot_run(result, file)
    print_result(result, as_json, lambda result: _text(result) + (f"\n\n{file}" if file else ""))


def _text(result: dict) -> str:
    moved = result["step_bytes"]
    low, high = result["tok_s_quartiles"]
    rows = [
        [
            "decode",
            f"{result['tok_s']:.1f} tok/s",
            f"quartiles {low:.1f} to {high:.1f}, {result['gb_s']:.1f} GB/s",
        ],
        [
            "limit",
            f"{result['floor_tok_s']:.1f} tok/s",
            f"memory bandwidth: {megabytes(moved['weights'])} of weights read at {result['read_gb_s']:.1f} GB/s, "
            f"{megabytes(moved['state_read'])} of state read and {megabytes(moved['state_written'])} written at "
            f"{result['read_write_gb_s']:.1f} GB/s",
        ],
        ["share", f"{100 * result['floor_share']:.0f} %", "of that limit, median over the rounds"],
        ["prefill", f"{result['prefill_tok_s']:.1f} tok/s", f"prompt of {result['prompt']} tokens"],
    ]
    for name, peer in result["peers"].items():
        low, high = peer["tok_s_quartiles"]
        decode = f"quartiles {low:.1f} to {high:.1f}; this bundle is {peer['ratio']:.2f} times as fast"
        prefill = f"prefill {peer['prefill_tok_s']:.1f} tok/s, {peer['prefill_ratio']:.2f} times"
        rows.append([name, f"{peer['tok_s']:.1f} tok/s", f"{decode}; {prefill}; {peer['options']}"])
    rows += [[f"batch {batch['batch']}", f"{batch['tok_s']:,.0f} tok/s", _beside(batch)] for batch in result["batches"]]
    for entry in result["speculation"] or []:
        rows.append(
            [
                f"speculation, {entry['right']:.0%}",
                f"{entry['tok_s']:.1f} tok/s",
                f"{entry['ratio']:.2f} times plain decode, {entry['tokens_per_run']:.2f} tokens a run; "
                "so many of the drafts are right",
            ]
        )
    if ops := result["ops"]:
        rows += [[op["op"], f"{1e3 * op['seconds']:.2f} ms", _op(op)] for op in ops["table"]]
        rows.append(["the rest", f"{1e3 * ops['outside_share'] * ops['seconds']:.2f} ms", _outside(ops)])
    rows += [
        ["memory", megabytes(result["rss_bytes"]), _memory(result)],
        ["load", f"{result['load_seconds']:.2f} s", "hashes of all files checked"],
    ]
    check = result["check"]
    return "\n".join(
        [
            f"{_what_ran(result)}, {result['state_dtype']} states",
            f"checked against {check['reference']}: relative rms error of the logits {check['rms_rel']:.1e} "
            f"({check['allowed']} allowed)",
            "",
            table(rows, right={1}),
            "",
            f"medians over {result['rounds']} rounds of {result['tokens']} tokens, batch 1",
        ]
    )


def _what_ran(result: dict) -> str:
    machine, gpu = result["machine"], result["gpu"]
    if gpu:
        return f"{gpu['name']}, {gpu['builder']} {gpu['version']}, lowering {gpu['lowering']}"
    return (
        f"{machine['cpu']}, {result['threads']} threads on {machine['cores']} cores, kernels: "
        f"{result['isa'] or 'those of ONNX Runtime'}, ONNX Runtime {machine['packages']['onnxruntime']}"
    )


def _beside(batch: dict) -> str:
    """What one batch size is compared with."""
    limit = f"{100 * batch['floor_share']:.0f} % of its limit, {batch['floor_tok_s']:,.0f} tok/s"
    if "recorded" not in batch:
        return limit
    limit = f"step only; {limit}"
    predicted = f"; predicted {batch['predicted_tok_s']:,.0f} tok/s" if batch["predicted_tok_s"] else ""
    return limit + predicted + ("" if batch["recorded"] else "; not recorded as a CUDA graph")


def _op(op: dict) -> str:
    """What an op reaches."""
    cycle = f", {op['weights_cycle']:.1f} weights a cycle of a core" if op["weights_cycle"] else ""
    nodes = f"a token in {op['nodes']} nodes"
    return f"{nodes}, {op['gb_s']:.1f} GB/s, {100 * op['floor_share']:.0f} % of the limit{cycle}"


def _outside(ops: dict) -> str:
    return f"{100 * ops['outside_share']:.1f} % of a token is outside our kernels"


def _memory(result: dict) -> str:
    return (
        f"resident while decoding: {megabytes(result['file_bytes'])} mapped files (weights), "
        f"{megabytes(result['anonymous_bytes'])} private; peak {megabytes(result['peak_rss_bytes'])}"
    )
