"""What a recipe says of the student: how it begins, what changes in its arithmetic along a run, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfssm.model.convert import convert, student_from_teacher
from dfssm.model.quant import dequantized
from dfssm.model.student import DFSSMLM, from_tensors
from dfssm.model.teacher import Mamba2LM, SelectiveScan
from dfssm.model.tensors import SCAFFOLD, weights

from .data import Source
from .density import DensityLinear, densify, projections, set_attributes, zero_low_rank
from .distributed import Ranks, gathered
from .objective import Distillation
from .recipe import Recipe

CALIBRATION = 16  # windows over which the sizes of activations are measured


def begin(teacher: Mamba2LM, recipe: Recipe, source: Source, seed: int, ranks: Ranks) -> DFSSMLM:
    """The student of `teacher` before its first step; `source` stays where it is."""
    sizes = activation_sizes(teacher, source, ranks) if recipe.init == "activations" else None
    torch.manual_seed(seed)
    student = student_from_teacher(teacher, recipe.rank, recipe.planes, sizes)
    layers = train_as(student, recipe)
    if recipe.init == "zero":
        zero_low_rank(layers)
    return student


def train_as(student: DFSSMLM, recipe: Recipe) -> list[DensityLinear]:
    """Give a student's layers the arithmetic of a recipe; returns its projections."""
    if recipe.state_dtype == "int8":
        for module in student.modules():
            if isinstance(module, SelectiveScan):
                module.round_state = dequantized
    return densify(
        student,
        hard=recipe.hard,
        soft="levels" if recipe.anneal == "levels" else "continuous",
        float_activations=recipe.activations == "float",
        window=recipe.ste_window,
    )


def move_to(progress: float, student: DFSSMLM, recipe: Recipe) -> dict[str, float]:
    """Make of a student what the recipe asks for at `progress` (0 to 1) of the run; returns what the log has of it."""
    blend = recipe.blend(progress)
    share = blend if blend == 1.0 else torch.tensor(blend)
    set_attributes(projections(student), blend=share, low_rank=recipe.low_rank(progress))
    return {"blend": blend}


def finished(model: Distillation, recipe: Recipe, ranks: Ranks) -> DFSSMLM:
    """The trained student as the run ends with it, whole on every rank."""
    student = model.student
    if ranks.world > 1:
        student = DFSSMLM(student.config).to(ranks.device)
        train_as(student, recipe)
        student.load_state_dict(gathered(model))
    move_to(1.0, student, recipe)
    return student.eval()


def data_free(teacher: Mamba2LM, recipe: Recipe) -> DFSSMLM:
    """What a student of this shape is without training."""
    return from_tensors(*convert(teacher, recipe.rank, recipe.planes)).to(teacher.norm_f.weight.device)


@torch.no_grad()
def activation_sizes(teacher: Mamba2LM, source: Source, ranks: Ranks) -> dict[str, Tensor]:
    """Root mean square of each input of the teacher's projections, over a few windows; the same on every rank."""
    sums: dict[str, Tensor] = {}
    count = -(-CALIBRATION // ranks.world)

    def add(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found = inputs[0].double().square().mean((0, 1)) / count
            sums[name] = sums[name] + found if name in sums else found

        return hook

    names = [w.name.removesuffix(".weight") for w in weights(teacher.config) if w.form == SCAFFOLD]
    hooks = [teacher.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    state = source.state_dict()
    for _ in range(count):
        teacher(torch.from_numpy(source.take(1)).to(ranks.device)[:, :-1])
    source.load_state_dict(state)  # training begins at the first window
    for hook in hooks:
        hook.remove()
    return {name: ranks.mean(total).sqrt().float() for name, total in sums.items()}
