"""The k likeliest tokens: divergence and gradient against autograd in fp64, files against the teacher itself."""

import shutil

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from dfssm.base import DfssmError
from dfssm.distill import topk
from dfssm.distill.data import Windows
from dfssm.distill.objective import TeacherLogits, chunked_loss
from dfssm.distill.topk import TopK, TopKTarget, write_topk
from dfssm.model.config import Mamba2Config
from dfssm.model.teacher import Embedding, Mamba2LM

VOCAB, TOKENS, COUNT = tiny.CONFIG.vocab_size, 16, 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Mamba2LM(Mamba2Config(vocab_size=VOCAB, d_model=32, n_layer=2, d_state=8, headdim=8))
    with torch.no_grad():
        made.embedding.weight.mul_(20)  # logits far from uniform
    return made.requires_grad_(False).eval()


@pytest.fixture
def windows():
    return Windows(np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.uint32), TOKENS, seed=1)


@pytest.fixture
def small_shards(monkeypatch):
    """Four windows a shard."""
    monkeypatch.setattr(topk, "_SHARD", 4 * topk._window(TOKENS, 5, VOCAB).itemsize)


def batch(windows, numbers=range(COUNT)):
    return torch.from_numpy(np.stack([windows[i] for i in numbers]))


def bucketed(log_q, ids):
    """log_q f64[n,V] -> the log-probabilities of `ids` and of all others together, by plain sums."""
    q = log_q.exp()
    rest = q.scatter(1, ids, 0.0).sum(1, keepdim=True)
    return torch.cat([q.gather(1, ids), rest], 1).log()


class TestDivergence:
    @pytest.mark.parametrize("k", [1, 2, 17, VOCAB - 1, VOCAB])
    @pytest.mark.parametrize("sharp", [1.0, 12.0])
    def test_value_and_gradient_are_those_of_autograd(self, k, sharp):
        torch.manual_seed(k)
        log_q = F.log_softmax(sharp * torch.randn(9, VOCAB, dtype=torch.float64), -1)
        logits = (sharp * torch.randn(9, VOCAB, dtype=torch.float64)).requires_grad_()
        log_p = F.log_softmax(logits, -1)
        ids = log_q.topk(k).indices
        target = TopKTarget(ids, bucketed(log_q, ids))
        piece = slice(2, 7)
        q, p = (bucketed(t, ids)[piece].exp() for t in (log_q, log_p))
        terms = q * (q / p).log()
        expected = (terms if k < VOCAB else terms[:, :-1]).sum()  # there are no others: 0 log 0
        (gradient,) = torch.autograd.grad(expected, logits)
        before = log_p.detach().clone()
        found, found_gradient = target.divergence(piece, log_p.detach()[piece])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found_gradient, gradient[piece], rtol=1e-10, atol=1e-10)
        assert torch.equal(log_p.detach(), before)

    def test_of_the_whole_vocabulary_it_is_that_of_the_logits(self):
        torch.manual_seed(0)
        head, hidden = Embedding(VOCAB, 8), torch.randn(9, 8)
        log_p = F.log_softmax(torch.randn(9, VOCAB), -1)
        log_q, ids = F.log_softmax(head.project(hidden), -1).detach().topk(VOCAB)
        none = torch.full((9, 1), -torch.inf)
        found = TopKTarget(ids, torch.cat([log_q, none], 1)).divergence(slice(0, 9), log_p)
        with torch.no_grad():
            expected = TeacherLogits(head, hidden).divergence(slice(0, 9), log_p)
        for a, b in zip(found, expected, strict=True):  # sums of 265 terms of fp32 in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_more_tokens_tell_more(self):
        """Joining outcomes never adds to a divergence."""
        torch.manual_seed(0)
        log_q, log_p = (F.log_softmax(3 * torch.randn(9, VOCAB, dtype=torch.float64), -1) for _ in range(2))
        found = []
        for k in (1, 4, 16, 64, VOCAB):
            ids = log_q.topk(k).indices
            found.append(float(TopKTarget(ids, bucketed(log_q, ids)).divergence(slice(0, 9), log_p)[0]))
        assert found == sorted(found) and found[0] > 0

    def test_a_student_sure_of_what_the_teacher_denies_has_a_finite_gradient(self):
        logits = torch.full((1, 6), -300.0)
        logits[0, 0] = 300.0  # the others' fp32 probabilities are 0
        ids = torch.tensor([[0, 1]])
        target = TopKTarget(ids, torch.tensor([[0.1, 0.2, 0.7]]).log())
        kl, gradient = target.divergence(slice(0, 1), F.log_softmax(logits, -1))
        assert kl.isfinite()
        torch.testing.assert_close(gradient, torch.tensor([[0.9, -0.2, *[-0.7 / 4] * 4]]))


class TestFiles:
    @pytest.mark.parametrize("k", [1, 5, VOCAB])
    def test_the_loss_is_that_of_the_teacher_at_hand(self, model, windows, tmp_path, k):
        """By its fp16 log-probabilities, of a size up to 16: each is off by 2^-8 at most."""
        done = []
        write_topk(model, windows, COUNT, k, tmp_path, batch=3, progress=done.append)
        assert sum(done) == COUNT * TOKENS
        ids = batch(windows, [7, 0, 10])
        log_q = F.log_softmax(model(ids[:, :-1])[0].double(), -1).flatten(0, 1)
        top = log_q.topk(k).indices
        found = TopK(tmp_path).target(ids)
        assert found.ids.dtype == torch.int64 and found.ids.shape == (3 * TOKENS, k)
        assert torch.equal(found.ids.sort().values, top.sort().values)
        expected = bucketed(log_q, found.ids)
        stored = found.log_q.double()
        if k == VOCAB:
            assert (stored[:, -1] == -torch.inf).all()
            expected, stored = expected[:, :-1], stored[:, :-1]
        torch.testing.assert_close(stored, expected, rtol=2.0**-11, atol=1e-5)  # half a unit of fp16, and fp32 sums

        head = Embedding(VOCAB, 32)
        hidden = torch.randn(3 * TOKENS, 32)
        loss = chunked_loss(hidden, head, found, chunk=7)[0]
        plain = chunked_loss(hidden, head, TopKTarget(found.ids, bucketed(log_q, found.ids)), chunk=7)[0]
        assert loss.item() == pytest.approx(plain.item(), abs=2**-8)

    def test_windows_are_found_by_their_ids_and_no_others(self, model, windows, tmp_path, small_shards):
        write_topk(model, windows, COUNT, 5, tmp_path)
        assert len(list(tmp_path.glob("*.npy"))) == 3
        found = TopK(tmp_path)
        assert len(found) == COUNT
        whole = found.target(batch(windows))
        for number in (0, 3, 4, 10):
            one = found.target(batch(windows, [number]))
            rows = slice(number * TOKENS, (number + 1) * TOKENS)
            assert torch.equal(one.ids, whole.ids[rows]) and torch.equal(one.log_q, whole.log_q[rows])
        for other in (windows, Windows(windows.ids, TOKENS, seed=2), Windows(windows.ids, 8, seed=1)):
            with pytest.raises(DfssmError, match="lacks a window of this run; .* precompute them anew"):
                found.target(batch(other, [COUNT]))

    def test_after_an_interruption_only_what_is_missing_is_computed(
        self, model, windows, tmp_path, small_shards, monkeypatch
    ):
        write_topk(model, windows, COUNT, 5, tmp_path / "whole")
        calls = []
        original = topk._likeliest

        def likeliest(*arguments):
            calls.append(len(arguments[1]))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(topk, "_likeliest", likeliest)
        folder = tmp_path / "part"
        with pytest.raises(KeyboardInterrupt):
            write_topk(model, windows, COUNT, 5, folder, batch=2)
        assert [file.name for file in sorted(folder.iterdir())] == ["topk-000000.npy", "topk.json"]
        (folder / "topk-000001.npy").write_bytes((tmp_path / "whole" / "topk-000001.npy").read_bytes()[:-9])
        done = []
        write_topk(model, windows, COUNT, 5, folder, batch=2, progress=done.append)
        assert sum(calls[4:]) == COUNT - 4 and sum(done) == COUNT * TOKENS
        for file in (tmp_path / "whole").iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
        # More windows complete the last shard; fewer leave all as it is.
        calls.clear()
        write_topk(model, windows, COUNT + 3, 5, folder)
        assert sum(calls) == 6 and len(TopK(folder)) == COUNT + 3
        calls.clear()
        (folder / ".topk-000000.npy.0123456789abcdef.dfssm-new").mkdir()  # of a writer that was killed
        write_topk(model, windows, 2, 5, folder)
        assert not calls and len(TopK(folder)) == COUNT + 3 and not list(folder.glob(".*"))

    def test_ranks_share_the_shards(self, model, windows, tmp_path, small_shards):
        write_topk(model, windows, COUNT, 5, tmp_path / "one")
        for rank in (1, 0):
            write_topk(model, windows, COUNT, 5, tmp_path / "two", rank=rank, world=2)
        names = sorted(file.name for file in (tmp_path / "one").iterdir())
        assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
        for name in names:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_ids_above_65535_are_kept(self):
        for vocab, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
            assert topk._window(TOKENS, 5, vocab)["ids"].base == dtype

    @pytest.mark.parametrize("k", [0, VOCAB + 1])
    def test_k_must_fit(self, model, windows, tmp_path, k):
        with pytest.raises(DfssmError, match=f"k is {k}; give 1 to {VOCAB}"):
            write_topk(model, windows, COUNT, k, tmp_path)

    def test_logits_of_something_else_are_not_mixed(self, model, windows, tmp_path):
        write_topk(model, windows, 2, 5, tmp_path)
        with pytest.raises(DfssmError, match="holds logits with k 5, not 6; remove it or choose"):
            write_topk(model, windows, 2, 6, tmp_path)
        other = Mamba2LM(model.config)
        with pytest.raises(DfssmError, match="holds logits with teacher [0-9a-f]{64}, not"):
            write_topk(other, windows, 2, 5, tmp_path)

    def test_a_folder_without_logits_and_a_damaged_file(self, model, windows, tmp_path):
        with pytest.raises(DfssmError, match="holds no topk.json; precompute"):
            TopK(tmp_path)
        write_topk(model, windows, 2, 5, tmp_path)
        record = (tmp_path / "topk.json").read_text()
        for content in ("", "[" * 100_000, record[:-1]):
            (tmp_path / "topk.json").write_text(content)
            for use in (TopK, lambda folder: write_topk(model, windows, 2, 5, folder)):
                with pytest.raises(DfssmError, match=rf"topk.json: cannot be read \(.*\); remove {tmp_path}$"):
                    use(tmp_path)
        (tmp_path / "topk.json").write_text(record)
        file = tmp_path / "topk-000000.npy"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(DfssmError, match=r"topk-000000.npy: cannot be read \(.*\); remove it"):
            TopK(tmp_path)


class TestRun:
    def test_of_the_whole_vocabulary_it_is_the_run_with_the_teacher(self, distill, same_log, tmp_path):
        distill(tmp_path / "a")
        distill(tmp_path / "b", top_k=VOCAB)
        for ours, plain in zip(same_log(tmp_path / "b"), same_log(tmp_path / "a"), strict=True):
            # log-probabilities up to 16 are off by 2^-8 at most, and steps are made by what came before
            with_teacher = {"held_out_kl", "held_out_same_top"}
            assert plain.keys() - ours.keys() == with_teacher & plain.keys()
            assert ours == pytest.approx({name: plain[name] for name in ours}, rel=2e-2, abs=2**-8)

    def test_a_resumed_run_goes_on_as_if_never_broken(self, distill, same_log, tmp_path):
        distill(tmp_path / "a", top_k=5)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
        distill(tmp_path / "b", resume=True, top_k=5)
        assert same_log(tmp_path / "b") == same_log(tmp_path / "a")
        assert (tmp_path / "b" / "model.pt").read_bytes() == (tmp_path / "a" / "model.pt").read_bytes()

    def test_what_needs_the_teacher_or_knows_no_windows_is_refused(self, distill, tmp_path):
        with pytest.raises(DfssmError, match="hidden is 0.5, but with --top-k no teacher is there"):
            distill(tmp_path, top_k=5, hidden=0.5)
        with pytest.raises(DfssmError, match="--top-k: the windows of a stream are not known before"):
            distill(tmp_path, top_k=5, data=["hf:a"])
