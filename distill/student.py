"""The life of a student, as a recipe has it: how it begins, what is trained, what changes along a run, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from dfssm.base.errors import DfssmError
from dfssm.model.budget import choose
from dfssm.model.calibrate import calibrate
from dfssm.model.checkpoint import load_student_tensors, save_student
from dfssm.model.config import DFSSMConfig
from dfssm.model.convert import convert, student_from_teacher
from dfssm.model.quant import dequantized, pack_bits
from dfssm.model.student import DFSSMLM, BinaryLinear, Int8Embedding, from_tensors
from dfssm.model.teacher import Mamba2LM, SelectiveScan, TokenTable
from dfssm.model.tensors import FLOAT, ROWS, SCAFFOLD, weights

from .data import Source
from .density import DensityLinear, densify, levels, projections, set_attributes, zero_low_rank
from .distributed import Ranks
from .objective import Distillation
from .recipe import Recipe
from .sharding import gathered

SMALL = 1e-3  # root mean square of a tensor up to which a relative learning rate becomes no smaller
CALIBRATION = 16  # windows over which the sizes of activations are measured


def data_free(teacher: Mamba2LM, recipe: Recipe) -> DFSSMLM:
    """What a student of this shape is without training."""
    return from_tensors(*convert(teacher, recipe.rank, recipe.planes)).to(teacher.norm_f.weight.device)


def begin(
    teacher: Mamba2LM, recipe: Recipe, source: Source, seed: int, ranks: Ranks, start: Path | None = None
) -> DFSSMLM:
    """The student of `teacher` before its first step; `source` stays where it is.

    `start`: a model.pt whose student it is, with its rank and planes, instead of what the recipe begins with.
    DfssmError if that is of another teacher's shape.
    """
    if start:
        student = student_of(start, teacher)
        train_as(student, recipe)
        return student
    sizes = activation_sizes(teacher, source, ranks) if recipe.init == "activations" else None
    config, tensors = DFSSMConfig.from_teacher(teacher.config, recipe.rank, recipe.planes), None
    if recipe.init == "calibrated":
        config, tensors = calibrated(teacher, source, config, recipe, ranks)
    torch.manual_seed(seed)
    student = student_from_teacher(teacher, config.rank, config.planes, sizes, tensors)
    layers = train_as(student, recipe)
    if recipe.init == "zero":
        zero_low_rank(layers)
    return student


def blank(
    teacher: Mamba2LM, recipe: Recipe, ranks: Ranks, rank: int | tuple[int, ...], planes: int | tuple[int, ...]
) -> DFSSMLM:
    """A student whose parameters a checkpoint will give."""
    student = DFSSMLM(DFSSMConfig.from_teacher(teacher.config, rank, planes)).to(ranks.device)
    train_as(student, recipe)
    return student


def student_of(file: Path, teacher: Mamba2LM) -> DFSSMLM:
    """The student in `file`, to be trained further: its signs, with the sizes of the teacher's weights for latents."""
    config, tensors = load_student_tensors(file)
    wanted = DFSSMConfig.from_teacher(teacher.config, config.rank, config.planes)
    for (name, found), value in zip(config.to_dict().items(), wanted.to_dict().values(), strict=True):
        if name != "eos_token_id" and found != value:
            raise DfssmError(f"{file}: {name} is {found}, the teacher's is {value}; give a student of this teacher")
    student = student_from_teacher(teacher, config.rank, config.planes, tensors=tensors)
    others = {}
    for weight in weights(config):
        if weight.form == FLOAT:
            others[weight.name] = tensors[weight.name].float()
        elif weight.form == ROWS:
            others[weight.name] = tensors[weight.name].float() * tensors[weight.part("scale")][:, None]
    student.load_state_dict(student.state_dict() | others)
    return student


def first_signs(teacher: Mamba2LM, planes: int | tuple[int, ...]) -> dict[str, Tensor]:
    """The bits of the data-free conversion, by the name of the projection."""
    config, tensors = convert(teacher, 0, planes)
    return {w.path: tensors[f"{w.path}.bits"].cpu() for w in weights(config) if w.form == SCAFFOLD}


class Flips:
    """`flipped`: the share of a student's signs that are not those of `first_signs`. A sharded one's are gathered."""

    def __init__(self, student: DFSSMLM, first: dict[str, Tensor]):
        self._pairs = [(student.get_parameter(f"{name}.latent"), bits) for name, bits in first.items()]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        count, others = torch.tensor([bits.bit_count() for bits in range(256)]), 0
        for latent, bits in self._pairs:
            whole = latent.full_tensor() if isinstance(latent, DTensor) else latent
            others += int(count[(pack_bits(whole).cpu() ^ bits).long()].sum())
        return {"flipped": others / sum(8 * bits.numel() for _, bits in self._pairs)}


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
        levels=recipe.levels,
        clamp_window=recipe.clamp_window,
    )


def calibrated(
    teacher: Mamba2LM, source: Source, config: DFSSMConfig, recipe: Recipe, ranks: Ranks
) -> tuple[DFSSMConfig, dict[str, Tensor]]:
    """The calibrated conversion to `config`, or to what the budget buys, on the first windows of `source`, which stays
    where it is.
    """
    state = source.state_dict()
    first = source.take(1)
    more = max(1, recipe.init_tokens // (first.shape[1] - 1)) - 1
    windows = np.concatenate([first, source.take(more)]) if more else first
    source.load_state_dict(state)  # training begins at the first window
    ids = torch.from_numpy(windows).to(ranks.device)[:, :-1]

    @contextlib.contextmanager
    def progress(name: str) -> Iterator[Callable[[int, int], None]]:
        with tqdm(desc=name, total=teacher.config.n_layer, disable=None if ranks.first else True) as bar:
            yield lambda done, of: bar.update(done - bar.n)

    # Ranks see other windows: what the first one finds is everybody's.
    if recipe.budget:
        with progress("budget") as advance:
            chosen = choose(teacher, ids, recipe.budget * 1e6, advance)[0]
        table = ranks.share({"": torch.tensor(chosen.scaffolds, device=ranks.device)})[""]
        rank, planes = (tuple(column) for column in table.T.tolist())
        config = dataclasses.replace(config, rank=rank, planes=planes)
    with progress("calibrate") as advance:
        config, tensors, _ = calibrate(teacher, ids, config.rank, config.planes, advance)
    return config, ranks.share(tensors)


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

    names = [w.path for w in weights(teacher.config) if w.form == SCAFFOLD]
    hooks = [teacher.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    state = source.state_dict()
    for _ in range(count):
        teacher(torch.from_numpy(source.take(1)).to(ranks.device)[:, :-1])
    source.load_state_dict(state)  # training begins at the first window
    for hook in hooks:
        hook.remove()
    return {name: ranks.mean(total).sqrt().float() for name, total in sums.items()}


def trainable(student: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a student by what a recipe gives a learning rate: scaffold, low_rank and float."""
    groups: dict[str, list[nn.Parameter]] = {"scaffold": [], "low_rank": [], "float": []}
    kinds = {"latent": "scaffold", "scale": "scaffold", "down": "low_rank", "up": "low_rank"}
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.numel():  # a low rank of 0
                continue
            kind = kinds[name] if isinstance(module, BinaryLinear) else "float"
            groups[kind].append(parameter)
    return groups


@torch.no_grad()
def rate_factors(groups: dict[str, list[nn.Parameter]], recipe: Recipe) -> dict[nn.Parameter, float]:
    """What the learning rates of parameters are multiplied by, where a recipe has them relative to their sizes."""

    def size(p: Tensor) -> float:
        found = p.square().mean().sqrt()
        return float(found.full_tensor() if isinstance(found, DTensor) else found)

    chosen = groups["float"] if recipe.float_rates == "relative" else ()
    return {p: max(SMALL, size(p)) for p in chosen}  # as Adafactor, arXiv 1804.04235


def move_to(progress: float, student: DFSSMLM, recipe: Recipe) -> dict[str, float]:
    """Make of a student what the recipe asks for at `progress` (0 to 1) of the run; returns what the log has of it."""
    blend = recipe.blend(progress)
    share = blend if blend == 1.0 else torch.tensor(blend)
    set_attributes(projections(student), blend=share, low_rank=recipe.low_rank(progress))
    return {"blend": blend}


def finish(model: Distillation, recipe: Recipe, ranks: Ranks, file: Path) -> DFSSMLM:
    """The trained student as the run ends with it, whole on every rank; what ships of it is written to `file`."""
    student = model.student
    if ranks.world > 1:
        student = DFSSMLM(student.config).to(ranks.device)
        train_as(student, recipe)
        student.load_state_dict(gathered(model))
    move_to(1.0, student, recipe)
    if ranks.first:
        save_student(file, student.config, shipped(student, recipe))
    ranks.barrier()
    return student.eval()


@torch.no_grad()
def shipped(student: DFSSMLM, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of model.pt.

    Weights of levels end as published: the sign of each, and the row mean of their sizes as the scale. This is what
    the paper's exporter writes of the scaffold that was evaluated at 17 levels.
    """
    tensors = student.export_tensors()
    if recipe.hard == "levels":
        for prefix, module in student.named_modules():
            if isinstance(module, BinaryLinear):
                tensors[f"{prefix}.scale"] = (
                    module.scale * levels(module.latent, recipe.levels).abs().mean(-1)
                ).float()
    return tensors


class _FloatTable(TokenTable):
    """The latents of a table themselves; what they multiply is int8 still."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(dequantized(hidden), self.weight)


@contextlib.contextmanager
def _lent(modules: Sequence[nn.Module], **attributes) -> Iterator[None]:
    """Give modules these attributes for a while."""
    before = [(module, name, getattr(module, name)) for module in modules for name in attributes]
    for module, name, _ in before:
        setattr(module, name, attributes[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def other_forms(student: DFSSMLM) -> Iterator[tuple[str, DFSSMLM]]:
    """The student with one part softer than what ships, by name: what each rounding costs. One at a time is valid."""
    layers = projections(student)
    if not layers[0].ships:
        yield "as_trained", student
        return
    with _lent(layers, low_rank="float"):
        yield "float_low_rank", student
    tables = {name: child for name, child in student.named_children() if isinstance(child, Int8Embedding)}
    with _lent([student], **{name: _FloatTable(table.weight) for name, table in tables.items()}):
        yield "float_embedding", student
