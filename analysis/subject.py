"""What is studied: a teacher, a student or a bundle, behind one interface, and its twin with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.extras import require
from dfssm.base.hashing import sha256
from dfssm.base.reading import open_file
from dfssm.model import PACKAGES
from dfssm.opset.hidden import Hidden, Patch
from dfssm.targets.bundle import TOKENIZER
from dfssm.targets.text import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GIVE = "the tokenizer.json of the model with --tokenizer"
_ROWS = 64  # whose logits are made at once: of 50,288 tokens 13 MB


class Model(Protocol):
    """As `Engine.hidden` says; an Engine, a Mamba2LM and a DFSSMLM are such."""

    def hidden(
        self, ids: Any, layers: Sequence[int] | None = None, last: bool = True, patch: Patch | None = None
    ) -> Hidden: ...


@dataclass(frozen=True)
class Subject:
    """`key` tells its weights from others. `kind`: "teacher", "student", "bundle" or "random"."""

    name: str
    kind: str
    model: Model
    config: dict[str, Any]
    key: str
    tokenizer: Tokenizer

    @property
    def n_layer(self) -> int:
        found: int = self.config["n_layer"]
        return found

    def logits(self, states: np.ndarray) -> np.ndarray:
        """What the head makes of states f32[n,D]: f32[n,V]. It reads the last layer, where they are put."""
        made = []
        for start in range(0, len(states), _ROWS):
            some = np.ascontiguousarray(states[start : start + _ROWS], np.float32)
            ids = np.zeros((len(some), 1), np.int64)
            made.append(self.model.hidden(ids, layers=(), patch={self.n_layer: some}).logits)
        return np.concatenate(made)


def open_subject(path: str | Path, tokenizer: str | Path | None = None) -> Subject:
    """Open what lies at `path`. `tokenizer`: of a model without one.

    Raises DfssmError when there is no model, no tokenizer, torch is needed and missing, or a bundle has no taps.
    """
    kind, place = paths.find(path, "teacher", "student", "bundle")
    if kind == "bundle":
        from dfssm.runtime import Engine

        engine = Engine.load(place)
        words = load_tokenizer(Path(tokenizer), _GIVE) if tokenizer else engine.tokenizer
        engine.hidden([0], layers=())  # a bundle without taps is refused before any work
        key = f"bundle {engine.model} {engine.manifest.model_sha256}"
        return Subject(str(path), kind, engine, engine.config, key, words)
    require(PACKAGES)
    from dfssm.model.hf_import import load_teacher
    from dfssm.model.student import load_student

    file = tokenizer or (place if kind == "teacher" else place.parent) / TOKENIZER
    words = load_tokenizer(paths.file(file, _GIVE, TOKENIZER), _GIVE)
    model = load_teacher(place) if kind == "teacher" else load_student(place)
    config, files = model.config.to_dict(), [place] if kind == "student" else sorted(place.glob("*.[sb]*"))
    digests = []
    for one in files:
        with open_file(one) as content:
            digests.append(sha256(content))
    return Subject(str(path), kind, model.eval(), config, f"{kind} {' '.join(digests)}", words)


def random_twin(subject: Subject, seed: int = 0) -> Subject:
    """A model of the same shape and arithmetic with random weights: a student's for a bundle, too."""
    require(PACKAGES)
    import torch

    from dfssm.model.config import DFSSMConfig, Mamba2Config
    from dfssm.model.convert import init_student
    from dfssm.model.student import from_tensors
    from dfssm.model.teacher import Mamba2LM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if subject.kind == "teacher":
            model = Mamba2LM(Mamba2Config.from_dict(subject.config)).eval()
        else:
            model = from_tensors(*init_student(DFSSMConfig.from_dict(subject.config), seed))
    shape = sorted((name, str(value)) for name, value in subject.config.items())
    return Subject("random weights", "random", model, subject.config, f"random {seed} {shape}", subject.tokenizer)


def require_comparable(subject: Subject, other: Subject) -> None:
    """DfssmError unless the two have one vocabulary, number of layers and width: then layer answers to layer."""
    for name in ("vocab_size", "n_layer", "d_model"):
        ours, theirs = subject.config[name], other.config[name]
        if ours != theirs:
            raise DfssmError(
                f"{subject.name} has {name} {ours}, {other.name} {theirs}: give the teacher it was made of"
            )
