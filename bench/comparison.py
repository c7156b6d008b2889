"""Comparing a bundle with its student through Polygraphy: outputs of the real graph, and each layer on equal
inputs.

Both sides get the same tokens and the same states: after the first run, which reads a prompt, every step
starts from the student's state, so an error shows where it arises and not in all that follows. The layers are
compared in a second graph, cut between the layers: each gets the student's hidden states as its input.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import CompareFunc, IterationResult
from polygraphy.logger import G_LOGGER

from dfssm.model.student import DFSSMLM, DFSSMState, load_student
from dfssm.opset.errors import DfssmError
from dfssm.opset.schema import STATE_DTYPES
from dfssm.opset.tolerances import Tolerance, model_tolerance, op_tolerance, reduction
from dfssm.targets import get_target
from dfssm.targets.bundle import MODEL, Manifest, check_files, read_manifest

TAPS = ("norm", "in_proj", "conv", "scan", "gated_norm", "out_proj", "residual")
"""Nodes of a layer whose outputs are compared, in the order of the graph."""

STEPS = 16
"""At most so many of the tokens are read one by one, the others before them in one run."""


class Difference:
    """How far one output was off, over all runs, as shares of the largest expected value.

    Its worst value is held to `tolerance`, wide enough for an activation that falls on the other side of a
    rounding tie. Such are rare: `typical`, the median over a run's values and then over the runs, is held to
    the noise of fp32 sums where it is given, so that a small error that is everywhere does not hide behind
    the wide one.
    """

    def __init__(self, tolerance: Tolerance, typical: Tolerance | None):
        self.tolerance, self.typical = tolerance, typical
        self.max_abs = self.max_rel = 0.0
        self.within = True
        self.medians: list[float] = []

    def add(self, found, largest: float) -> None:
        """One run's result of Polygraphy's comparison."""
        # np.maximum keeps a NaN, max() may drop it
        self.max_abs = float(np.maximum(self.max_abs, found.max_absdiff))
        self.max_rel = float(np.maximum(self.max_rel, found.max_absdiff / largest))
        self.medians.append(found.median_absdiff / largest)
        self.within = self.within and bool(found)

    @property
    def typical_rel(self) -> float:
        return float(np.median(self.medians))

    @property
    def passed(self) -> bool:
        return self.within and (self.typical is None or self.typical_rel <= self.typical.relative)

    def to_dict(self) -> dict:
        """Its part of the result, see docs/json.md."""
        return {
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "tolerance": self.tolerance.relative,
            "typical_rel": self.typical_rel,
            "typical_tolerance": self.typical and self.typical.relative,
            "passed": self.passed,
        }


def compare(bundle: Path, model: Path, tokens: int, progress: Callable[[int, int], None]) -> dict:
    """Compare `bundle` with the student in `model` over `tokens` tokens; the result is that of docs/json.md.

    `progress(done, total)` counts runs. Raises DfssmError when the two are not of one config.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    student = load_student(model, manifest.state_dtype)
    if student.config.to_dict() != manifest.config:
        raise DfssmError(f"{bundle} was not compiled from {model}: their configs differ")
    ids = np.random.default_rng(0).integers(0, student.config.vocab_size, (1, tokens))
    steps = min(STEPS, tokens // 2)
    outputs: dict[str, Difference] = {}
    layers: dict[str, Difference] = {}

    G_LOGGER.module_severity = (
        G_LOGGER.CRITICAL
    )  # Polygraphy's own report: the same figures, a page an output
    with ExitStack() as stack:
        target = get_target(manifest.target)
        runner = stack.enter_context(StudentRunner(student))
        whole = stack.enter_context(OnnxrtRunner(lambda: target.open_session(bundle), name="bundle"))
        cut_folder = stack.enter_context(_cut_bundle(bundle, manifest))
        cut = stack.enter_context(OnnxrtRunner(lambda: target.open_session(cut_folder), name="bundle, cut"))
        feed = runner.states(student.new_state(1)) | {"input_ids": ids[:, : tokens - steps]}
        for index in range(1 + steps):
            expected = runner.infer(feed, check_inputs=False)
            hidden = {name: value for name, value in expected.items() if name.startswith("hidden.")}
            _compare_run(expected, whole.infer(feed), manifest, outputs)
            _compare_run(expected, cut.infer(feed | hidden), manifest, layers, layers_only=True)
            progress(index + 1, 1 + steps)
            at = tokens - steps + index
            feed = runner.states(runner.state) | {"input_ids": ids[:, at : at + 1]}
    logits = outputs["logits"]
    return {
        "max_abs": logits.max_abs,
        "max_rel": logits.max_rel,
        "tokens": tokens,
        "passed": all(d.passed for d in [*outputs.values(), *layers.values()]),
        "outputs": {name: d.to_dict() for name, d in outputs.items()},
        "layers": {name: d.to_dict() for name, d in layers.items()},
    }


def _compare_run(
    expected, actual, manifest: Manifest, into: dict[str, Difference], layers_only: bool = False
) -> None:
    """One run's outputs through Polygraphy's comparison, each with its own tolerance."""
    actual = _widened({_plain(name): value for name, value in actual.items()})
    expected = _widened(expected)
    names = [name for name in actual if name.startswith("layers.") == layers_only]
    largest = {name: float(np.abs(expected[name]).max()) or 1.0 for name in names}
    for name in names:
        if name not in into:
            into[name] = Difference(*_tolerances(name, manifest))
    function = CompareFunc.simple(
        atol={name: into[name].tolerance.relative * largest[name] for name in names},
        rtol=0.0,
        check_error_stat="max",
    )
    results = function(
        IterationResult({name: actual[name] for name in names}),
        IterationResult({name: expected[name] for name in names}),
    )
    for name in names:
        into[name].add(results[name], largest[name])


def _tolerances(name: str, manifest: Manifest) -> tuple[Tolerance, Tolerance | None]:
    """What one output may be off at worst, and typically. The graph's outputs have all layers before them
    behind them.
    """
    config = manifest.config
    kind, _, rest = name.partition(".")
    if kind == "layers":
        noise = reduction(config["expand"] * config["d_model"])
        return (noise if rest.endswith(".norm") else model_tolerance(1, config["d_model"])), noise
    layers = config["n_layer"] if kind == "logits" else int(rest) + 1
    tolerance = model_tolerance(layers, config["d_model"])
    if kind == "ssm_state_out":
        sizes = {"T": 1, "state": STATE_DTYPES[manifest.state_dtype]}
        rounding = op_tolerance("SelectiveScanStep", sizes, "new_state")
        tolerance = Tolerance(
            tolerance.relative + rounding.relative, f"{tolerance.reason}; {rounding.reason}"
        )
    return tolerance, None


def _plain(name: str) -> str:
    """/layers.0/in_proj/y -> layers.0.in_proj; other outputs keep their name."""
    return ".".join(name.split("/")[1:3]) if name.startswith("/") else name


def _widened(outputs: dict) -> dict[str, np.ndarray]:
    """Outputs in fp32; codes and scale of an int8 state become the state they stand for."""
    wide = {}
    for name, value in outputs.items():
        kind, _, layer = name.partition(".")
        if kind == "ssm_scale_out":
            continue
        scale = outputs.get(f"ssm_scale_out.{layer}") if kind == "ssm_state_out" else None
        value = np.asarray(value).astype(np.float32)
        wide[name] = value if scale is None else value * np.asarray(scale)[..., None]
    return wide


class StudentRunner(BaseRunner):
    """The torch student as a Polygraphy runner: inputs and outputs of the step graph, and what its layers
    pass on.

    `state` is the student's state after the last run.
    """

    def __init__(self, student: DFSSMLM):
        super().__init__(name="student")
        self.student, self.state = student, None
        self._taps: dict[str, np.ndarray] = {}
        self._hooks = []

    def activate_impl(self) -> None:
        for index, layer in enumerate(self.student.layers):
            for tap in TAPS:
                module = layer if tap == "residual" else layer.get_submodule(tap)
                self._hooks.append(module.register_forward_hook(self._keep(f"layers.{index}.{tap}")))

    def deactivate_impl(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.int64, (1, -1))

    @torch.no_grad()
    def infer_impl(self, feed_dict) -> OrderedDict:
        layers = range(self.student.config.n_layer)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feed_dict.items()}

        def parts(kind: str) -> list[torch.Tensor]:
            return [tensors[f"{kind}.{i}"] for i in layers if f"{kind}.{i}" in tensors]

        state = DFSSMState(parts("conv_state"), parts("ssm_state"), parts("ssm_scale") or None)
        logits, self.state = self.student(tensors["input_ids"], state)
        hidden = {f"hidden.{i}": self._taps[f"layers.{i}.residual"] for i in layers}
        after = {name.replace(".", "_out."): value for name, value in self.states(self.state).items()}
        return OrderedDict({"logits": logits.numpy()} | after | self._taps | hidden)

    @staticmethod
    def states(state: DFSSMState) -> dict[str, np.ndarray]:
        """The state by the names of the graph's inputs."""
        kinds = {"conv_state": state.conv, "ssm_state": state.ssm, "ssm_scale": state.ssm_scale or []}
        return {f"{kind}.{i}": t.numpy() for kind, parts in kinds.items() for i, t in enumerate(parts)}

    def _keep(self, name: str) -> Callable:
        def hook(module, inputs, output) -> None:
            self._taps[name] = (output[0] if isinstance(output, tuple) else output).numpy()

        return hook


@contextmanager
def _cut_bundle(bundle: Path, manifest: Manifest) -> Iterator[Path]:
    """A temporary bundle of the cut graph; the large files are links where the disk allows."""
    with tempfile.TemporaryDirectory(prefix="dfssm-compare-") as folder:
        for name in manifest.files:
            if name != MODEL:
                _link_or_copy(bundle / name, Path(folder) / name)
        model = cut_graph(onnx.load(bundle / MODEL, load_external_data=False), manifest.config["n_layer"])
        (Path(folder) / MODEL).write_bytes(model.SerializeToString())
        yield Path(folder)


def cut_graph(model: onnx.ModelProto, n_layer: int) -> onnx.ModelProto:
    """`model` cut after each layer: what layer i passed on is output, what the next one reads is the input
    hidden.{i}.

    The outputs of the nodes TAPS are outputs of the graph.
    """
    graph = model.graph
    produced = {node.name: node.output[0] for node in graph.node}
    shapes = {value.name: value for value in graph.value_info}
    cuts = {produced[f"/layers.{i}/residual"]: f"hidden.{i}" for i in range(n_layer)}
    for passed_on, name in cuts.items():
        entry = graph.input.add()
        entry.CopyFrom(shapes[passed_on])
        entry.name = name
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = cuts.get(name, name)
    for i in range(n_layer):
        graph.output.extend(shapes[produced[f"/layers.{i}/{tap}"]] for tap in TAPS)
    return model


def _link_or_copy(source: Path, target: Path) -> None:
    # A hard link, for ONNX Runtime refuses weights that a symbolic link fetches from another folder.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
