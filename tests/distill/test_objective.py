"""The chunked loss against plain log-softmax in fp64, and the objective against whole teacher and student."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfssm.distill.density import densify
from dfssm.distill.objective import Distillation, TeacherLogits, chunked_loss
from dfssm.model.config import DFSSMConfig, Mamba2Config
from dfssm.model.convert import student_from_teacher
from dfssm.model.student import DFSSMLM, Int8Embedding
from dfssm.model.teacher import Embedding, Mamba2LM

TOKENS, WIDTH, VOCAB = 64, 32, 300
CHUNKS = [1, 7, TOKENS, TOKENS + 9]
SHAPE = {"vocab_size": 50, "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 8}
# Of fp32 against fp64: each sum has some hundred terms of relative size 2^-24.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def rounded(t: torch.Tensor) -> torch.Tensor:
    """The values of the int8 codes of rows in fp64; the gradient passes unchanged."""
    largest = t.detach().abs().amax(-1, keepdim=True).double()
    return t + ((t.detach() / largest * 127).round() * largest / 127 - t.detach())


class Case:
    """Random operands of a loss; `plain` is it in fp64 by autograd of the whole."""

    def __init__(self, kind: type):
        torch.manual_seed(0)
        self.head = kind(VOCAB, WIDTH)
        with torch.no_grad():
            self.head.weight.normal_(std=0.3)
        self.hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
        self.teacher, self.taught = Embedding(VOCAB, WIDTH).requires_grad_(False), torch.randn(TOKENS, WIDTH)
        self.labels = torch.randint(VOCAB, (TOKENS,))

    def chunked(self, chunk, cross_entropy, temperature=1.0):
        target = TeacherLogits(self.teacher, self.taught)
        return chunked_loss(self.hidden, self.head, target, self.labels, cross_entropy, chunk, temperature)

    def plain(self, cross_entropy, temperature=1.0):
        hidden, weight = (t.detach().double().requires_grad_() for t in (self.hidden, self.head.weight))
        form = rounded if isinstance(self.head, Int8Embedding) else torch.Tensor.double
        logits = form(hidden) @ form(weight).T
        log_p = F.log_softmax(logits / temperature, -1)
        log_q = F.log_softmax(self.taught.double() @ self.teacher.weight.double().T / temperature, -1)
        kl = temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        ce = F.cross_entropy(logits, self.labels)
        loss = kl + cross_entropy * ce
        return (loss, kl, ce), torch.autograd.grad(loss, (hidden, weight))


@pytest.fixture(params=[Embedding, Int8Embedding], ids=["float", "int8"])
def case(request):
    return Case(request.param)


class TestChunkedLoss:
    @pytest.mark.parametrize("cross_entropy", [0.0, 0.7])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_values_and_gradients_are_those_of_the_whole(self, case, chunk, cross_entropy, temperature):
        loss, kl, ce = case.chunked(chunk, cross_entropy, temperature)
        (3 * loss).backward()  # what comes after it scales the gradient
        expected, gradients = case.plain(cross_entropy, temperature)
        torch.testing.assert_close(loss.double(), expected[0], **CLOSE)
        torch.testing.assert_close(kl.double(), expected[1], **CLOSE)
        if cross_entropy:
            torch.testing.assert_close(ce.double(), expected[2], **CLOSE)
        for found, gradient in zip((case.hidden.grad, case.head.weight.grad), gradients, strict=True):
            torch.testing.assert_close(found.double(), 3 * gradient, **CLOSE)

    def test_only_the_loss_has_a_gradient(self, case):
        loss, kl, ce = case.chunked(7, 1.0)
        assert loss.requires_grad and not kl.requires_grad and not ce.requires_grad

    def test_a_student_that_is_the_teacher(self):
        case = Case(Embedding)
        case.teacher, case.taught = case.head, case.hidden.detach()
        loss, _, _ = case.chunked(7, 0.0)
        loss.backward()
        assert abs(loss.item()) < 1e-6 and case.hidden.grad.abs().max() < 1e-7

    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_never_are_there_logits_of_more_than_a_chunk(self, case, chunk):
        with Largest() as found:
            loss, _, _ = case.chunked(chunk, 1.0)
            loss.backward()
        if chunk < TOKENS:
            assert found.elements <= max(chunk * VOCAB, VOCAB * WIDTH)
        else:  # the measure sees them where they are
            assert found.elements == TOKENS * VOCAB

    def test_a_head_that_is_also_the_embedding_gets_both_gradients(self, case):
        ids = torch.randint(VOCAB, (TOKENS,))
        weight = case.head.weight

        def run(*uses):
            weight.grad = None
            hidden = F.silu(case.head(ids)) if "in" in uses else F.silu(case.head(ids)).detach()
            if "out" in uses:
                loss, _, _ = chunked_loss(hidden, case.head, TeacherLogits(case.teacher, case.taught), chunk=7)
            else:
                other = type(case.head)(VOCAB, WIDTH)
                other.load_state_dict(case.head.state_dict())
                loss, _, _ = chunked_loss(hidden, other, TeacherLogits(case.teacher, case.taught), chunk=7)
            loss.backward()
            return weight.grad

        torch.testing.assert_close(run("in", "out"), run("in") + run("out"), rtol=1e-5, atol=1e-8)


class Largest(TorchDispatchMode):
    """`elements` of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def pair(student_seed=1, tie=True):
    """A random teacher, and a random student of its shape that trains what ships."""
    torch.manual_seed(0)
    teacher = Mamba2LM(Mamba2Config(**SHAPE, tie_embeddings=tie))
    torch.manual_seed(student_seed)
    student = DFSSMLM(DFSSMConfig.from_teacher(teacher.config, rank=3))
    with torch.no_grad():
        teacher.embedding.weight.mul_(20)
        student.embedding.weight.mul_(20)
    densify(student)
    return student, teacher


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class TestDistillation:
    ids = torch.randint(50, (3, 21), generator=torch.Generator().manual_seed(0))

    def plain(self, student, teacher, hidden, cross_entropy):
        """The values by the models' own calls, whole logits and autograd."""
        outputs, hooks = ([], []), []
        for model, found in zip((student, teacher), outputs, strict=True):
            for layer in model.layers:
                hooks.append(layer.register_forward_hook(lambda _, given, result, to=found: to.append(result[0])))
        inputs, labels = self.ids[:, :-1], self.ids[:, 1:].flatten()
        log_p = F.log_softmax(student(inputs)[0].flatten(0, 1), -1)
        with torch.no_grad():
            log_q = F.log_softmax(teacher(inputs)[0].flatten(0, 1), -1)
        for hook in hooks:
            hook.remove()
        apart = [(s - t).square().sum() / t.square().sum() for s, t in zip(*outputs, strict=True)]
        found = {
            "kl": F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
            "ce": F.nll_loss(log_p, labels),
            "hidden": sum(apart) / len(apart),
        }
        return found | {"loss": found["kl"] + cross_entropy * found["ce"] + hidden * found["hidden"]}

    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize("hidden, cross_entropy", [(0.0, 0.0), (2.0, 0.0), (0.0, 0.5), (2.0, 0.5)])
    def test_it_is_that_of_the_models_own_logits(self, hidden, cross_entropy, tie):
        student, teacher = pair(tie=tie)
        model = Distillation(student, teacher, hidden, cross_entropy, chunk=11)
        found, expected = model(self.ids), self.plain(student, teacher, hidden, cross_entropy)
        wanted = {"loss", "kl"} | ({"hidden"} if hidden else set()) | ({"ce"} if cross_entropy else set())
        assert found.keys() == wanted
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        ours, theirs = gradients(student, found["loss"]), gradients(student, expected["loss"])
        for name in ours:  # by fp32 sums in another order, through two layers
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )

    @pytest.mark.parametrize("hidden", [0.0, 2.0])
    def test_recomputed_layers_give_the_same_gradients(self, hidden):
        student, teacher = pair()
        found = []
        for recompute in (False, True):
            values = Distillation(student, teacher, hidden, recompute=recompute)(self.ids)
            found.append([values["loss"], *gradients(student, values["loss"]).values()])
        assert all(map(torch.equal, *found))

    def test_recomputing_keeps_less(self):
        student, teacher = pair()
        kept = ({}, {})

        def pack(t, to):
            to[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        for recompute, sizes in enumerate(kept):
            with torch.autograd.graph.saved_tensors_hooks(functools.partial(pack, to=sizes), lambda t: t):
                Distillation(student, teacher, recompute=bool(recompute))(self.ids)
        assert sum(kept[1].values()) < sum(kept[0].values()) / 2

    def test_the_teacher_is_frozen_and_gets_no_gradient(self):
        student, teacher = pair()
        model = Distillation(student, teacher, hidden=1.0, cross_entropy=1.0)
        model(self.ids)["loss"].backward()
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(p.grad is not None and p.grad.any() for p in student.parameters())

    def test_a_float_student_that_is_the_teacher_has_no_loss(self):
        _, teacher = pair()
        twin = Mamba2LM(teacher.config)
        twin.load_state_dict(teacher.state_dict())
        found = Distillation(twin, teacher, hidden=1.0)(self.ids)
        assert abs(found["kl"]) < 1e-6 and found["hidden"] == 0

    def test_training_on_one_batch_brings_it_near_the_teacher(self):
        _, teacher = pair()
        student = student_from_teacher(teacher, rank=3)
        densify(student)
        model = Distillation(student, teacher)
        optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(self.ids)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 5

    def test_logits_are_the_students(self):
        student, teacher = pair()
        assert torch.equal(Distillation(student, teacher).logits(self.ids)[0], student(self.ids)[0])
