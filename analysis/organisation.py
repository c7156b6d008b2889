"""Studies of how categories lie in the hidden states: separation and phases, the atlas, the heat map, centroids."""

from __future__ import annotations

import numpy as np

from . import plot
from .geometry import explained, principal
from .gram import by_category, centroid_accuracy, cosines, layers, one_hot, separation
from .material import MODEL, RANDOM, Material, Study
from .phases import described, find_phases


@plot.styled
def category_separation(material: Material) -> Study:
    """Mean cosine within categories minus that between them, layer by layer, and the phases of that curve.

    Arrays: of each labelling (category, and answer where answers are shared) the curves of each model [L+1], those of
    shuffled labels and of prompts drawn again [draws,L+1]; `phases`: the boundaries of each labelling's curve.
    """
    arrays: dict = {}
    labellings = material.labellings
    figure, axes = plot.figure(1, len(labellings))
    says, null_says = [], []
    for plane, (name, labels) in zip(axes[0], labellings.items(), strict=True):
        members, draws = one_hot(labels), material.drawn(labels)
        curves, shuffled, bootstrapped = {}, [], []
        for who, states in material.states.items():
            curve: list[float] = []
            for layer in layers(states):
                products = cosines(layer)
                curve.append(separation(products, members))
                if who == MODEL:
                    shuffled.append([separation(products, one) for one in draws.shuffled])
                    bootstrapped.append([separation(products, members, one) for one in draws.weights])
            curves[who] = np.array(curve)
        chance, again = np.array(shuffled).T, np.array(bootstrapped).T
        found = find_phases(curves[MODEL], again, chance, curves[RANDOM])
        arrays[name] = curves | {"shuffled": chance, "bootstrapped": again, "phases": [vars(one) for one in found]}
        plot.band(plane, material.layers, chance)
        plot.interval(plane, material.layers, again, MODEL)
        for who, values in curves.items():
            plot.curve(plane, material.layers, values, who)
        plot.boundaries(plane, found)
        plot.over_layers(plane, material.layers, f"separation by {name}")
        plane.legend()
        top = int(curves[MODEL].argmax())
        says.append(
            f"By {name} the prompts separate most after layer {top} ({curves[MODEL][top]:.3f}; {curves[MODEL][-1]:.3f} "
            f"at the end). " + described(found)
        )
        null_says.append(
            f"By {name}, shuffled labels stay below {_high(chance):.3f} and random weights reach "
            f"{curves[RANDOM].max():.3f}; steps without meaning are up to {found[0].chance:.3f}."
        )
    return Study("separation", "Category separation", arrays, figure, " ".join(says), " ".join(null_says))


def _high(draws: np.ndarray) -> float:
    """The largest 95th percentile of draws [n,L+1]."""
    return float(np.quantile(draws, 0.95, axis=0).max())


@plot.styled
def atlas(material: Material) -> Study:
    """The prompts on the two first principal components at four stages, coloured by category.

    Arrays: of each model and stage the points [N,2], their share of the variance, and the share of the points' variance
    that the categories explain; `shuffled`: the same of shuffled labels [stages,draws].
    """
    stages, labels = material.stages, material.categories
    names = material.prompts.categories
    shown = [MODEL, RANDOM]
    figure, axes = plot.figure(len(shown), len(stages), height=2.0, width=7.5)
    arrays: dict = {"stages": stages, "categories": names}
    for row, who in zip(axes, shown, strict=True):
        arrays[who] = {"points": [], "variance": [], "explained": []}
        for plane, layer in zip(row, stages, strict=True):
            points, shares = principal(material.states[who][layer])
            eta = explained(points, labels)
            for values, value in zip(arrays[who].values(), (points, float(shares.sum()), eta), strict=True):
                values.append(value)
            for i, name in enumerate(names):
                x, y = points[labels == i].T
                marker, colour = plot.MARKERS[i // len(plot.COLOURS)], plot.COLOURS[i % len(plot.COLOURS)]
                plane.scatter(x, y, 5, colour, marker=marker, label=name, linewidths=0)
            plane.set_title(f"{who}, layer {layer}: {eta:.0%}", fontsize=7)
            plane.set_xticks([])
            plane.set_yticks([])
    handles, _ = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=7, markerscale=1.5, handletextpad=0.1)
    draws = material.drawn(labels).shuffled
    arrays["shuffled"] = np.array(
        [[explained(points, one.argmax(1)) for one in draws] for points in arrays[MODEL]["points"]]
    )
    eta = arrays[MODEL]["explained"]
    best = int(np.argmax(eta))
    says = (
        f"Categories explain {', '.join(f'{value:.0%}' for value in eta)} of the variance in the plane after layers "
        f"{', '.join(map(str, stages))}; most after layer {stages[best]}."
    )
    theirs, high = arrays[RANDOM]["explained"], np.quantile(arrays["shuffled"], 0.95)
    null = (
        f"Random weights: {', '.join(f'{value:.0%}' for value in theirs)}; 95 % of shuffled labels explain less than "
        f"{high:.0%}."
    )
    return Study("atlas", "Atlas: principal components at four stages", arrays, figure, says, null)


@plot.styled
def heat_map(material: Material) -> Study:
    """Separation of each category from all others at four stages, those of one wording above those of several.

    Arrays: `order`, `uniform` (whether of one wording), and of MODEL, RANDOM and `shuffled` (their mean) [K,stages].
    """
    stages, members = material.stages, one_hot(material.categories)
    uniform = np.array(material.prompts.uniform)
    order = np.argsort(~uniform, kind="stable")
    names = [material.prompts.categories[i] + ("" if uniform[i] else " *") for i in order]
    draws = material.drawn(material.categories).shuffled
    maps: dict[str, list] = {MODEL: [], RANDOM: [], "shuffled labels": []}
    for layer in stages:
        for who in (MODEL, RANDOM):
            maps[who].append(by_category(cosines(material.states[who][layer].astype(float)), members)[order])
        products = cosines(material.states[MODEL][layer].astype(float))
        maps["shuffled labels"].append(np.mean([by_category(products, one) for one in draws], 0)[order])
    shown = {who: np.array(values).T for who, values in maps.items()}
    largest = max(float(values.max()) for values in shown.values())
    least = min(0.0, *(float(values.min()) for values in shown.values()))
    figure, axes = plot.figure(1, 3, height=0.6 + 0.17 * len(names), sharey=True)
    for plane, (who, values) in zip(axes[0], shown.items(), strict=True):
        image = plane.pcolormesh(values, cmap="cividis", vmin=least, vmax=largest)
        for (i, j), value in np.ndenumerate(values):
            dark = value < largest / 2
            plane.text(j + 0.5, i + 0.5, f"{value:.2f}".replace("-0.00", "0.00"), ha="center", va="center", fontsize=6,
                       color="white" if dark else "black")  # fmt: skip
        plane.set_xticks(np.arange(len(stages)) + 0.5, map(str, stages))
        plane.set_yticks(np.arange(len(names)) + 0.5, names)
        plane.set_title(who)
        plane.set_xlabel("layer")
    axes[0][0].invert_yaxis()
    figure.colorbar(image, ax=axes[0], label="separation", shrink=0.8)
    arrays = {"stages": stages, "order": [material.prompts.categories[i] for i in order], "uniform": uniform[order]}
    means = {who: [_means(v[:, s], uniform[order]) for s in range(len(stages))] for who, v in shown.items()}
    says = "Mean separation " + _by_wording(means[MODEL], stages) + " (*: categories of several wordings)."
    high = shown["shuffled labels"].max()
    null = f"Random weights: {_by_wording(means[RANDOM], stages)}; shuffled labels at most {high:.2f}."
    return Study("heatmap", "Separation by category and stage", arrays | shown, figure, says, null)


def _means(values: np.ndarray, uniform: np.ndarray) -> tuple[float | None, float | None]:
    one, several = (float(values[which].mean()) if which.any() else None for which in (uniform, ~uniform))
    return one, several


def _by_wording(means: list[tuple[float | None, float | None]], stages: list[int]) -> str:
    parts = []
    for name, values in zip(("of one wording", "of several wordings"), zip(*means, strict=True), strict=True):
        if values[0] is not None:
            parts.append(f"of categories {name}: {', '.join(f'{round(value, 2) + 0.0:.2f}' for value in values)}")
    return f"after layers {', '.join(map(str, stages))} " + "; ".join(parts)


@plot.styled
def centroids(material: Material) -> Study:
    """Accuracy of the nearest centroid, each prompt left out of its own, layer by layer.

    Arrays: as `category_separation` has them, without phases.
    """
    labellings = material.labellings
    figure, axes = plot.figure(1, len(labellings))
    arrays: dict = {}
    says, null_says = [], []
    for plane, (name, labels) in zip(axes[0], labellings.items(), strict=True):
        members, draws = one_hot(labels), material.drawn(labels).shuffled
        curves: dict[str, list[float]] = {who: [] for who in material.states}
        shuffled = []
        for who, states in material.states.items():
            for layer in layers(states):
                products = layer @ layer.T
                curves[who].append(centroid_accuracy(products, members))
                if who == MODEL:
                    shuffled.append([centroid_accuracy(products, one) for one in draws])
        chance = np.array(shuffled).T
        arrays[name] = {who: np.array(curve) for who, curve in curves.items()} | {"shuffled": chance}
        plot.band(plane, material.layers, chance)
        for who, curve in curves.items():
            plot.curve(plane, material.layers, curve, who)
        plane.set_ylim(0, 1.03)
        plot.over_layers(plane, material.layers, f"nearest centroid: accuracy, {name}")
        plane.legend()
        top = int(np.argmax(curves[MODEL]))
        says.append(f"The {name} of {curves[MODEL][top]:.0%} of the prompts is right after layer {top}.")
        null_says.append(
            f"{name.capitalize()}: shuffled labels stay below {_high(chance):.0%}, random weights reach "
            f"{max(curves[RANDOM]):.0%}."
        )
    return Study("centroids", "Nearest centroid, leave one out", arrays, figure, " ".join(says), " ".join(null_says))
