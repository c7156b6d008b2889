"""Studies of what a model knows: ranks of the answers, the contrastive lens, causal localisation, and its dimension."""

from __future__ import annotations

from functools import partial

import numpy as np

from . import plot
from .geometry import dimension, shuffled_columns
from .gram import one_hot
from .lens import directions, hits, rank_trajectories
from .material import MODEL, RANDOM, Material, Study
from .phases import described, find_phases
from .swaps import choose, flip_layers, swap

FIRST = 10
"""Tokens that the contrastive lens looks at."""


@plot.styled
def rank_of_answers(material: Material) -> Study:
    """Logit lens: the rank of the right answer's first token, layer by layer, and by how much it is before the answers
    of other prompts, in decades: the mean of log10(rank of those / rank of the right one), whose phases are found.

    Arrays: of each model the ranks i64[L+1,N] and the advantage `... advantage` [L+1]; `shuffled` [few,L+1,N]: MODEL's
    ranks of the answers of other prompts; `uniform` bool[N]: prompts of categories of one wording; `phases`.
    """
    prompts, layers = material.prompts, material.layers
    answers, rng = prompts.answer_ids, material.rng()
    wrong = [rng.permutation(answers) for _ in range(material.few)]
    curves, advantages = {}, {}  # i64[L+1,N], f64[L+1,N]
    for who, states in material.states.items():
        curves[who], *others = rank_trajectories(material.subjects[who], states, answers, *wrong)
        of_others = np.log10(others)
        advantages[who] = of_others.mean(0) - np.log10(curves[who])
        if who == MODEL:
            shuffled, chance = np.array(others), of_others.mean(2) - of_others.mean((0, 2))
    weights = np.array(material.drawn(material.categories).weights)
    bootstrapped = weights @ advantages[MODEL].T / weights.sum(1, keepdims=True)
    means = {who: values.mean(1) for who, values in advantages.items()}
    phases = find_phases(means[MODEL], bootstrapped, chance, means[RANDOM])

    figure, axes = plot.figure(1, 2)
    ranked, ahead = axes[0]
    for who, values in curves.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
        plot.curve(ranked, layers, middle, who)
        if who == MODEL:
            ranked.fill_between(layers, low, high, color=plot.STYLES[who]["color"], alpha=0.2, linewidth=0)
    others_rank = np.median(shuffled, axis=(0, 2))
    ranked.plot(layers, others_rank, color=plot.INK, linewidth=1, label="answers of other prompts")
    ranked.set_yscale("log")
    ranked.invert_yaxis()
    plot.over_layers(ranked, layers, "rank of the answer: median, quartiles")
    ranked.legend()
    plot.band(ahead, layers, chance, "answers of other prompts, 90 %")
    plot.interval(ahead, layers, bootstrapped, MODEL)
    for who, curve in means.items():
        plot.curve(ahead, layers, curve, who)
    uniform = np.array(prompts.uniform)[material.categories]
    if uniform.any() and not uniform.all():
        for name, which, line in (("one wording", uniform, "-."), ("several wordings", ~uniform, "--")):
            curve = advantages[MODEL][:, which].mean(1)
            plot.curve(ahead, layers, curve, MODEL, label=name, linestyle=line, linewidth=1, marker="")
    plot.boundaries(ahead, phases)
    plot.over_layers(ahead, layers, "advantage of the right answer, decades")
    ahead.legend()

    top, end = float((curves[MODEL][-1] == 1).mean()), float(means[MODEL][-1])
    first, last = np.median(curves[MODEL][[0, -1]], axis=1)
    says = (
        f"After the last layer the right answer is first for {top:.0%} of the prompts; its median rank is {last:.0f} "
        f"({first:.0f} after the embedding), {end:.2f} decades before the answers of other prompts. {described(phases)}"
    )
    null = (
        f"Answers of other prompts end at a median rank of {others_rank[-1]:.0f}; with random weights the advantage is "
        f"at most {means[RANDOM].max():.2f} decades, and steps without meaning are up to {phases[0].chance:.2f}."
    )
    arrays = curves | {f"{who} advantage": curve for who, curve in means.items()}
    arrays |= {"shuffled": shuffled, "uniform": uniform, "phases": [vars(one) for one in phases]}
    return Study("ranks", "Logit lens: rank of the answer", arrays, figure, says, null)


@plot.styled
def contrastive_lens(material: Material) -> Study:
    """What the head makes of each category's centroid minus the mean of all states: its first tokens at four stages,
    and, layer by layer, the share of the category's answers among the first FIRST.

    Arrays: of each model the share [L+1]; `shuffled` [few,L+1]; `tokens`: of MODEL, category
    -> the five first tokens at each stage.
    """
    prompts, members = material.prompts, one_hot(material.categories)
    names = prompts.categories
    answers = [np.unique(prompts.answer_ids[material.categories == i]) for i in range(len(names))]
    draws = material.drawn(material.categories).shuffled[: material.few]
    tokenizer = material.subjects[MODEL].tokenizer
    curves: dict[str, np.ndarray] = {}
    shuffled = []
    tokens: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for who, states in material.states.items():
        curve = []
        for layer, state in enumerate(states):
            logits = material.subjects[who].logits(directions(state, members))
            curve.append(hits(logits, answers, FIRST))
            if who == MODEL:
                fake = [directions(state, one) for one in draws]
                made = material.subjects[who].logits(np.concatenate(fake)).reshape(len(draws), *logits.shape)
                shuffled.append([hits(one, answers, FIRST) for one in made])
                if layer in material.stages:
                    for name, row in zip(names, logits, strict=True):
                        first = np.argsort(-row, kind="stable")[:5].tolist()
                        tokens[name][str(layer)] = [tokenizer.decode([i], skip_special_tokens=False) for i in first]
        curves[who] = np.array(curve)
    chance = np.array(shuffled).T
    figure, ((plane,),) = plot.figure(1, 1, width=5)
    plot.band(plane, material.layers, chance)
    for who, values in curves.items():
        plot.curve(plane, material.layers, values, who)
    plot.over_layers(plane, material.layers, f"answers among the {FIRST} first tokens")
    plane.legend()
    top = int(curves[MODEL].argmax())
    share, high = curves[MODEL][top], np.quantile(chance, 0.95, axis=0).max()
    says = f"At most {share:.0%} of a category's answers are among its {FIRST} first tokens, after layer {top}."
    null = f"Shuffled labels reach {high:.0%}, random weights {curves[RANDOM].max():.0%}."
    arrays = curves | {"shuffled": chance, "tokens": tokens}
    return Study("contrast", "Contrastive logit lens", arrays, figure, says, null)


@plot.styled
def localisation(material: Material) -> Study:
    """Causal localisation: the last token's state of a prompt, put into another of the same wording after each layer.

    Arrays: of each model `flip` i64[P] (the first layer at which the donor's answer is preferred, -1 for none), of the
    `pairs` those of which each prompt by itself prefers its own answer; the share of these that prefer the donor's
    [L+1] and its probability against the base's [L+1]. `shuffled`: that share where the answers are exchanged among the
    prompts [draws,L+1], and `known`: how many pairs then prefer "their own" [draws]; `prompts`: those that are paired;
    `knowledge_layer`: the median of MODEL's flips; `claimed`: more pairs are known than by chance.
    """
    prompts, layers = material.prompts, material.layers
    chosen = choose(prompts.labels("template"), prompts.answer_ids)
    right = np.arange(len(chosen))
    arrays: dict = {"prompts": [prompts.rows[i].prompt for i in chosen]}
    flips: dict[str, np.ndarray] = {}
    figure, axes = plot.figure(1, 3, width=7.5)
    share, probability, where = axes[0]
    for who, states in material.states.items():
        swaps = swap(material.subjects[who], prompts, chosen, states, partial(material.progress, f"swap, {who}"))
        margins, pairs = swaps.margins(right)
        flips[who] = flip_layers(margins)
        arrays[who] = {"flip": flips[who], "pairs": len(swaps.base)}
        arrays[who] |= {"share": _mean(margins > 0), "probability": _mean(0.5 * (1 + np.tanh(margins / 2)))}
        plot.curve(share, layers, arrays[who]["share"], who, label=f"{who}: {len(pairs)} of {len(swaps.base)} pairs")
        plot.curve(probability, layers, arrays[who]["probability"], who)
        if who == MODEL:
            rng = material.rng()
            exchanged = [swaps.margins(_deranged(len(chosen), rng))[0] for _ in range(material.draws)]
            arrays["shuffled"] = np.array([_mean(one > 0) for one in exchanged])
            arrays["known"] = np.array([one.shape[1] for one in exchanged])
            if arrays["known"].any():
                plot.band(share, layers, arrays["shuffled"], "answers exchanged, 90 %")
    width = 0.8 / len(flips)
    for i, (who, found) in enumerate(flips.items()):
        counts = np.bincount(found[found >= 0], minlength=len(layers))
        places = layers + (i - (len(flips) - 1) / 2) * width
        where.bar(places, counts, width, color=plot.STYLES[who]["color"], label=who)
    plot.over_layers(share, layers, "pairs that prefer the donor's answer")
    plot.over_layers(probability, layers, "probability of the donor's answer")
    plot.over_layers(where, layers, "pairs that flip first here")
    handles, names = share.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    high = float(np.quantile(arrays["known"], 0.95))
    chance = max(high, len(flips[RANDOM]))
    arrays |= {"knowledge_layer": knowledge_layer(flips[MODEL]), "claimed": len(flips[MODEL]) > chance}
    says = _flipped(flips[MODEL], arrays[MODEL]["pairs"])
    if not arrays["claimed"]:
        says += " No knowledge layer is claimed: chance gives as many pairs."
    null = (
        f"Random weights: {_flipped(flips[RANDOM], arrays[RANDOM]['pairs'])} With the answers exchanged among the "
        f"prompts at most {high:.0f} pairs (95 %) prefer their own."
    )
    return Study("swaps", "Causal localisation by swapped states", arrays, figure, says, null)


def _mean(values: np.ndarray) -> np.ndarray:
    """Of values [L+1,P] over the pairs; NaN where there are none."""
    return values.mean(1) if values.shape[1] else np.full(len(values), np.nan)


def knowledge_layer(flips: np.ndarray) -> int | None:
    """The median of the layers at which pairs flip; None where none does."""
    found = np.sort(flips[flips >= 0])
    return int(found[(len(found) - 1) // 2]) if len(found) else None


def _flipped(flips: np.ndarray, pairs: int) -> str:
    if not len(flips):
        return f"In none of {pairs} ordered pairs do both prompts prefer their own answer."
    found = flips[flips >= 0]
    known = f"In {len(flips)} of {pairs} ordered pairs both prompts prefer their own answer; {len(found)} of them flip"
    if not len(found):
        return f"{known}."
    return f"{known}, between layers {found.min()} and {found.max()}, half of them by layer {knowledge_layer(flips)}."


def _deranged(count: int, rng: np.random.Generator) -> np.ndarray:
    """i64[count], each number in the place of another one."""
    order = rng.permutation(count)
    found = np.empty(count, np.int64)
    found[order] = np.roll(order, 1)
    return found


@plot.styled
def knowledge_dimension(material: Material) -> Study:
    """How many principal components hold 95 % of the variance of the prompts of one wording, layer by layer.

    Arrays: of each model [L+1]; `shuffled`: MODEL's, each channel dealt anew [few,L+1];
    `count`: the number of prompts, which bounds it.
    """
    prompts = material.prompts
    templates = prompts.labels("template")
    most = int(np.bincount(templates).argmax())
    which = np.flatnonzero(templates == most)
    curves = {who: np.array([dimension(s[which]) for s in states]) for who, states in material.states.items()}
    rng = material.rng()
    dealt = np.array(
        [
            [dimension(shuffled_columns(layer[which], rng)) for layer in material.states[MODEL]]
            for _ in range(material.few)
        ]
    )
    figure, ((plane,),) = plot.figure(1, 1, width=5)
    plot.band(plane, material.layers, dealt, "channels shuffled, 90 %")
    for who, curve in curves.items():
        plot.curve(plane, material.layers, curve, who)
    plot.over_layers(plane, material.layers, "components for 95 % of the variance")
    plane.legend()
    text = prompts.rows[which[0]].template
    ours, theirs = (", ".join(map(str, curves[who])) for who in (MODEL, RANDOM))
    says = f"{len(which)} prompts of one wording ({text}) take {ours} components after layers 0 to {material.n_layer}."
    null = f"Random weights: {theirs}; independent channels: {dealt.min()} to {dealt.max()}."
    arrays = curves | {"shuffled": dealt, "count": len(which)}
    return Study("dimension", "Dimension of the states", arrays, figure, says, null)
