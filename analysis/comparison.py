"""How much of each figure survives compression: a model beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from . import plot
from .geometry import linear_cka
from .material import AGAINST, MODEL, RANDOM, Material, Study


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's, of two curves; None where one is constant."""
    x, y = (np.asarray(v, float) - np.mean(v) for v in (x, y))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y / size) if size > 1e-12 * max(1.0, float(np.abs([x, y]).max()) ** 2) else None


def curves_of(studies: Mapping[str, Study]) -> dict[str, dict[str, np.ndarray]]:
    """The curves over the layers that models have in common: name -> whose -> [L+1]."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in ("separation", "centroids"):
        for labelling, curves in studies[name].arrays.items():
            found[f"{name}, {labelling}"] = curves
    ranks, swaps = studies["ranks"].arrays, studies["swaps"].arrays
    everyone = (MODEL, RANDOM, AGAINST)
    found["rank of the answer (logarithm)"] = {who: np.log10(ranks[who]).mean(1) for who in everyone}
    found["swaps: probability"] = {who: swaps[who]["probability"] for who in everyone}
    found["dimension"] = studies["dimension"].arrays
    return found


@plot.styled
def against_teacher(material: Material, studies: Mapping[str, Study]) -> Study:
    """Linear CKA of each layer with the teacher's, and correlation of each curve over the layers with the teacher's.

    Arrays: `cka` of MODEL and RANDOM with the teacher [L+1], `shuffled`: of MODEL with its prompts shuffled [few,L+1];
    `correlations`: curve -> of MODEL and RANDOM with the teacher's.
    """
    states, layers = material.states, material.layers
    theirs, rng = states[AGAINST], material.rng()

    def with_teacher(ours: Sequence[np.ndarray]) -> list[float]:
        return [linear_cka(*pair) for pair in zip(ours, theirs, strict=True)]

    cka = {who: np.array(with_teacher(list(states[who]))) for who in (MODEL, RANDOM)}
    dealt = ([rng.permutation(layer) for layer in states[MODEL]] for _ in range(material.few))
    shuffled = np.array([with_teacher(one) for one in dealt])
    correlations = {
        name: {who: correlation(curves[who], curves[AGAINST]) for who in (MODEL, RANDOM)}
        for name, curves in curves_of(studies).items()
    }
    figure, axes = plot.figure(1, 2, width=7.5)
    plane, bars = axes[0]
    plot.band(plane, layers, shuffled, "prompts shuffled, 90 %")
    for who, values in cka.items():
        plot.curve(plane, layers, values, who)
    plane.set_ylim(0, 1.03)
    plot.over_layers(plane, layers, "linear CKA with the teacher")
    plane.legend()
    places = np.arange(len(correlations))
    for i, who in enumerate((MODEL, RANDOM)):
        lengths = [float("nan") if one[who] is None else one[who] for one in correlations.values()]
        bars.barh(places + 0.2 - 0.4 * i, lengths, 0.4, color=plot.STYLES[who]["color"], label=who)
    bars.set_yticks(places, list(correlations))
    bars.axvline(0, color=plot.INK, linewidth=0.5)
    bars.set_xlim(-1.03, 1.03)
    bars.set_xlabel("correlation with the teacher's curve")
    bars.legend()
    ours, chance = cka[MODEL], cka[RANDOM]
    says = (
        f"CKA with the teacher is {ours.min():.2f} to {ours.max():.2f} over the layers, {ours[-1]:.2f} after the last; "
        f"curves correlate: {_listed(correlations, MODEL)}."
    )
    null = (
        f"Random weights have a CKA of {chance.min():.2f} to {chance.max():.2f}, shuffled prompts at most "
        f"{shuffled.max():.2f}; the curves of random weights correlate: {_listed(correlations, RANDOM)}."
    )
    arrays = {"cka": cka, "shuffled": shuffled, "correlations": correlations}
    return Study("teacher", "Beside the teacher", arrays, figure, says, null)


def _listed(correlations: Mapping[str, Mapping[str, float | None]], who: str) -> str:
    found = {name: values[who] for name, values in correlations.items()}
    return "; ".join(f"{name} {'constant' if value is None else f'{value:.2f}'}" for name, value in found.items())
