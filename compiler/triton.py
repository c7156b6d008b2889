"""A model repository for NVIDIA's Triton Inference Server: one model, its config.pbtxt, the bundle as its version 1.

Triton's sequence batcher keeps the states of each sequence between its requests ("implicit state"). A request brings
tokens and gets the logits of the last one. docs/triton.md has how to serve it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfssm.base.paths import OF_REPOSITORY
from dfssm.opset.sizes import Sizes
from dfssm.targets import Target
from dfssm.targets.bundle import ENGINE, MODEL

BUNDLE, REPOSITORY = "bundle", "triton-repository"

FORMS = {BUNDLE: "", REPOSITORY: OF_REPOSITORY}
"""What dfcompile writes -> where in it the bundle lies."""

CONFIG = "config.pbtxt"

GRAPH = f"triton.{MODEL}"
"""The step graph for the logits of the last token alone: `logits_to_keep` is a constant. It has no row for each
sequence, and so can be no input for Triton."""

MAX_BATCH = 8
"""Sequences in a run of ONNX Runtime; an engine has its own limit."""

CANDIDATES = 64
"""Sequences that may be there at a time, each with its state."""

IDLE = 60_000_000
"""Microseconds after which Triton forgets a sequence that is not ended."""

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int8": "TYPE_INT8"}


class _Name(str):
    """A value that is written without quotes: one of an enumeration."""


def write(
    folder: Path, backend: str, target: Target, config: Any, state_dtype: str, engine: Mapping[str, Any]
) -> list[str]:
    """Write config.pbtxt beside the bundle's `folder`; returns the names of files that it adds to the bundle.

    `config`: the student's DFSSMConfig. `engine`: as in the manifest.
    """
    text = config_text(backend, target, config, state_dtype, engine)
    (folder.parent / CONFIG).write_text(text, encoding="utf-8")
    if target.IS_ENGINE:
        return []
    _write_graph(folder)
    return [GRAPH]


def config_text(backend: str, target: Target, config: Any, state_dtype: str, engine: Mapping[str, Any]) -> str:
    """The text of config.pbtxt: a ModelConfig of Triton's protocol buffers."""
    document: dict[str, Any] = {
        "backend": backend,
        "default_model_filename": ENGINE if target.IS_ENGINE else GRAPH,
        "max_batch_size": engine["profiles"][-1]["max"][0] if target.IS_ENGINE else MAX_BATCH,
        "input": {"name": "input_ids", "data_type": _Name("TYPE_INT64"), "dims": [-1]},
        "output": {"name": "logits", "data_type": _Name("TYPE_FP32"), "dims": [1, config.vocab_size]},
        "sequence_batching": {
            "max_sequence_idle_microseconds": IDLE,
            "oldest": {"max_candidate_sequences": CANDIDATES},
            "state": list(_states(config, config.n_layer, state_dtype)),
        },
    }
    if target.IS_ENGINE:
        profiles = [str(index) for index in range(len(engine["profiles"]))]
        document["instance_group"] = {"count": 1, "kind": _Name("KIND_GPU"), "profile": profiles}
    else:
        document["instance_group"] = {"count": 1, "kind": _Name("KIND_CPU")}
        # A step is a chain of nodes; 0 threads are one a core.
        settings = {"execution_mode": "0", "inter_op_thread_count": "1", "intra_op_thread_count": "0"}
        document["parameters"] = [{"key": key, "value": {"string_value": text}} for key, text in settings.items()]
        if target.LIBRARY:
            library = f"{FORMS[REPOSITORY]}/{target.LIBRARY}"
            document["model_operations"] = {"op_library_filename": library}
    return "".join(f"{line}\n" for line in _lines(document))


def _states(sizes: Sizes, layers: int, state_dtype: str) -> Iterator[dict[str, Any]]:
    for layer in range(layers):
        for kind, (dtype, shape) in sizes.states(state_dtype).items():
            tensor = {"data_type": _Name(_TYPES[dtype]), "dims": list(shape)}
            yield {
                "input_name": f"{kind}.{layer}",
                "output_name": f"{kind}_out.{layer}",
                **tensor,
                "initial_state": {"name": "zero", **tensor, "zero_data": True},
                "use_same_buffer_for_input_output": True,
            }


def _write_graph(folder: Path) -> None:
    import onnx

    model = onnx.load(folder / MODEL, load_external_data=False)
    (keep,) = (tensor for tensor in model.graph.initializer if tensor.name == "logits_to_keep")
    keep.CopyFrom(onnx.helper.make_tensor(keep.name, keep.data_type, keep.dims, [1]))
    (entry,) = (value for value in model.graph.input if value.name == keep.name)
    model.graph.input.remove(entry)
    onnx.save(model, folder / GRAPH)


def _lines(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Fields in the text format of protocol buffers; a list of mappings is a repeated field."""
    for name, value in fields.items():
        messages = [value] if isinstance(value, Mapping) else value
        if not (isinstance(messages, list) and isinstance(messages[0], Mapping)):
            yield f"{indent}{name}: {value if isinstance(value, _Name) else json.dumps(value)}"
            continue
        for message in messages:
            yield f"{indent}{name} {{"
            yield from _lines(message, indent + "  ")
            yield f"{indent}}}"
