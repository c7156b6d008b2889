"""What a student is trained for: the teacher's next-token distribution, in pieces of a bounded size."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfssm.model.quant import gradient_dtype, product
from dfssm.model.student import DFSSMLM
from dfssm.model.teacher import Mamba2LM, Mamba2State, TokenTable

from .topk import CHUNK, TopK


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of a chunk of tokens at a time: at no time are there logits of all tokens."""

    @staticmethod
    def forward(ctx, hidden, weight, head, target, labels, cross_entropy, chunk, temperature):
        dtype, head = gradient_dtype(hidden.device), head.fixed()
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        kl, ce = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(2))
        for begin in range(0, len(hidden), chunk):
            piece = slice(begin, begin + chunk)
            logits = head.project(hidden[piece]).float()
            log_p = F.log_softmax(_tempered(logits, temperature), dim=-1)
            found, gradient = target.divergence(piece, log_p, temperature)
            kl += temperature**2 * found
            if temperature != 1:
                gradient *= temperature
            if cross_entropy:
                if temperature != 1:
                    log_p = F.log_softmax(logits, dim=-1)
                came = labels[piece, None]
                ce -= log_p.gather(1, came).sum()
                gradient += cross_entropy * log_p.exp().scatter_add_(1, came, -torch.ones_like(log_p[:, :1]))
            to_hidden[piece] = product(gradient, head.weight, dtype).to(hidden.dtype)
            to_weight += product(gradient.T, head.inputs(hidden[piece]).float(), dtype)
        ctx.save_for_backward(to_hidden.div_(len(hidden)), to_weight.div_(len(hidden)).to(weight.dtype))
        loss, kl, ce = ((total / len(hidden)).float() for total in (kl + cross_entropy * ce, kl, ce))
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx, gradient, *_):
        to_hidden, to_weight = ctx.saved_tensors
        return gradient * to_hidden, gradient * to_weight, None, None, None, None, None, None


class Target(Protocol):
    """The teacher's distributions at the tokens of a batch."""

    def divergence(self, piece: slice, log_p: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) summed over the tokens of `piece`, and its gradient by the student's logits divided by
        the `temperature`, from which log_p[n,V] is made.
        """
        ...


class TeacherLogits:
    """The target of a batch: the distribution that the teacher's head gives to hidden[n,D], after norm_f."""

    def __init__(self, head: TokenTable, hidden: Tensor):
        self.project, self.hidden = head.fixed().project, hidden

    def divergence(self, piece: slice, log_p: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        log_q = F.log_softmax(_tempered(self.project(self.hidden[piece]).float(), temperature), dim=-1)
        q = log_q.exp()
        return log_q.sub_(log_p).mul_(q).sum(-1).sum(dtype=torch.float64), log_p.exp().sub_(q)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def chunked_loss(
    hidden: Tensor,
    head: TokenTable,
    target: Target,
    labels: Tensor | None = None,
    cross_entropy: float = 0.0,
    chunk: int = CHUNK,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kl, ce), nats a token: loss = kl + cross_entropy * ce, which alone has a gradient.

    kl is that of both distributions at `temperature`, times its square, so that its gradient keeps its size (arXiv
    1503.02531). hidden[n,D] after the student's norm_f; `head` is a token table of a model; labels i64[n] are
    the tokens that came, for cross entropy.
    """
    return _ChunkedLoss.apply(hidden, head.weight, head, target, labels, cross_entropy, chunk, temperature)


class Distillation(nn.Module):
    """Student and teacher side by side; called with ids it gives the loss. The unit that is sharded.

    In place of the teacher may be what it gave before; there is no `hidden` then.

    `hidden`: weight of the mean over layers of |student - teacher|^2 / |teacher|^2 of the layers' outputs.
    `recompute`: activation checkpointing, a layer at a time. `compiled`: layers by torch.compile, each on its own.
    """

    def __init__(
        self,
        student: DFSSMLM,
        teacher: Mamba2LM | TopK,
        hidden: float = 0.0,
        cross_entropy: float = 0.0,
        recompute: bool = False,
        chunk: int = CHUNK,
        compiled: bool = False,
        temperature: float = 1.0,
    ):
        super().__init__()
        if isinstance(teacher, Mamba2LM):
            teacher.requires_grad_(False).eval()
        if compiled:
            for layer in [*(teacher.layers if isinstance(teacher, Mamba2LM) else ()), *student.layers]:
                layer.compile()
        self.student, self.teacher = student, teacher
        self.hidden, self.cross_entropy, self.recompute, self.chunk = hidden, cross_entropy, recompute, chunk
        self.temperature = temperature

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """ids i64[B,T+1] -> {"loss", "kl", "ce", "hidden"}, nats a token; "loss" has a gradient."""
        inputs, labels = ids[:, :-1], ids[:, 1:].flatten()
        student, teacher = self.student, self.teacher if isinstance(self.teacher, Mamba2LM) else None
        state = Mamba2LM.new_state(student, len(ids))
        with torch.no_grad():
            target = teacher.embedding(inputs) if teacher else inputs
        hidden, apart = student.embedding(inputs), []
        for i, layer in enumerate(student.layers):
            conv, ssm = state.conv[i], state.ssm[i]
            if teacher:
                with torch.no_grad():
                    target = teacher.layers[i](target, conv, ssm)[0]
            if self.recompute:
                hidden = checkpoint(layer, hidden, conv, ssm, use_reentrant=False)[0]
            else:
                hidden = layer(hidden, conv, ssm)[0]
            if self.hidden:
                apart.append((hidden.float() - target).square().mean() / target.float().square().mean())
        with torch.no_grad():
            if isinstance(self.teacher, Mamba2LM):
                logits: Target = TeacherLogits(self.teacher.head, self.teacher.norm_f(target).flatten(0, 1))
            else:
                logits = self.teacher.target(ids)
        of_student, how = student.norm_f(hidden).flatten(0, 1), (self.cross_entropy, self.chunk, self.temperature)
        loss, kl, ce = chunked_loss(of_student, student.head, logits, labels, *how)
        result = {"loss": loss, "kl": kl}
        if self.cross_entropy:
            result["ce"] = ce
        if self.hidden:
            result["hidden"] = torch.stack(apart).mean()
            result["loss"] = loss + self.hidden * result["hidden"]
        return result

    def logits(self, ids: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        """The student's own call, which a sharded student answers through this module only."""
        return self.student(ids, state)
