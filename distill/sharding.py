"""A student in training, spread over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from .distributed import Ranks
from .objective import Distillation


def shard(model: Distillation, ranks: Ranks) -> None:
    """Spread the student's parameters, gradients and moments over the ranks: FSDP2, a layer at a time.

    The teacher stays whole on every rank: frozen and bf16, it is a tenth of the student in training.
    """
    if ranks.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    nothing = {p for p in model.student.parameters() if not p.numel()}  # a low rank of 0
    for p in nothing:
        p.requires_grad_(False)
    whole = nothing | set(model.teacher.parameters() if isinstance(model.teacher, nn.Module) else ())
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for layer in model.student.layers:
        fully_shard(layer, mesh=mesh, ignored_params=nothing)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "logits")


def gathered(model: Distillation) -> dict[str, torch.Tensor]:
    """The parameters of a sharded student, whole on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    prefix = "student."
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
