"""Which windows of the held-out text are measured, and the mean over them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfssm.distill.distributed import Ranks
from dfssm.distill.held_out import cut_windows, figures

TOKENS, VOCAB = 6, 11
IDS = np.random.default_rng(0).integers(VOCAB, size=2000, dtype=np.uint32)


@pytest.fixture
def bigrams():
    """bigrams(ids) -> logits of the next token from the one before, and no state."""
    torch.manual_seed(0)
    table = nn.Embedding(VOCAB, VOCAB)
    return lambda ids: (table(ids), None)


@pytest.fixture
def loss():
    """loss(model, windows), measured by one process."""
    return lambda model, windows: figures(model, None, windows, Ranks(0, 1, torch.device("cpu")))["held_out"]


class TestWindows:
    @pytest.mark.parametrize("rest", [0, 1, TOKENS - 1])
    def test_follow_one_another(self, rest):
        found = cut_windows(IDS[: 3 * TOKENS + 1 + rest], TOKENS)
        assert found.tolist() == [IDS[i * TOKENS : (i + 1) * TOKENS + 1].tolist() for i in range(3)]

    @pytest.mark.parametrize("length", [0, 1, TOKENS])
    def test_of_too_little_text_there_are_none(self, length):
        assert cut_windows(IDS[:length], TOKENS, 100).shape == (0, TOKENS + 1)

    @pytest.mark.parametrize(
        ("most", "chosen"), [(60, range(10)), (59, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (30, [0, 2, 4, 6, 8]), (1, [0])]
    )
    def test_at_most_so_many_tokens_evenly_spread(self, most, chosen):
        whole = cut_windows(IDS[: 10 * TOKENS + 1], TOKENS)
        assert cut_windows(IDS[: 10 * TOKENS + 1], TOKENS, most).tolist() == whole[list(chosen)].tolist()

    def test_of_a_long_text_the_end_is_measured_too(self):
        whole = cut_windows(IDS, TOKENS)
        found = cut_windows(IDS, TOKENS, 20 * TOKENS).tolist()
        places = [whole.tolist().index(window) for window in found]
        assert len(places) == 20 and {b - a for a, b in zip(places, places[1:], strict=False)} == {16, 17}


class TestLoss:
    @pytest.mark.parametrize("count", [1, 3, 8, 17])
    def test_is_the_mean_over_whole_windows_each_from_its_start(self, bigrams, loss, count):
        ids, starts = IDS[: count * TOKENS + 1], []

        def logits(part):
            starts.extend(part[:, 0].tolist())
            return bigrams(part)

        found = loss(logits, cut_windows(ids, TOKENS))
        whole = torch.from_numpy(ids.astype(np.int64))
        assert found == pytest.approx(F.cross_entropy(bigrams(whole[:-1])[0], whole[1:]).item(), rel=1e-6)
        assert starts == ids[:-1:TOKENS].tolist()

    def test_a_compiled_model_is_measured_without_a_program_for_each_batch_size(self, bigrams, loss):
        programs = []
        compiled = torch.compile(bigrams, backend=lambda graph, inputs: programs.append(graph) or graph)
        windows = cut_windows(IDS[: 11 * TOKENS + 1], TOKENS)  # batches of 8 and 3
        assert loss(compiled, windows) == loss(bigrams, windows)
        assert not programs
        compiled(torch.from_numpy(windows))
        assert len(programs) == 1
