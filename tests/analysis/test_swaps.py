"""A network with a known flip layer, its ranks and tokens: written down, and a Mamba-2 of which one layer mixes."""

import numpy as np
import pytest
import torch
from planted import Table, prompts_of, subject

from dfssm.analysis.gram import one_hot
from dfssm.analysis.lens import directions, hits, rank_trajectories, ranks
from dfssm.analysis.subject import Subject
from dfssm.analysis.swaps import choose, flip_layers, swap
from dfssm.model.config import Mamba2Config
from dfssm.model.teacher import Mamba2LM


def silent(done, total):
    pass


@pytest.mark.parametrize("flip", [1, 3, 4])
def test_a_mamba_of_which_one_layer_mixes_flips_there(flip):
    """All other layers add nothing, so up to it the last token's states are equal, and after it they are the answer."""
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config(vocab_size=50, d_model=32, n_layer=4, headdim=8, d_state=16)).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.layers, 1):
            layer.out_proj.weight *= 40 if i == flip else 0
    ids = [np.array([i, i + 10, 40]) for i in range(6)]
    plain = model.hidden(ids)
    own = (plain.logits - plain.logits.mean(0)).argmax(1)  # what each says more than the others
    assert len(set(own.tolist())) == 6
    prompts = prompts_of(np.zeros(6, int), own)
    prompts.ids[:] = ids
    known = Subject("mamba", "teacher", model, model.config.to_dict(), "", tokenizer=None)
    swaps = swap(known, prompts, np.arange(6), plain.states, silent)
    margins, pairs = swaps.margins(np.arange(6))
    assert len(pairs) > 10 and set(flip_layers(margins).tolist()) == {flip}
    assert (margins[:flip] < 0).all() and (margins[flip:] > 0).all()


def test_pairs_that_do_not_know_their_answers_are_not_counted():
    own = np.eye(4)[[0, 1, 1, 3]]  # the third prompt says the second's answer
    model = Table(np.stack([np.ones((4, 4)), own]))
    swaps = swap(subject(model), prompts_of(np.zeros(4, int), np.arange(4)), np.arange(4), model.states, silent)
    margins, pairs = swaps.margins(np.arange(4))
    known = [(int(a), int(b)) for a, b in zip(swaps.base[pairs], swaps.donor[pairs], strict=True)]
    assert len(swaps.base) == 12 and known == [(a, b) for a in (0, 1, 3) for b in (0, 1, 3) if a != b]
    assert flip_layers(margins).tolist() == [1] * 6
    exchanged, _ = swaps.margins(np.array([1, 0, 3, 2]))
    assert exchanged.shape == (2, 0)  # none says the answer of another


def test_the_first_prompts_of_the_most_frequent_wording_with_different_answers_are_paired():
    templates, answers = np.array([0, 1, 1, 0, 1, 1, 1]), np.array([1, 7, 0, 2, 7, 3, 4])
    assert choose(templates, answers).tolist() == [1, 2, 5, 6] and choose(templates, answers, 2).tolist() == [1, 2]


def test_a_planted_rank_trajectory():
    """Logits are the states: of each layer the right answer is put to the rank that is wanted."""
    vocab, wanted = 9, np.array([[9, 9, 4], [5, 2, 2], [1, 1, 1]])  # [L+1,N]
    answers = np.array([3, 0, 8])
    states = np.empty((3, 3, vocab))
    for (layer, i), rank in np.ndenumerate(wanted):
        others = [token for token in range(vocab) if token != answers[i]]
        order = [*others[: rank - 1], answers[i], *others[rank - 1 :]]
        states[layer, i, order] = -np.arange(vocab)
    model = Table(states)
    (found,) = rank_trajectories(subject(model), model.states, answers)
    assert found.tolist() == wanted.tolist()


def test_the_first_of_equals_is_first():
    assert ranks(np.array([[1.0, 1.0, 0.0]]), np.array([1])).tolist() == [1]


def test_the_contrastive_lens_finds_planted_answers():
    labels = np.array([0, 0, 1, 1])
    states = np.full((4, 6), 5.0)
    for i, token in enumerate((0, 1, 2, 3)):
        states[i, token] += 1
    made = directions(states, one_hot(labels))
    assert made[0] == pytest.approx([0.25, 0.25, -0.25, -0.25, 0, 0])
    assert hits(made, [np.array([0, 1]), np.array([2, 5])], count=2) == pytest.approx((1 + 0.5) / 2)
    assert hits(made, [np.array([4]), np.array([3])], count=4) == pytest.approx((1 + 1) / 2)
