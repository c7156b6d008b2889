"""A student, or its bundle, against its teacher: what the rounding of the projections does to the recurrence.

Both read the same tokens, each on its own hidden states. Of every layer are compared, token by token: the discretised
A = exp(-exp(A_log) d) of each head, the output y of the scan, and the state h = A h + d B (x) x after the token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dfssm.base import DfssmError, paths
from dfssm.base.files import temporary_folder
from dfssm.model.config import Mamba2Config
from dfssm.model.functional import discretize, selective_scan_step
from dfssm.model.hf_import import load_teacher
from dfssm.model.student import load_student
from dfssm.model.teacher import Mamba2LM, Mamba2State
from dfssm.model.text import batches, documents, text_files
from dfssm.opset.schema import DEFERRED
from dfssm.targets import get_target
from dfssm.targets.bundle import MODEL, TOKENIZER, Manifest, open_bundle
from dfssm.targets.text import document, encode_documents, end_tokens, load_tokenizer
from dfssm.targets.trust import own_library

from .difference import widened
from .graph import TAPPED, inference, link_files, write_tapped, zero_states

SEED = 0

PIECE = 64
"""Tokens that a model in PyTorch reads at once."""


@dataclass
class Scan:
    """What the scan of a layer did over some tokens, all fp32: decay[T,H], y[T,H*P], and the states [H,N,P] after each
    token, which are made one by one.
    """

    decay: Tensor
    y: Tensor
    states: Iterator[Tensor]


class Source(Protocol):
    """What goes over a text: `read` takes the next tokens, ids i64[T], and gives the scan of each layer."""

    config: Mamba2Config

    def read(self, ids: np.ndarray) -> list[Scan]: ...


def compare_teacher(
    model: Path, teacher: Path, data: Sequence[str | Path], tokens: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Errors of the student in `model`, its file or a bundle of it, against `teacher`, layer by layer.

    Over the first `tokens` tokens of `data` (text files, and folders of them), else over so many random ones. Returns
    what docs/json.md says. DfssmError where the two are of other shapes, where a bundle shows no states, or where the
    data hold no text.
    """
    wanted = Watched(load_teacher(teacher))
    ids = text_ids(data, teacher, wanted.config, tokens) if data else _random_ids(wanted.config, tokens)
    with ExitStack() as stack:
        kind, place = paths.find(model, "student", "bundle")
        student: Source = Watched(load_student(place)) if kind == "student" else stack.enter_context(_Stepped(place))
        found = [_Errors() for _ in range(_common_layers(student, wanted, model, teacher))]
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            for errors, ours, theirs in zip(found, student.read(piece), wanted.read(piece), strict=True):
                errors.add(start, ours, theirs)
            progress(start + len(piece), len(ids))
    return {
        "model": str(model),
        "kind": kind,
        "teacher": str(teacher),
        "data": [str(path) for path in data],
        "tokens": len(ids),
        "layers": [errors.figures() for errors in found],
    }


def text_ids(data: Sequence[str | Path], teacher: Path, config: Mamba2Config, tokens: int) -> np.ndarray:
    """The first `tokens` ids of the documents in `data`, each ended as in training; fewer where there are no more."""
    give = "the teacher's own tokenizer.json beside its weights"
    tokenizer = load_tokenizer(paths.file(teacher / TOKENIZER, give), give, config.vocab_size)
    end, *_ = end_tokens(config.eos_token_id, tokenizer) or (0,)
    ids: list[int] = []
    for texts in batches(chain.from_iterable(map(documents, text_files(data)))):
        for found in encode_documents(texts, tokenizer):
            ids += document(found, end)
        if len(ids) >= tokens:
            break
    if not ids:
        raise DfssmError(f"{', '.join(map(str, data))}: there is no text to read; give --data more")
    return np.array(ids[:tokens])


def _random_ids(config: Mamba2Config, tokens: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, config.vocab_size, tokens)


def _common_layers(student: Source, teacher: Source, model: Path, folder: Path) -> int:
    """Their number of layers. DfssmError where the states of the two do not have one shape."""
    shapes = [(c.vocab_size, c.n_layer, *c.states()["ssm_state"][1]) for c in (student.config, teacher.config)]
    if shapes[0] != shapes[1]:
        words = [f"{v} tokens, {n} layers and states of {h} x {s} x {p}" for v, n, h, s, p in shapes]
        raise DfssmError(f"{model} has {words[0]}, {folder} {words[1]}: give the teacher that it was made from")
    return shapes[0][1]


class Watched:
    """A model in PyTorch whose scans are watched, teacher or student."""

    def __init__(self, model: Mamba2LM):
        self.model = model.requires_grad_(False).eval()
        self.config = model.config
        self._state: Mamba2State | None = None
        self._found: list[Scan] = []
        for name, module in model.named_modules():
            if name.endswith(".scan"):
                module.register_forward_hook(self._hook)

    def read(self, ids: np.ndarray) -> list[Scan]:
        self._found = []
        with torch.inference_mode():
            _, self._state = self.model(torch.from_numpy(ids)[None], self._state, logits_to_keep=1)
        return self._found

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        scan: Any = module
        y = output[0][0].float()
        self._found.append(
            Scan(_decay(inputs[1][0], scan.A_log, scan.dt_bias, scan.dt_limit), y, _states(scan, inputs))
        )


def _decay(dt: Tensor, A_log: Tensor, dt_bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """The discretised A of dt[T,H]: exp(-exp(A_log) d), f32[T,H]."""
    return torch.exp(-A_log.exp() * discretize(dt, dt_bias, limit))


@torch.inference_mode()
def _states(scan: Any, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The state after each token that a scan reads, by the recurrence."""
    *values, state = inputs
    for t in range(values[0].shape[1]):
        x, dt, B, C = (value[:, t : t + 1] for value in values)
        options = {"ngroups": scan.ngroups, "dt_limit": scan.dt_limit}
        _, state = selective_scan_step(x, dt, B, C, scan.A_log, scan.D, scan.dt_bias, state, **options)
        yield state[0]


class _Stepped:
    """A bundle, run a token at a time: the states it stores, as it stores them. A context."""

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        bundle = self._stack.enter_context(open_bundle(folder))
        manifest: Manifest = bundle.manifest
        target = get_target(manifest.target)
        if target.IS_ENGINE:
            raise DfssmError(f"{folder} holds an engine, which shows no scans: give the student it was compiled from")
        if manifest.state_dtype.endswith(DEFERRED):
            raise DfssmError(
                f"{folder} stores its states after every eighth token: give the student it was compiled from, "
                "or compile with --state-dtype fp32, fp16 or int8"
            )
        self.config = Mamba2Config.from_dict(
            {name: value for name, value in manifest.config.items() if name not in ("rank", "planes")}
        )
        place = self._stack.enter_context(temporary_folder("a comparison"))
        link_files(bundle, place)
        self._taps = {tap.node: tap for tap in write_tapped(place / MODEL, place)}
        weights = ir.load(place / MODEL).graph.initializers
        self._A_log, self._dt_bias = (
            [_tensor(weights[f"layers.{i}.scan.{name}"]) for i in range(self.config.n_layer)]
            for name in ("A_log", "dt_bias")
        )
        session = target.open_session(place, model=TAPPED, own=own_library(bundle, target.LIBRARY, asked=False))
        self._infer, self._feeds = inference(session), zero_states(session)

    def __enter__(self) -> _Stepped:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def read(self, ids: np.ndarray) -> list[Scan]:
        layers = range(self.config.n_layer)
        decays, ys, states = ([list[Tensor]() for _ in layers] for _ in range(3))
        for token in ids:
            outputs = self._infer({"input_ids": np.array([[token]])} | self._feeds)
            self._feeds = {name: outputs.get(name.replace(".", "_out."), old) for name, old in self._feeds.items()}
            for i in layers:
                projected = torch.from_numpy(outputs[self._taps[f"/layers.{i}/in_proj"].outputs[0]][0])
                dt = projected[:, -self.config.nheads :]
                decays[i].append(_decay(dt, self._A_log[i], self._dt_bias[i], self.config.dt_limit))
                ys[i].append(torch.from_numpy(outputs[self._taps[f"/layers.{i}/scan"].outputs[0]][0]))
                states[i].append(torch.from_numpy(widened(outputs, f"ssm_state_out.{i}")[0]))
        return [Scan(torch.cat(decays[i]), torch.cat(ys[i]), iter(states[i])) for i in layers]


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value.const_value.numpy()))


class _Error:
    """The root of the mean square of a difference, as a share of that of what the teacher has."""

    def __init__(self) -> None:
        self.squares = self.expected = self.max_abs = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        difference = ours.double() - theirs.double()
        self.squares += float(difference.square().sum())
        self.expected += float(theirs.double().square().sum())
        self.max_abs = max(self.max_abs, float(difference.abs().max()))

    @property
    def rms_rel(self) -> float:
        return math.sqrt(self.squares / self.expected) if self.expected else (math.inf if self.squares else 0.0)

    def figures(self) -> dict[str, Any]:
        return {"rms_rel": self.rms_rel, "max_abs": self.max_abs}


class _Errors:
    """The errors of a layer; `states` those after tokens 1, 2, 3 to 4, 5 to 8 and so on, by the last of them."""

    def __init__(self) -> None:
        self.decay, self.y = _Error(), _Error()
        self.states: dict[int, _Error] = {}

    def add(self, start: int, ours: Scan, theirs: Scan) -> None:
        """Of some tokens, after the first `start`."""
        self.decay.add(ours.decay, theirs.decay)
        self.y.add(ours.y, theirs.y)
        for token, pair in enumerate(zip(ours.states, theirs.states, strict=True), start + 1):
            self.states.setdefault(1 << (token - 1).bit_length(), _Error()).add(*pair)

    def figures(self) -> dict[str, Any]:
        state = _Error()
        for error in self.states.values():
            state.squares, state.expected = state.squares + error.squares, state.expected + error.expected
            state.max_abs = max(state.max_abs, error.max_abs)
        figures = {name: error.figures() for name, error in (("decay", self.decay), ("y", self.y), ("state", state))}
        figures["state"]["by_tokens"] = {str(last): error.rms_rel for last, error in self.states.items()}
        return figures
