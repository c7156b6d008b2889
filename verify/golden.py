"""Goldens: what the verified graph computed over a few tokens, kept in the bundle and compared where the bundle runs.

They are taken from the step graph right after it was verified op by op. An engine shows no values inside, so what is
compared is what every backend has: logits and states after each call. Of each there is a hash, and a digest: sums of
all its numbers with signs, whose rms error is that of the numbers.

Backends drift apart in a deep model (`student`): so the graph also ran with float noise at each layer, and how far that
moved each value is what decides on its tolerance. The kernels that made the goldens must give the same bits again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dfssm.base import DfssmError
from dfssm.base.files import writing
from dfssm.base.paths import GOLDEN
from dfssm.base.threads import default_threads
from dfssm.opset.tolerances import Tolerance, drift_tolerance, half_tolerance, rms_error
from dfssm.runtime.engine import Engine
from dfssm.runtime.opening import open_backend
from dfssm.runtime.sampling import Sampling
from dfssm.targets import Target, get_target, trust
from dfssm.targets.bundle import MODEL, Bundle, Manifest, open_bundle

from .difference import widened

FORMAT = "dfssm-golden"
VERSION = 1

TOKENS, STEPS = 32, 2
"""Tokens before the last steps, the first of them alone, the others as a prompt; and at most so many such steps."""

CHOICE = "choice"
"""Of the token, which some backends make by themselves: compared with the logits beside it, not with goldens."""

SEED = 1
SUMS = 16  # of a digest

Progress = Callable[[int, int], None]
Observed = tuple[np.ndarray, np.ndarray]  # after a call: digests f32[names,SUMS], hashes u8[names,8]


@dataclass(frozen=True)
class Golden:
    """The contents of golden.safetensors. `names`: the states, layer by layer, without scales, then "logits". `drift`:
    rms, by name, the most of all calls. `logits` are those after the first call and after the last.
    """

    names: tuple[str, ...]
    ids: np.ndarray  # i64[T]
    calls: np.ndarray  # i64[calls]: tokens of each, T in all
    digests: np.ndarray  # f32[calls,names,SUMS]
    hashes: np.ndarray  # u8[calls,names,8]
    drift: np.ndarray  # f32[names]
    logits: np.ndarray  # f32[2,V]
    kernels: str  # that give these bits again; "" if none need

    def to_bytes(self) -> bytes:
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(self).items() if name in _DTYPES}
        about = {"version": VERSION, "names": self.names, "kernels": self.kernels}
        return safetensors.numpy.save(arrays, {FORMAT: json.dumps(about)})  # of several keys the order would be random

    @classmethod
    def of(cls, bundle: Bundle) -> Golden:
        """Those of a bundle. DfssmError where it has none, or none that this dfssm can read."""
        path = bundle.folder / GOLDEN
        if GOLDEN not in bundle.manifest.files:
            raise DfssmError(
                f"{bundle.folder} has no {GOLDEN} to be verified with: compile it again, without --no-verify"
            )
        return cls.from_bytes(bundle.read(GOLDEN), path, bundle.manifest.config.get("vocab_size"))

    @classmethod
    def from_bytes(cls, data: bytes, path: Path, vocab: Any) -> Golden:
        """What `to_bytes` wrote, of a model with so many tokens. DfssmError, about `path`, when `data` is not that."""
        try:
            arrays = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"][FORMAT])
            if about["version"] != VERSION:
                raise ValueError(f"it is {FORMAT} version {about['version']}, not {VERSION}")
            golden = cls(tuple(about["names"]), kernels=about["kernels"], **arrays)
            golden._require_whole(vocab)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DfssmError(f"{path} cannot be read ({error}): compile the model again") from None
        return golden

    def _require_whole(self, vocab: Any) -> None:
        count, names = len(self.calls), len(self.names)
        shapes = {
            "ids": (sum(self.calls.tolist()),), "calls": (count,), "digests": (count, names, SUMS),
            "hashes": (count, names, 8), "drift": (names,), "logits": (2, vocab),
        }  # fmt: skip
        for name, shape in shapes.items():
            value = getattr(self, name)
            if (value.shape, value.dtype) != (shape, _DTYPES[name]):
                raise ValueError(f"{name} is {value.dtype}{list(value.shape)}")
        if not count or self.calls.min() < 1 or not 0 <= self.ids.min() <= self.ids.max() < vocab:
            raise ValueError("its tokens are none of the model's")
        if not (self.drift >= 0).all():
            raise ValueError("its drift is no number of 0 or more")


_DTYPES = {
    "ids": np.dtype(np.int64), "calls": np.dtype(np.int64), "digests": np.dtype(np.float32),
    "hashes": np.dtype(np.uint8), "drift": np.dtype(np.float32), "logits": np.dtype(np.float32),
}  # fmt: skip


def make_golden(target: Target, folder: Path, vocab: int, max_tokens: int, progress: Progress) -> Golden:
    """The goldens of the graph in `folder`, opened by `target`, with calls of at most `max_tokens` tokens.

    For as long as it takes, a file lies in `folder`.
    """
    from .graph import DISTURBED, calls_of, inference, write_disturbed, zero_states

    prompt = [min(max_tokens, TOKENS - start) for start in range(1, TOKENS, max_tokens)]
    calls = [1, *prompt, *[1] * min(STEPS, target.VERIFY_STEPS)]
    ids = np.random.default_rng(SEED).integers(0, vocab, (1, sum(calls)))
    runs: list[list[Observed]] = []
    logits: list[np.ndarray] = []
    with writing(folder):
        write_disturbed(folder / MODEL, folder)
    try:
        for graph in (DISTURBED, MODEL):
            session = target.open_session(folder, model=graph)
            states = zero_states(session)
            names = _names(states)
            runs.append([])
            logits.clear()
            for outputs in calls_of(inference(session), states | {"logits_to_keep": np.array(1)}, ids, calls):
                runs[-1].append(_observed(names, {name.replace("_out.", "."): v for name, v in outputs.items()}))
                logits.append(outputs["logits"].reshape(-1))
                progress(sum(map(len, runs)), 2 * len(calls))
    finally:
        (folder / DISTURBED).unlink(missing_ok=True)
    noisy, (digests, hashes) = np.stack([d for d, _ in runs[0]]), map(np.stack, zip(*runs[1], strict=True))
    drift = [max(map(rms_error, noisy[:, i], digests[:, i])) for i in range(len(names))]
    return Golden(
        names, ids[0], np.array(calls), digests, hashes, np.array(drift, np.float32),
        np.stack([logits[0], logits[-1]]), target.kernels() if target.EXACT else "",
    )  # fmt: skip


def verify_here(path: str | Path, threads: int = 0, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Run the bundle at `path` over its goldens and record the result for this user, this bundle and these kernels.

    Returns the result as docs/json.md has it. DfssmError as `Engine.load`, and for a bundle without goldens.
    """
    threads = threads or default_threads()
    with open_bundle(path) as bundle:
        golden, manifest = Golden.of(bundle), bundle.manifest
        engine = Engine(bundle.folder.absolute(), manifest, open_backend(bundle, threads), threads)
        target = get_target(manifest.target)
        kernels = target.kernels(trust.own_library(bundle, target.LIBRARY, asked=False))
    run = trust.run_of(manifest, kernels)
    trust.forget(run, trust.VERIFIED)
    result = compare_with_golden(engine, golden, target.EXACT and golden.kernels == kernels, progress)
    if result["passed"]:
        trust.record(run, trust.VERIFIED)
    return {"target": manifest.target, "kernels": kernels} | result


def compare_with_golden(engine: Engine, golden: Golden, exact: bool, progress: Progress) -> dict[str, Any]:
    """Run `engine` over the tokens of `golden`. With `exact`, its bits must be those of the goldens."""
    if golden.names != _names(engine.backend.layout):
        raise DfssmError(f"{engine.folder / GOLDEN} is of another model: compile the model again")
    tolerances = {name: _tolerance(name, engine.manifest, golden, exact) for name in golden.names}
    tolerances[CHOICE] = Tolerance(0.0, "the greedy choice is the largest logit, the first of equals")
    worst = dict.fromkeys(tolerances, 0.0)
    first, identical = None, True
    state, end = engine.new_state(), 0
    for call, tokens in enumerate(golden.calls.tolist()):
        piece, end = golden.ids[end : end + tokens], end + tokens
        if tokens == 1:
            engine.advance(piece, state)  # leaves the logits on a device, which then chooses
        else:
            engine.prefill(piece, state)
        chosen, _ = engine.choose(state, Sampling())
        engine.require_finite(state)
        digests, hashes = _observed(golden.names, {**state.tensors, "logits": state.logits})
        differ = {
            name
            for name, ours, theirs in zip(golden.names, hashes, golden.hashes[call], strict=True)
            if any(ours != theirs)
        }
        identical &= not differ
        errors = dict(zip(golden.names, map(rms_error, digests, golden.digests[call]), strict=True))
        errors[CHOICE] = float(chosen != state.logits[0].argmax())
        for name, error in errors.items():
            worst[name] = max(worst[name], error)
            if first is None and (error > tolerances[name].relative or exact and name in differ):
                first = {"token": end, "output": name, "rms_rel": error} | _limit(tolerances[name])
        progress(call + 1, len(golden.calls))
    return {
        "passed": first is None,
        "exact": exact,
        "identical": identical,
        "tokens": int(golden.calls.sum()),
        "calls": golden.calls.tolist(),
        "first": first,
        "outputs": {name: {"rms_rel": worst[name]} | _limit(tolerances[name]) for name in ("logits", *tolerances)},
    }


def _limit(tolerance: Tolerance) -> dict[str, Any]:
    return {"tolerance": tolerance.relative, "reason": tolerance.reason}


def _tolerance(name: str, manifest: Manifest, golden: Golden, exact: bool) -> Tolerance:
    if exact:
        return Tolerance(0.0, "the kernels that made the goldens give the same bits again")
    layers = manifest.config["n_layer"] if name == "logits" else int(name.rpartition(".")[2]) + 1
    bound = drift_tolerance(layers, manifest.config["d_model"], float(golden.drift[golden.names.index(name)]))
    if (manifest.engine or {}).get("activations") == "fp16":
        return Tolerance(bound.relative + half_tolerance(layers).relative, f"{bound.reason}; activations in fp16")
    return bound


def _names(states: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the graph's states those that are compared, in the order in which the layers compute them."""
    names = (name for name in states if not name.startswith("ssm_scale."))
    return (*sorted(names, key=lambda name: (int(name.rpartition(".")[2]), name)), "logits")


def _observed(names: Sequence[str], values: Mapping[str, np.ndarray]) -> Observed:
    """Of the `values` after a call of one row; an int8 state is taken with its scales."""
    digests, hashes = [], []
    for name in names:
        numbers = widened(values, name)
        digests.append(_digest(numbers))
        hashes.append(np.frombuffer(hashlib.sha256(numbers.tobytes()).digest()[:8], np.uint8))
    return np.stack(digests), np.stack(hashes)


def _digest(numbers: np.ndarray) -> np.ndarray:
    """f32[SUMS]: stretches of all numbers, end to end, added up with signs."""
    starts = np.linspace(0, numbers.size, SUMS, endpoint=False).astype(int)
    signed = numbers.reshape(-1) * _signs(numbers.size)
    return np.add.reduceat(signed, starts, dtype=np.float64).astype(np.float32)


@cache
def _signs(count: int) -> np.ndarray:
    """+-1, by a hash of the index: the same with every NumPy, as a generator's draws need not be."""
    bits = np.arange(count, dtype=np.uint32)
    for _ in range(2):
        bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x45D9F3B)
    return 1 - 2 * (bits >> np.uint32(31)).astype(np.int8)
