"""Comparing a bundle with its student through Polygraphy, layer by layer and output by output.

The bundle runs as it ships, on its own states, and once more with the values inside its layers as further
outputs. The student is then held to it: each of its layers gets the hidden states and the recurrent state
that the bundle had there, and what it makes of them is compared. So an error shows in the layer where it
arises. Two free runs say little: activations are rounded to int8, a last bit moves one of them across a tie,
that moves others, and after 48 layers of a random model two correct backends have logits several percent
apart.
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
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from dfssm.model.student import DFSSMLM, DFSSMState, load_student
from dfssm.opset.errors import DfssmError
from dfssm.opset.schema import STATE_DTYPES
from dfssm.opset.tolerances import Tolerance, model_tolerance, op_tolerance, reduction
from dfssm.targets import get_target
from dfssm.targets.bundle import MODEL, Manifest, check_files, read_manifest

TAPS = ("norm", "in_proj", "conv", "scan", "gated_norm", "out_proj", "residual")
"""Nodes of a layer whose outputs are compared, in the order of the graph."""

STEPS = 4
"""At most so many of the tokens are read one by one, those before them in one run: both kinds of kernels."""

MANY = 16
"""Tokens of a run whose median over the tokens means something."""

Values = dict[str, np.ndarray]


class Difference:
    """How far one output was off, over all runs, as shares of the largest expected value.

    Its worst value is held to `tolerance`, wide enough for an activation that falls on the other side of a
    rounding tie. Such are rare: `typical`, for each channel the median over a prompt's tokens, then the worst
    channel, is held to the noise of fp32 sums, so that one wrong row does not hide behind the wide tolerance.
    """

    def __init__(self, tolerance: Tolerance, typical: Tolerance | None):
        self.tolerance, self.typical = tolerance, typical
        self.max_abs = self.max_rel = 0.0
        self.typical_rel: float | None = None  # None: no run had tokens enough, or the output has no token axis
        self.within = True

    def add(self, found, actual: np.ndarray, expected: np.ndarray, largest: float) -> None:
        """One run: `found` is Polygraphy's result, `largest` the largest value of `expected`."""
        # np.maximum keeps a NaN, max() may drop it
        self.max_abs = float(np.maximum(self.max_abs, found.max_absdiff))
        self.max_rel = float(np.maximum(self.max_rel, found.max_absdiff / largest))
        self.within = self.within and bool(found)
        if self.typical and actual.shape[1] >= MANY:
            error = np.median(np.abs(actual - expected), axis=1).max() / largest
            self.typical_rel = float(np.maximum(self.typical_rel or 0.0, error))

    @property
    def passed(self) -> bool:
        return self.within and (self.typical_rel is None or self.typical_rel <= self.typical.relative)

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
    runs = [ids[:, : tokens - steps], *np.split(ids[:, tokens - steps :], steps, axis=1)]
    differences: dict[str, Difference] = {}
    identical = True

    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # Polygraphy's own report: the same figures, a page an output
    with ExitStack() as stack:
        target = get_target(manifest.target)
        reference = stack.enter_context(StudentRunner(student))
        shipped = stack.enter_context(OnnxrtRunner(lambda: target.open_session(bundle), name="bundle"))
        tapped_folder = stack.enter_context(_tapped_bundle(bundle, manifest))
        tapped = stack.enter_context(OnnxrtRunner(lambda: target.open_session(tapped_folder), name="tapped"))
        states = state_tensors(student.new_state(1))
        for index, piece in enumerate(runs):
            feed = {"input_ids": piece} | states
            outputs, actual = shipped.infer(feed), _plain(tapped.infer(feed))
            identical = identical and all(np.array_equal(outputs[name], actual[name]) for name in outputs)
            hidden = {name: value for name, value in actual.items() if name.endswith(".residual")}
            expected = reference.infer(feed | hidden, check_inputs=False)
            _add_run(_widened(expected), _widened(actual), manifest, differences)
            states = {name: outputs[name.replace(".", "_out.")] for name in states}
            progress(index + 1, len(runs))
    of_layers = {name: d.to_dict() for name, d in differences.items() if name.startswith("layers.")}
    return {
        "max_abs": differences["logits"].max_abs,
        "max_rel": differences["logits"].max_rel,
        "tokens": tokens,
        "passed": identical and all(d.passed for d in differences.values()),
        "identical": identical,
        "outputs": {name: d.to_dict() for name, d in differences.items() if name not in of_layers},
        "layers": of_layers,
    }


def _add_run(expected: Values, actual: Values, manifest: Manifest, into: dict[str, Difference]) -> None:
    """One run's values through Polygraphy's comparison, each with its own tolerance."""
    largest = {name: float(np.abs(expected[name]).max()) or 1.0 for name in actual}
    for name in actual:
        if name not in into:
            into[name] = Difference(*_tolerances(name, manifest))
    function = SimpleCompareFunc(
        atol={name: into[name].tolerance.relative * largest[name] for name in actual},
        rtol=0.0,
        check_error_stat="max",
    )
    results = function(IterationResult(actual), IterationResult({name: expected[name] for name in actual}))
    for name in actual:
        into[name].add(results[name], actual[name], expected[name], largest[name])


def _tolerances(name: str, manifest: Manifest) -> tuple[Tolerance, Tolerance | None]:
    """What one output may be off at worst, and typically: what one layer on equal inputs allows.

    A state has no typical error: it adds up all tokens, those with a flipped activation among them.
    """
    width = manifest.config["d_model"]
    noise = reduction(manifest.config["expand"] * width)
    if name.endswith(".norm"):
        return noise, noise  # nothing is rounded before it
    worst = model_tolerance(1, width)
    if not name.partition(".")[0].endswith("_state_out"):
        return worst, noise
    if name.startswith("ssm_state_out."):
        sizes = {"T": 1, "state": STATE_DTYPES[manifest.state_dtype]}
        rounding = op_tolerance("SelectiveScanStep", sizes, "new_state")
        worst = Tolerance(worst.relative + rounding.relative, f"{worst.reason}; {rounding.reason}")
    return worst, None


def _plain(outputs: Values) -> Values:
    """/layers.0/in_proj/y becomes layers.0.in_proj; other outputs keep their name."""
    return {".".join(n.split("/")[1:3]) if n.startswith("/") else n: value for n, value in outputs.items()}


def _widened(outputs: Values) -> Values:
    """Outputs in fp32; codes and scale of an int8 state become the state they stand for."""
    wide = {}
    for name, value in outputs.items():
        kind, _, layer = name.partition(".")
        if kind == "ssm_scale_out":
            continue
        scale = outputs.get(f"ssm_scale_out.{layer}") if kind == "ssm_state_out" else None
        wide[name] = value.astype(np.float32) if scale is None else value * scale[..., None]
    return wide


def state_tensors(state: DFSSMState) -> Values:
    """A student's state by the names of the graph's inputs."""
    kinds = {"conv_state": state.conv, "ssm_state": state.ssm, "ssm_scale": state.ssm_scale or []}
    return {f"{kind}.{i}": tensor.numpy() for kind, parts in kinds.items() for i, tensor in enumerate(parts)}


class StudentRunner(BaseRunner):
    """The torch student as a Polygraphy runner, held to given hidden states.

    Inputs: those of the step graph, and layers.{i}.residual, which layer i passes on instead of its output.
    Outputs: those of the step graph, and layers.{i}.{tap} for every tap, of what the layer made itself.
    """

    def __init__(self, student: DFSSMLM):
        super().__init__(name="student")
        self.student = student
        self._hidden: Values = {}
        self._taps: Values = {}
        self._hooks = []

    def activate_impl(self) -> None:
        for index, layer in enumerate(self.student.layers):
            for tap in TAPS:
                module = layer if tap == "residual" else layer.get_submodule(tap)
                self._hooks.append(module.register_forward_hook(self._hook(f"layers.{index}.{tap}")))

    def deactivate_impl(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.int64, (1, -1))

    @torch.no_grad()
    def infer_impl(self, feed_dict) -> OrderedDict:
        self._hidden = feed_dict

        def parts(kind: str) -> list[torch.Tensor]:
            names = [name for name in feed_dict if name.startswith(f"{kind}.")]
            return [torch.from_numpy(feed_dict[name]) for name in names]

        state = DFSSMState(parts("conv_state"), parts("ssm_state"), parts("ssm_scale") or None)
        logits, state = self.student(torch.from_numpy(feed_dict["input_ids"]), state)
        after = {name.replace(".", "_out."): value for name, value in state_tensors(state).items()}
        return OrderedDict({"logits": logits.numpy()} | after | self._taps)

    def _hook(self, name: str) -> Callable:
        def hook(module, inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            self._taps[name] = value.numpy()
            if name in self._hidden:
                return (torch.from_numpy(self._hidden[name]), *output[1:])
            return None

        return hook


@contextmanager
def _tapped_bundle(bundle: Path, manifest: Manifest) -> Iterator[Path]:
    """A temporary bundle whose graph has the TAPS as outputs; its large files are links where possible."""
    with tempfile.TemporaryDirectory(prefix="dfssm-compare-") as folder:
        for name in manifest.files:
            if name != MODEL:
                _link_or_copy(bundle / name, Path(folder) / name)
        model = onnx.load(bundle / MODEL, load_external_data=False)
        produced = {node.name: node.output[0] for node in model.graph.node}
        values = {value.name: value for value in model.graph.value_info}
        for layer in range(manifest.config["n_layer"]):
            model.graph.output.extend(values[produced[f"/layers.{layer}/{tap}"]] for tap in TAPS)
        onnx.save(model, Path(folder) / MODEL)
        yield Path(folder)


def _link_or_copy(source: Path, target: Path) -> None:
    # A hard link, for ONNX Runtime refuses weights that a symbolic link fetches from another folder.
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
