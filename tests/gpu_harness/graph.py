"""A lowered step graph, node by node: the plugins do what they do in an engine, torch does the rest.

A graph is a dict of plain values and tensors, as pack.py exports it:
`nodes`: each {"op", "name", "inputs", "outputs", "attributes", "plugin"}; `weights`: name -> tensor, or (dtype, shape)
of one to be made of random bytes; `states`: name -> (dtype, shape of one row).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .plugins import Library, Plugin

Graph = dict[str, Any]

PLUGINS = "every plugin"


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])


# What a lowered graph has beside plugins: the embedding, and the choice of the tokens whose logits are wanted. Shapes
# and axes are on the host, so that nothing waits for the device.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Gather": lambda table, places, axis: table[(slice(None),) * axis + (places,)],
    "Unsqueeze": lambda x, axes: x.unsqueeze(axes.item()),
    "Cast": lambda x, to: x.to(to),
    "Floor": torch.floor,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),  # of whole numbers only
    "Reshape": _reshape,
}


def state_of(output: str) -> str:
    """`ssm_state_out.3` is the next `ssm_state.3`."""
    return output.replace("_out.", ".")


class Weights:
    """The weights of a graph on the device."""

    def __init__(self, library: Library, graph: Graph):
        self.library, self.graph = library, graph
        self.of = {name: self._made(value) for name, value in graph["weights"].items()}

    def _made(self, value: Tensor | tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
        if isinstance(value, Tensor):
            return value if value.dtype == torch.int64 else self.library.put(value)
        made = self.library.empty(value[1], value[0])
        made.view(torch.int8).random_(-127, 128)
        return made

    def bytes(self) -> int:
        """Of what a step reads whole: every weight of a plugin, once."""
        read = {name for node in self.graph["nodes"] if node["plugin"] for name in node["inputs"]}
        return sum(self.of[name].nbytes for name in read & self.of.keys())


class Session:
    """A graph for calls of `ids` [rows, tokens] from and to `states`, which are updated in place."""

    def __init__(self, weights: Weights, rows: int, tokens: int, states: dict[str, Tensor] | None = None):
        self.library, self.weights, self.graph = weights.library, weights, weights.graph
        self.ids = torch.zeros(rows, tokens, dtype=torch.int64, device=self.library.device)
        self.last = torch.full((1,), tokens - 1, dtype=torch.int64, device=self.library.device)
        self.states = states or {
            name: self.library.empty((rows, *shape), dtype).zero_()
            for name, (dtype, shape) in self.graph["states"].items()
        }
        self._plugins: dict[str, Plugin] = {}
        self._of_torch: dict[str, Tensor] = {}
        self._workspace = self.library.empty((0,), torch.uint8)
        last = {name: i for i, node in enumerate(self.graph["nodes"]) for name in node["inputs"]}
        self._done = [[name for name, at in last.items() if at == i] for i in range(len(self.graph["nodes"]))]

    def set_states(self, states: dict[str, Tensor]) -> None:
        for name, value in states.items():
            self.states[name].copy_(value)

    def run(self, only: str = "") -> Tensor:
        """Queue a call; returns its logits [rows, 1, vocabulary], on the device. `only`: nothing but the plugins of
        this op, or all PLUGINS; torch's part, of which an engine makes one kernel, is that of the call before.
        """
        values = {"input_ids": self.ids, "logits_at": self.last, **self.states}
        for node, done in zip(self.graph["nodes"], self._done, strict=True):
            inputs = [values[name] if name in values else self.weights.of[name] for name in node["inputs"]]
            if node["plugin"]:
                outputs = self._launch(node, inputs, launched=only in ("", PLUGINS, node["op"]))
            else:
                if not only:
                    self._of_torch[node["name"]] = OPERATIONS[node["op"]](*inputs, **node["attributes"])
                outputs = [self._of_torch[node["name"]]]
            values |= zip(node["outputs"], outputs, strict=True)
            for name in done:
                if name not in self.states:
                    values.pop(name, None)
        return values["logits"]

    def _launch(self, node: dict[str, Any], inputs: list[Tensor], launched: bool) -> list[Tensor]:
        if node["name"] not in self._plugins:
            plugin = Plugin(self.library, node["op"], node["name"], node["attributes"], inputs)
            self._plugins[node["name"]] = plugin
            if plugin.workspace > self._workspace.nbytes:
                self._workspace = self.library.empty((plugin.workspace,), torch.uint8)
        plugin = self._plugins[node["name"]]
        outputs = [
            self.states[state_of(name)] if state_of(name) in self.states else self.library.empty(shape, dtype)
            for name, (dtype, shape) in zip(node["outputs"], plugin.outputs, strict=True)
        ]
        if launched:
            plugin.enqueue(inputs, outputs, self._workspace)
        return outputs

    def capture(self, only: str = "") -> Recording:
        """`run` as a CUDA graph. It runs once beforehand, to make the plugins: the states have gone on by one call."""
        self.run()
        return Recording(self.library.device, lambda: self.run(only))

    def bytes(self) -> int:
        """The least traffic of a call: every weight once, states read and written."""
        return self.weights.bytes() + 2 * sum(state.nbytes for state in self.states.values())


class Recording:
    """What `work` queues, to be queued again as one CUDA graph; over the emulation it just runs again."""

    def __init__(self, device: str, work: Callable[[], Tensor]):
        self._graph, self._work = None, work
        if device == "cuda":
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.result = work()

    def replay(self) -> Tensor:
        if self._graph:
            self._graph.replay()
        else:
            self.result = self._work()
        return self.result
