"""States, and models, of which is known what a study must find."""

from __future__ import annotations

import numpy as np

from dfssm.analysis.prompts import Prompt, Prompts
from dfssm.analysis.subject import Subject
from dfssm.opset.hidden import Hidden, hidden_of_rows


def states_of_separation(labels: np.ndarray, wanted: list[float]) -> np.ndarray:
    """f64[L,N,D] whose cosine is wanted[l] within a label and 0 between: directions of the label and of the prompt."""
    count, kinds = len(labels), labels.max() + 1
    own, of_label = np.eye(kinds + count)[kinds:], np.eye(kinds + count)[labels]
    sizes = 1 + np.arange(count)[:, None]  # of no meaning for a cosine
    return np.stack([sizes * (np.sqrt(a) * of_label + np.sqrt(1 - a) * own) for a in wanted])


def prompts_of(labels: np.ndarray, answers: np.ndarray, templates: int = 1) -> Prompts:
    """A prompt of one token, its own number, of each label; `answers` are tokens."""
    rows = [
        Prompt(f"prompt {i}", f"answer {a}", f"category {label}", f"wording {i % templates}")
        for i, (label, a) in enumerate(zip(labels, answers, strict=True))
    ]
    return Prompts(
        tuple(rows), [np.array([i]) for i in range(len(rows))], np.asarray(answers), np.ones(len(rows), bool)
    )


class Table:
    """A model whose states are written down, f32[L+1,N,D]: those of prompt i are of the one token i. Its head gives the
    state itself. A patch replaces a state; the layers after it add what they add to the prompt's own.
    """

    def __init__(self, states: np.ndarray):
        self.states = states.astype(np.float32)
        self.config = {"n_layer": len(states) - 1, "d_model": states.shape[2], "vocab_size": states.shape[2]}

    def hidden(self, ids, layers=None, last=True, patch=None) -> Hidden:
        def run(ids, layers, last, patch):
            own = self.states[:, ids[:, -1]]
            shown = [own[0]]
            for layer in range(len(own)):
                if layer:
                    shown.append(shown[-1] + own[layer] - own[layer - 1])
                shown[-1] = patch.get(layer, shown[-1])
            return np.array([shown[layer] for layer in layers]).reshape(len(layers), *shown[0].shape), shown[-1]

        rows = [np.atleast_1d(row) for row in ids]
        return hidden_of_rows(run, rows, self.config["n_layer"], self.config["d_model"], layers, last, patch)


def subject(model: Table, name: str = "planted") -> Subject:
    return Subject(name, "teacher", model, model.config, name, tokenizer=None)
