"""What TensorRT-RTX makes of models, by its log: the rows of the table in docs/trt.md, "Build figures".

    python tests/tools/builder_figures.py model.pt... [--sm "80 89 120"]

Each engine is the one that dfcompile builds by default, but that it keeps the details of its layers.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from dfssm.targets import trt_build, trt_child

LOG = "DFSSM_BUILDER_LOG"
"""Of the building process: the file that takes all that the builder says."""

PROFILES = ("steps", "prompts")


def rows(model: Path, sm: str) -> Iterator[str]:
    """One a profile: its layers, of them plugins; copies of constants that the builder puts in; the memory between its
    layers; the size of the engine.
    """
    from dfssm.compiler.pipeline import Request, compile_model

    with tempfile.TemporaryDirectory() as place:
        bundle, log = Path(place) / "bundle", Path(place) / "log"
        with (
            patch.object(trt_child, "python", lambda *module: [sys.executable, __file__]),
            patch.dict(os.environ, {LOG: str(log)}),
        ):
            options = {"builder": "tensorrt-rtx", "sm": sm}
            compile_model(Request(model, "trt", bundle, verify=False, options=options))
        text = log.read_text()
        size = (bundle / "model.engine").stat().st_size
    layers = re.findall(r"^Name: \S+(?: \[profile \d\])?_myl(\d)_\d+, LayerType: (\w+)", text, re.MULTILINE)
    memory = re.findall(r"Total Activation Memory: (\d+) bytes", text)
    for number, (profile, between) in enumerate(zip(PROFILES, map(int, memory), strict=True)):
        kinds = [kind for of, kind in layers if int(of) == number]
        room = f"{between / 1e3:.0f} KB" if between < 1e6 else f"{between / 1e6:.1f} MB"
        counts = f"{len(kinds)}, {kinds.count('custom_layer')} | {text.count('Insert CopyNode')}"
        yield f"| {profile} | {counts} | {room} | {size / 1e6:.2f} MB |"


def build() -> None:
    """As the process that builds, with what the builder says of its layers in a file."""
    make_logger, make_config = trt_build._logger, trt_build._config

    def logger(trt):
        class Logger(type(make_logger(trt))):
            def log(self, severity, text):
                print(text, file=log)
                super().log(severity, text)

        return Logger()

    def config(trt, *arguments):
        made, profiles = make_config(trt, *arguments)
        made.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        return made, profiles

    with (
        open(os.environ[LOG], "w") as log,
        patch.object(trt_build, "_logger", logger),
        patch.object(trt_build, "_config", config),
    ):
        trt_build.main()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--sm", default="86", help="an engine for each list of it, separated by blanks")
    arguments = parser.parse_args()
    for model in arguments.models:
        for sm in arguments.sm.split():
            print(f"{model}, SM {sm}", *rows(model, sm), sep="\n", flush=True)


if __name__ == "__main__":
    build() if LOG in os.environ else main()
