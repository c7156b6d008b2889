"""Continuations of shared contexts: exactly what reading each pair from its beginning gives."""

import numpy as np
import pytest
import tiny

from dfssm.eval.continuations import score_continuations

END = tiny.CONFIG.eos_token_id


def random_ids(rng, low, high):
    return rng.integers(0, END, rng.integers(low, high)).tolist()


@pytest.fixture(scope="module")
def requests():
    """Contexts of many lengths, two of them equal, with one to four continuations in no order; one long, one empty."""
    rng = np.random.default_rng(0)
    contexts = [random_ids(rng, 1, 40) for _ in range(6)] + [[END], *([random_ids(rng, 9, 10) for _ in range(3)])]
    pairs = [(context, random_ids(rng, 1, 12)) for context in contexts for _ in range(rng.integers(1, 5))]
    pairs += [([END], random_ids(rng, 150, 160)), ([1, 2], [])]
    return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_reuse_is_reading_each_pair_whole(scorer, requests, plain_log_probs, assert_close, batch):
    done = []
    found = score_continuations(scorer, requests, batch, done.append)
    assert sum(done) == len(found) == len(requests)
    expected = [
        plain_log_probs(scorer, [*context, *continuation])[len(context) - 1 :].sum() if continuation else 0
        for context, continuation in requests
    ]
    assert_close(scorer, [value for value, _ in found], expected, 1e-4)


def test_greedy_is_what_decoding_gives(scorer):
    logits, state = scorer.read(np.array([[1, 2, 3]]), scorer.new_state(1))
    greedy = []
    for _ in range(5):
        greedy.append(int(logits[0].argmax()))
        logits, state = scorer.read(np.array([greedy[-1:]]), state)
    other = [*greedy[:4], (greedy[4] + 1) % END]
    found = score_continuations(scorer, [([1, 2, 3], greedy), ([1, 2, 3], other), ([1, 2, 3], greedy[:1])])
    assert [likely for _, likely in found] == [True, False, True]


def test_a_context_is_read_once(scorers, requests, monkeypatch):
    scorer, tokens = scorers["bundle"], []
    read = scorer.read
    monkeypatch.setattr(scorer, "read", lambda ids, state: tokens.append(ids.size) or read(ids, state))
    score_continuations(scorer, requests)
    assert sum(tokens) == sum(map(len, {tuple(context) for context, continuation in requests if continuation}))


def test_an_engine_of_few_rows_gets_no_more(scorers, requests, assert_close, monkeypatch):
    scorer = scorers["bundle"]
    expected = score_continuations(scorer, requests)
    monkeypatch.setattr(scorer, "max_batch", 1)
    batches = []
    new_state = scorer.engine.new_state
    monkeypatch.setattr(scorer.engine, "new_state", lambda batch=1: batches.append(batch) or new_state(batch))
    found = score_continuations(scorer, requests, 8)
    assert set(batches) == {1}
    assert_close(scorer, [value for value, _ in found], [value for value, _ in expected], 1e-4)
