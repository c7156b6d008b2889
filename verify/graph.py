"""The bundle's side: a copy of its graph that shows the values inside, and running it from zero states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dfssm.opset import DOMAIN
from dfssm.opset.ops import ALL_OPS
from dfssm.runtime.hidden import HIDDEN, PATCH, PATCHED
from dfssm.runtime.ort import DTYPES
from dfssm.targets.bundle import MODEL, TAPS, Bundle
from dfssm.targets.session import run_error

TAPPED = f"tapped.{MODEL}"
"""The bundle's graph with the taps among its outputs: beside the bundle's files while they are verified."""

DISTURBED = f"disturbed.{MODEL}"
"""The bundle's graph with noise in it, likewise."""

HELD = f"held.{MODEL}"
"""The bundle's graph cut after each op, likewise."""

NOISE = 1e-6
"""Of two correct backends on equal inputs, as a share of a value: seen are 1e-7 to 1e-6."""

_EMBEDDING, _RESIDUAL = "/embed/mul", "/residual"
"""Names of the nodes that make the residual stream: the first one, and the ends of those after each layer."""

Feeds = dict[str, np.ndarray]
Infer = Callable[[Feeds], Mapping[str, np.ndarray]]
Values = dict[str, list[np.ndarray]]  # name of a graph's output -> its values, call by call


@dataclass(frozen=True)
class Tap:
    """A node whose outputs a module of the student computes too: `outputs` are its value, then its new states."""

    node: str  # "/layers.0/scan"
    op: str  # of ai.dfssm; "Embedding" and "Residual" for what standard ops compute
    module: str  # of the student: "layers.0.scan"
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """`node` with dots."""
        return _dotted(self.node)

    def output(self, name: str) -> str:
        """What the schema of the op calls the output `name`."""
        schema = ALL_OPS.get(self.op)
        return schema.outputs[self.outputs.index(name)].name if schema else name.rpartition("/")[2]


def write_tapped(source: Path, folder: Path) -> list[Tap]:
    """Write the graph `source` with all its taps as outputs to `folder`/TAPPED. Returns the taps in its order.

    The head has none: its value is the output `logits`.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    taps = []
    for node in graph.node:
        if node.name == _EMBEDDING:
            taps.append(Tap("/embed", "Embedding", "embedding", tuple(node.output)))
        elif node.name.endswith(_RESIDUAL):
            layer = node.name.removesuffix(_RESIDUAL)
            taps.append(Tap(node.name, "Residual", _dotted(layer), tuple(node.output)))
        elif node.domain == DOMAIN and node.op_type != "Int8MatMul":
            taps.append(Tap(node.name, node.op_type, _dotted(node.name), tuple(node.output)))
    inside = {name for tap in taps for name in tap.outputs}
    graph.output.extend(value for value in graph.value_info if value.name in inside)
    onnx.save(model, folder / TAPPED)
    return taps


def write_held(source: Path, folder: Path, taps: list[Tap]) -> None:
    """Write the graph `source` to `folder`/HELD: each op reads what an input `held(NAME)` gives in the place of the
    value NAME that the op of a tap makes, which is an output.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    made = {name for tap in taps for name in tap.outputs}
    read = {name for node in graph.node for name in node.input if name in made}
    for node in graph.node:
        node.input[:] = [held(name) if name in made else name for name in node.input]
    inside = [value for value in graph.value_info if value.name in made]
    graph.output.extend(inside)
    for value in inside:
        if value.name in read:
            graph.input.append(value)
            graph.input[-1].name = held(value.name)
    onnx.save(model, folder / HELD)


def held(name: str) -> str:
    """The input of the graph HELD that stands for a value."""
    return f"{name}.held"


def write_disturbed(source: Path, folder: Path) -> None:
    """Write the graph `source` to `folder`/DISTURBED, with what float sums in another order do: the embedding and the
    residual after each layer are multiplied by 1 +- NOISE, a sign for each channel.
    """
    model = onnx.load(source, load_external_data=False)
    rng = np.random.default_rng(0)

    def disturb(layer: int, value: onnx.ValueInfoProto) -> tuple[onnx.NodeProto, str]:
        disturbed, noise = f"{value.name}.disturbed", f"{value.name}.noise"
        factors = (1 + NOISE * rng.choice([-1, 1], _channels(value))).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(factors, noise))
        return onnx.helper.make_node("Mul", [value.name, noise], [disturbed]), disturbed

    _after_residuals(model.graph, disturb)
    onnx.save(model, folder / DISTURBED)


def write_taps(source: Path, folder: Path) -> None:
    """Write the graph `source` to `folder`/TAPS, with the residual stream as outputs that can be patched: see
    `dfssm.runtime.hidden`.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph

    def show(layer: int, value: onnx.ValueInfoProto) -> tuple[onnx.NodeProto, str]:
        hidden, patch, patched = (f"{name}.{layer}" for name in (HIDDEN, PATCH, PATCHED))
        for name, default, shape in (
            (patch, np.zeros((1, 1, 1), np.float32), ("patches", "one", "channels")),
            (patched, np.zeros((1, 1, 1), bool), ("one", "tokens", "one")),
        ):
            graph.initializer.append(onnx.numpy_helper.from_array(default, name))
            graph.input.append(onnx.helper.make_tensor_value_info(name, graph.initializer[-1].data_type, shape))
        graph.output.append(value)
        graph.output[-1].name = hidden
        return onnx.helper.make_node("Where", [patched, patch, value.name], [hidden], name=f"/{hidden}"), hidden

    _after_residuals(graph, show)
    onnx.save(model, folder / TAPS)


def _after_residuals(
    graph: onnx.GraphProto, make: Callable[[int, onnx.ValueInfoProto], tuple[onnx.NodeProto, str]]
) -> None:
    """Put a node after the embedding, layer 0, and after each layer's residual: `make` gives it and the value that it
    makes, which the nodes after it read in the place of the residual.
    """
    values = {value.name: value for value in graph.value_info}
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        if node.name == _EMBEDDING or node.name.endswith(_RESIDUAL):
            (name,) = node.output
            new, renamed[name] = make(len(renamed), values[name])
            nodes.append(new)
    del graph.node[:]
    graph.node.extend(nodes)


def _channels(value: onnx.ValueInfoProto) -> int:
    size: int = value.type.tensor_type.shape.dim[-1].dim_value
    return size


def link_files(bundle: Bundle, folder: Path) -> None:
    """Links in `folder` to the files that `bundle` has open: what was checked is what is used."""
    for name in bundle.manifest.files:
        (folder / name).symlink_to(f"/proc/self/fd/{bundle.open(name).fileno()}")


def inference(session: Any) -> Infer:
    """An ONNX Runtime session as a function from feeds to outputs."""
    names = [value.name for value in session.get_outputs()]
    return checked(session, lambda feeds: dict(zip(names, session.run(None, feeds), strict=True)))


def checked(session: Any, infer: Infer) -> Infer:
    """`infer`, a way to run `session`, with the errors of ONNX Runtime as DfssmError."""

    def call(feeds: Feeds) -> Mapping[str, np.ndarray]:
        try:
            return infer(feeds)
        except Exception as error:  # they have no common base
            raise run_error(session, error) from error

    return call


def zero_states(session: Any) -> Feeds:
    """The inputs of `session` for one sequence that has read nothing, all but `input_ids`."""
    inputs = [value for value in session.get_inputs() if value.name != "input_ids"]
    return {value.name: np.zeros([1, *value.shape[1:]], DTYPES[value.type]) for value in inputs}


def calls_of(infer: Infer, feeds: Feeds, ids: np.ndarray, calls: list[int]) -> Iterator[Mapping[str, np.ndarray]]:
    """The outputs of each of the `calls`: `ids` i64[1,T], so many tokens each, from the states in `feeds` on."""
    for piece in np.split(ids, np.cumsum(calls)[:-1], axis=1):
        outputs = infer({"input_ids": piece} | feeds)
        yield outputs
        # ssm_state.3: ssm_state_out.3
        feeds = {name: outputs.get(name.replace(".", "_out."), value) for name, value in feeds.items()}


def run(infer: Infer, states: Feeds, ids: np.ndarray, calls: list[int], advance: Callable[[], None]) -> Values:
    """`calls_of`, all of them. `advance` is called after each."""
    values: Values = {}
    for outputs in calls_of(infer, states, ids, calls):
        for name, value in outputs.items():
            values.setdefault(name, []).append(value)
        advance()
    return values


def _dotted(name: str) -> str:
    return name[1:].replace("/", ".")
