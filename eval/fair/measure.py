"""What a model is worth on documents of a synthetic language, and how far it is from its teacher there."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dfssm.eval.perplexity import divergence
from dfssm.eval.scorer import Scorer, log_probs

from .language import END, Document

BATCH = 64


def measure(scorer: Scorer, reference: Scorer, documents: Iterable[Document]) -> dict[str, float]:
    """Figures of a model on `documents`, each read after END and from a zero state.

    perplexity; ratio: to that of `reference`. kl: mean KL(reference || model), nats a token. same_top: share of the
    tokens for which both hold the same one for the likeliest. known: share of the tokens which can be known that the
    model holds for the likeliest.
    """
    nats, theirs, kl, tokens, known = 0.0, 0.0, 0.0, 0, 0
    same = right = 0
    batch: list[Document] = []
    for document in [*documents, None]:
        if document is not None:
            batch.append(document)
        if not batch or (document is not None and len(batch) < BATCH):
            continue
        ids, real, can_be_known = _padded(batch)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        logits, wanted = (model.logits(inputs, model.new_state(len(batch)))[0] for model in (scorer, reference))
        log_p, likeliest = log_probs(logits, targets)
        nats -= log_p[real].sum()
        theirs -= log_probs(wanted, targets)[0][real].sum()
        kl += divergence(wanted, logits)[real].sum()
        same += int((wanted.argmax(-1) == logits.argmax(-1))[real].sum())
        right += int(likeliest[can_be_known].sum())
        tokens, known = tokens + int(real.sum()), known + int(can_be_known.sum())
        batch = []
    return {
        "perplexity": math.exp(nats / tokens),
        "ratio": math.exp((nats - theirs) / tokens),
        "kl": kl / tokens,
        "same_top": same / tokens,
        "known": right / known,
    }


def _padded(documents: list[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids i64[n,L+1], END before and behind each document; which of the L tokens after the first are real, and which
    can be known: bool[n,L].
    """
    longest = max(len(document.ids) for document in documents)
    ids = np.full((len(documents), longest + 1), END)
    real, known = (np.zeros((len(documents), longest), bool) for _ in range(2))
    for row, document in enumerate(documents):
        count = len(document.ids)
        ids[row, 1 : count + 1], real[row, :count], known[row, :count] = document.ids, True, document.known
    return ids, real, known
