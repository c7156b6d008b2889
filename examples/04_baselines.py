"""Other ways to round a teacher's projections without training, beside those of `dfssm convert`.

    python examples/04_baselines.py TEACHER --data text/ --held-out held_out.txt

- `rtn N`: to the nearest of 2^N levels between the least and the greatest weight of a row; `rtn N/64`: of 64 columns of
  a row. The two ends are fp16.
- `arb P`: alternating refined binarisation (ARB-LLM, arXiv 2410.03129): P planes with fp16 scales of rows and columns,
  refined in turn, then signs with error compensation through the second moment of the inputs, layer after layer. More
  columns, those that matter most, get one more plane, until it is as large as `calibrated P`.
- `free P`, `calibrated P`: dfssm convert, P planes and rank R; `calibrated P/R`: of another rank.
- `budget MB`: dfssm convert --budget MB.
- `table N`, `table N/32`: the teacher with its token table alone, which is the head too, rounded as `rtn`.

Activations are int8 in all but the last, and the token table int8 a row. Bits are those of a weight of the projections,
in the last of the table, with scales and low rank. `--plot FILE` draws the divergence over them.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssm.distill.data import open_tokenizer, sample
from dfssm.distill.distributed import Ranks
from dfssm.distill.held_out import Measured
from dfssm.model.budget import measure, spend
from dfssm.model.calibrate import PIECE, calibrate
from dfssm.model.config import DFSSMConfig
from dfssm.model.convert import convert
from dfssm.model.hf_import import load_teacher
from dfssm.model.quant import dequantized
from dfssm.model.rounding import Levels, damped, round_columns
from dfssm.model.student import from_tensors
from dfssm.model.teacher import Mamba2LM, Mamba2State

REFINEMENTS = 15  # of the scales in turn, as in the paper


class Int8Inputs(nn.Module):
    """A projection by any matrix[M,K], of int8 activations."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(dequantized(x), self.matrix)


def round_to_nearest(weight: Tensor, bits: int, group: int = 0) -> tuple[Tensor, float]:
    """weight[M,K] -> the rounded matrix, and its bits a weight. `group`: columns that share their ends; 0: all."""
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    low, high = (end.half().float() for end in (groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)))
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((groups - low) / step).round().clamp(0, 2**bits - 1)
    return (low + codes * step).flatten(1), bits + 32 / groups.shape[-1]


def refined_binarisation(weight: Tensor, moment: Tensor, planes: int, bits: float) -> tuple[Tensor, float]:
    """weight[M,K] and its inputs' moment[K,K] -> the rounded matrix, and its bits a weight <= `bits`."""
    (m, k), moment = weight.shape, damped(moment)
    later = _later(moment)
    # As BiLLM and ARB-LLM rank columns: by their energy over the variance that the others leave of the input.
    matters = (weight.square().sum(0) / later.diagonal().square()).argsort(descending=True)
    scales = 16 * (planes / k + 1 / m)
    more = max(0, int((bits - planes - scales - 16 / k) * k))
    order = torch.cat([matters[:more].sort()[0], matters[more:].sort()[0]])  # each kind has levels of its own
    rounded = torch.empty_like(weight)
    wanted = weight.T[order].contiguous()
    factor = _later(moment[order][:, order])
    passed = -factor / factor.diagonal()[:, None]
    for begin, end, depth in ((0, more, planes + 1), (more, k, planes)):
        if begin == end:
            continue
        rows, columns = _scales(weight[:, order[begin:end]], depth)
        # Divided by the columns' scales, levels are the rows'; what is passed on is of the weights themselves.
        relative = passed[begin:end, begin:end] * columns[:, None] / columns
        levels = Levels(rows)
        codes = round_columns((wanted[begin:end] / columns[:, None]).clone(), relative, levels)
        values = levels.values(codes) * columns[:, None]
        steps = _steps(wanted[begin:end], passed[begin:end, begin:end], values)
        wanted[end:] -= passed[begin:end, end:].T @ steps
        rounded[:, order[begin:end]] = values.T
    spent = planes + scales + (more / k + 16 / k if more else 0.0)
    return rounded, spent


def _later(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: row j tells how the columns after j make good its error."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True).float()


def _steps(wanted: Tensor, passed: Tensor, values: Tensor) -> Tensor:
    """By how much each column was moved, after what was passed on to it: (I - passed^T) is solved from the first on."""
    # step_j = value_j - (wanted_j - sum over k < j of passed[k,j] step_k)
    return torch.linalg.solve_triangular(torch.eye(len(passed)) - passed.T.tril(-1), values - wanted, upper=False)


def _scales(weight: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Scales of the rows [P,M] and the columns [K], refined in turn for the signs of what the planes before leave."""
    columns, rows, rest = torch.ones(weight.shape[1]), [], weight.float()
    for plane in range(planes):
        signs = torch.where(rest > 0, 1.0, -1.0)
        for _ in range(REFINEMENTS):
            scale = (rest * signs * columns).sum(1) / columns.square().sum()
            if not plane:  # the columns' scales are of all planes
                columns = (rest * signs * scale[:, None]).sum(0) / scale.square().sum().clamp_min(1e-30)
                columns = columns.half().float().clamp_min(1e-8)
        rows.append(scale.half().float())
        rest = rest - rows[-1][:, None] * columns * signs
    return torch.stack(rows), columns


@torch.no_grad()
def by_layer(teacher: Mamba2LM, windows: Tensor, rounding: Callable[[str, Tensor, Tensor], Tensor]) -> Mamba2LM:
    """The teacher with each projection replaced by rounding(path, weight, second moment of its inputs so far)."""
    model = copy.deepcopy(teacher)
    model.embedding.weight.data = dequantized(model.embedding.weight)
    hidden = list(model.embedding(windows).split(max(1, PIECE // windows.shape[1])))
    for i, layer in enumerate(model.layers):
        for name in ("in_proj", "out_proj"):
            path, weight = f"layers.{i}.{name}", layer.get_parameter(f"{name}.weight")
            moment = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)

            def look(_, inputs: tuple[Tensor], moment: Tensor = moment) -> None:
                x = dequantized(inputs[0]).flatten(0, 1)
                moment += x.T @ x

            hook = layer.get_submodule(name).register_forward_pre_hook(look)
            for part in hidden:
                _through(layer, part, teacher)
            hook.remove()
            layer.set_submodule(name, Int8Inputs(rounding(path, weight.detach(), moment)))
        hidden = [_through(layer, part, teacher) for part in hidden]
    return model


def _through(layer: nn.Module, hidden: Tensor, teacher: Mamba2LM) -> Tensor:
    state = Mamba2State.zeros(teacher.config, len(hidden))
    return layer(hidden, state.conv[0], state.ssm[0])[0]


def bits_of(tensors: dict[str, Tensor], weights: int) -> float:
    """Bits a weight of the projections in model.pt; their scales count as fp16, as those of the others."""
    parts = {name: tensor for name, tensor in tensors.items() if "_proj." in name}
    return sum(t.numel() * (16 if t.is_floating_point() else 8) for t in parts.values()) / weights


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True, help="text to calibrate on")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on")
    parser.add_argument("--tokens", type=int, default=32768, help="of --data")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rank", type=int, nargs="+", default=[2], help="the first is that of all P; default: 2")
    parser.add_argument("--planes", type=int, nargs="*", default=[1, 2, 4], metavar="P", help="default: 1 2 4")
    parser.add_argument("--budget", type=float, nargs="*", default=[], metavar="MB")
    parser.add_argument("--table", type=int, nargs="*", default=[], metavar="BITS")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG to write")
    given = parser.parse_args(arguments)
    rank, *other_ranks = given.rank

    teacher = load_teacher(given.teacher).eval().requires_grad_(False)
    tokenizer, ends = open_tokenizer(given.teacher / "tokenizer.json", teacher.config)
    text = tokenizer, ends[0], teacher.config.vocab_size
    windows = torch.from_numpy(sample(given.data, *text, given.tokens, given.window))
    held_out = sample([given.held_out], *text, 2**30, given.window + 1)
    measured = Measured(held_out, Ranks(0, 1, torch.device("cpu")), teacher)
    measured.add("teacher", teacher)
    matrices = {name: p for name, p in teacher.named_parameters() if name.endswith("_proj.weight")}
    weights = sum(p.numel() for p in matrices.values())

    rows = []

    def report(name: str, bits: float, model: nn.Module) -> None:
        measured.add(name, model)
        ratio = measured.perplexity[name] / measured.perplexity["teacher"]
        rows.append({"name": name, "bits": round(bits, 3), "ratio": ratio, "kl": measured.kl[name]})
        print(json.dumps(rows[-1]), flush=True)

    def report_student(name: str, config: DFSSMConfig, tensors: dict[str, Tensor], *_) -> None:
        report(name, bits_of(tensors, weights), from_tensors(config, tensors))

    def report_rounded(name: str, windows: Tensor, rounding: Callable) -> None:
        spent: dict[str, float] = {}

        def noted(path: str, weight: Tensor, moment: Tensor) -> Tensor:
            matrix, bits = rounding(path, weight, moment)
            spent[path] = bits * weight.numel() / weights
            return matrix

        model = by_layer(teacher, windows, noted)
        report(name, sum(spent.values()), model)

    for planes in given.planes:
        report_student(f"free {planes}", *convert(teacher, rank, planes))
        config, tensors, _ = calibrate(teacher, windows, rank, planes)
        report_student(f"calibrated {planes}", config, tensors)
        for other in other_ranks:
            report_student(f"calibrated {planes}/{other}", *calibrate(teacher, windows, other, planes))
        sizes = {path: bits_of({k: t for k, t in tensors.items() if k.startswith(path.removesuffix("weight"))},
                               matrix.numel()) for path, matrix in matrices.items()}  # fmt: skip
        report_rounded(
            f"arb {planes}",
            windows,
            lambda path, weight, moment, planes=planes, sizes=sizes: refined_binarisation(
                weight, moment, planes, sizes[f"{path}.weight"]
            ),
        )
        if planes > 1:
            one = windows[:1, :2]  # it looks at no inputs
            for group in (0, 64):
                report_rounded(
                    f"rtn {planes}" + (f"/{group}" if group else ""),
                    one,
                    lambda path, weight, moment, group=group, bits=planes: round_to_nearest(weight, bits, group),
                )
    found = measure(teacher, windows) if given.budget else {}
    for budget in given.budget:
        config = spend(teacher.config, budget * 1e6, found)
        report_student(f"budget {budget:g}", *calibrate(teacher, windows, config.rank, config.planes))
    for bits in given.table:
        for group in (0, 64, 32):
            model = copy.deepcopy(teacher)
            model.head.weight.data, spent = round_to_nearest(teacher.head.weight, bits, group)
            report(f"table {bits}" + (f"/{group}" if group else ""), spent, model)
    if given.plot:
        plot(rows, weights, given.plot)


def plot(rows: list[dict], weights: int, file: Path) -> None:
    """The divergence over the size of the projections, which have so many weights: a line for each way to round."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "dfssm", "font.size": 9}
    from matplotlib import pyplot

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kind, of = row["name"].split()
        if kind == "table":
            continue
        _, slash, more = of.partition("/")
        name = f"{kind}, {'groups of' if kind == 'rtn' else 'rank'} {more}" if slash else kind
        lines.setdefault(name, []).append((row["bits"], row["kl"]))
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axis.set(xlabel="bits per weight of the projections", ylabel="KL divergence from the teacher, nats", yscale="log")
    megabytes = axis.secondary_xaxis("top", functions=(lambda x: x * weights / 8e6, lambda x: x * 8e6 / weights))
    megabytes.set_xlabel("MB of the projections")
    axis.legend()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
