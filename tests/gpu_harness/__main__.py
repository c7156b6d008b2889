"""Checks and times the plugin library on the GPU of this machine, from a folder that pack.py made:

    python3 -m gpu_harness [FOLDER] [--out FOLDER] [--seconds 460] [--steps ops,demo,...]

Each step is a process of its own with a time limit, so that one that hangs or crashes costs no other; what it found up
to then counts. Writes report.json and report.txt. Exit status 1 if something failed, 2 if nothing ran, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

STATE_DTYPES = ("fp32", "fp16", "int8")
LIBRARY, DRIVER = "libdfssm_trt.so", "libgpu_harness.so"

Record = dict[str, Any]


class Place:
    """The packed folder, and the library in it. torch takes seconds to import: only where a step needs it."""

    def __init__(self, folder: Path, library: Path):
        self.folder, self.path = folder, library

    @property
    def library(self):
        from .plugins import Library

        return Library(self.folder / DRIVER, self.path)

    def read(self, name: str):
        import torch

        return torch.load(self.folder / f"{name}.pt", weights_only=True)


def _findings(found: tuple[int, list[str]]) -> Record:
    return {"compared": found[0], "failed": found[1]}


NO_DEVICE = "torch finds no CUDA device: run this on a GPU, with a torch that is built for it"


def device(place: Place) -> Iterator[Record]:
    import torch

    from .speed import copy_bandwidth

    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    facts = torch.cuda.get_device_properties(0)
    yield {"gpu": facts.name, "sm": facts.major * 10 + facts.minor, "bytes": facts.total_memory}
    yield {"torch": torch.__version__, "cuda": torch.version.cuda, "copy_gb_s": copy_bandwidth("cuda") / 1e9}


def ops(place: Place) -> Iterator[Record]:
    from .checks import check_ops

    for name in ("cases", "large", "largest"):
        if (place.folder / f"{name}.pt").exists():
            yield {"table": name} | _findings(check_ops(place.library, place.read(name)))


def demo(place: Place) -> Iterator[Record]:
    from .checks import check_demo

    for state in STATE_DTYPES:
        yield {"states": state} | _findings(check_demo(place.library, place.read(f"demo_{state}")))


def calls(place: Place) -> Iterator[Record]:
    """What runs under compute-sanitizer: nothing recorded, every tensor an allocation of its own."""
    from .checks import check_calls
    from .graph import Weights

    made = place.read("demo_fp16")
    yield {"states": "fp16"} | _findings(check_calls(Weights(place.library, made["graph"]), made))


def model(place: Place, state: str) -> Iterator[Record]:
    from .graph import Weights
    from .speed import BATCHES, PROMPTS, copy_bandwidth, measure

    bandwidth = copy_bandwidth(place.library.device)
    weights = Weights(place.library, place.read(f"1.3b_{state}"))
    steps = [(rows, 1) for rows in BATCHES]
    for record in measure(weights, steps + (list(PROMPTS) if state == "fp16" else []), bandwidth):
        yield {"states": state} | record


def overlap(place: Place) -> Iterator[Record]:
    """Launches that begin before the one before has ended: the demo's checks, and times to put beside 1.3b_fp16."""
    from .graph import Weights
    from .speed import copy_bandwidth, measure

    yield from demo(place)
    bandwidth = copy_bandwidth(place.library.device)
    weights = Weights(place.library, place.read("1.3b_fp16"))
    yield from measure(weights, ((1, 1), (8, 1), (32, 1), (128, 1), (1, 512)), bandwidth)


def baseline(place: Place) -> Iterator[Record]:
    import torch

    from .baselines import Sizes, check_baseline, measure_baseline
    from .speed import BATCHES, copy_bandwidth

    yield _findings((3, check_baseline(Sizes(layers=2), "cuda")))
    bandwidth = copy_bandwidth("cuda")
    for dtype in (torch.float32, torch.float16):
        for record in measure_baseline(Sizes(), "cuda", BATCHES[::2], bandwidth, dtype):
            yield {"states": str(dtype).removeprefix("torch.")} | record


def int8(place: Place) -> Iterator[Record]:
    from .speed import int8_products

    yield from int8_products("cuda", (32, 128, 512, 2048))


STEPS: dict[str, tuple[int, Callable[[Place], Iterator[Record]]]] = {
    "device": (60, device),
    "ops": (90, ops),
    "demo": (60, demo),
    **{f"1.3b_{state}": (90, lambda place, state=state: model(place, state)) for state in ("fp16", "int8", "fp32")},
    "overlap": (60, overlap),
    "baseline": (90, baseline),
    "int8": (45, int8),
    "memcheck": (75, calls),
    "racecheck": (75, calls),
}
"""Name of a step -> its limit in seconds, what it does; in this order."""

ENVIRONMENT = {
    "overlap": {"DFSSM_TRT_OVERLAP": "1"},
    **dict.fromkeys(("memcheck", "racecheck"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
}

SANITIZERS: dict[str, list[str]] = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
"""Tool of compute-sanitizer -> its options. Errors that CUDA's functions return are torch's trials; ours are raised."""


def run_step(name: str, arguments: list[str], limit: float) -> Record:
    """The step in a process of its own: {"records", "seconds", "error"}, error "" where it came to its end."""
    command = [sys.executable, "-m", __package__, *arguments, "--steps", name, "--inside"]
    environment = os.environ | ENVIRONMENT.get(name, {})
    if name in SANITIZERS:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            return {"records": [], "seconds": 0.0, "error": "not run: no compute-sanitizer here"}
        command = [tool, "--tool", name, "--error-exitcode", "9", *SANITIZERS[name], *command]
    start = monotonic()
    records, said = [], []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=limit)
        ended = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # compute-sanitizer's child too
        output, _ = process.communicate()
        ended = f"stopped after {limit:.0f} s"
    for line in output.splitlines():
        if line.startswith("{"):
            records.append(json.loads(line))
        elif line.strip(" ^~="):
            said.append(line.strip(" ="))
    error = ": ".join([ended, *said[-2:]]) if ended else ""
    return {"records": records, "seconds": monotonic() - start, "error": error}


def failures(steps: dict[str, Record]) -> list[str]:
    """Everything that is wrong, as lines of text."""
    lines = []
    for name, step in steps.items():
        for record in step["records"]:
            lines += [f"{name}: {line}" for line in record.get("failed", ())]
            if record.get("wrong"):
                lines.append(
                    f"{name}, {record['rows']} rows of {record['tokens']} tokens: {record['wrong']} of the replay"
                )
        if step["error"] and not step["error"].startswith("not run"):
            lines.append(f"{name}: {step['error']}")
    return lines


def table(steps: dict[str, Record]) -> str:
    """The report as text: a block for each step, its records as rows."""
    blocks = []
    for name, step in steps.items():
        lines = [f"{name}, {step['seconds']:.0f} s" + (f": {step['error']}" if step["error"] else "")]
        columns: list[str] = []
        rows: list[list[str]] = []
        for record in step["records"]:
            shown = {key: _text(value) for key, value in record.items() if key != "wrong" or value}
            if list(shown) != columns:
                lines += _aligned(rows)
                columns, rows = list(shown), [list(shown)]
            rows.append(list(shown.values()))
        blocks.append("\n".join(lines + _aligned(rows)))
    wrong = failures(steps)
    compared = sum(record.get("compared", 0) for step in steps.values() for record in step["records"])
    return "\n\n".join([*blocks, "\n".join([f"{compared} comparisons, {len(wrong)} failures", *wrong])])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
    return str(len(value)) if isinstance(value, list) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python3 -m {__package__}", description="Check and time the plugins here.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--library", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=460, help="for all steps together")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    library = options.library or options.folder / LIBRARY
    if options.inside:
        for record in STEPS[options.steps][1](Place(options.folder, library)):
            print(json.dumps(record), flush=True)
        return 0

    steps: dict[str, Record] = {}
    start = monotonic()
    for name in options.steps.split(","):
        left = options.seconds - (monotonic() - start)
        if left < 5:
            steps[name] = {"records": [], "seconds": 0.0, "error": "not run: no time is left"}
            continue
        limit = min(STEPS[name][0], left)
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        steps[name] = run_step(name, [str(options.folder), "--library", str(library)], limit)
        if name == "device" and (error := steps[name]["error"]):  # no other step can run either
            print(f"device: {error}", file=sys.stderr)
            return 1
    out = options.out or options.folder
    text = table(steps)
    (out / "report.json").write_text(json.dumps({"steps": steps, "failures": failures(steps)}, indent=1))
    (out / "report.txt").write_text(text + "\n")
    print(text)
    if failures(steps):
        return 1
    return 0 if any(step["records"] for step in steps.values()) else 2


if __name__ == "__main__":
    sys.exit(main())
