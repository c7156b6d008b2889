"""All studies of one model, in their order, and what is written of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfssm.base import paths
from dfssm.base.extras import require
from dfssm.base.files import writing

from . import PACKAGES
from .comparison import against_teacher
from .knowledge import contrastive_lens, knowledge_dimension, localisation, rank_of_answers
from .material import AGAINST, MODEL, RANDOM, Material, Progress, Study
from .organisation import atlas, category_separation, centroids, heat_map
from .prompts import ATLAS, read_prompts, tokenize
from .report import plain, write_report
from .subject import open_subject, require_comparable

STUDIES: Sequence[Callable[[Material], Study]] = (
    category_separation,
    atlas,
    heat_map,
    centroids,
    rank_of_answers,
    contrastive_lens,
    localisation,
    knowledge_dimension,
)

CACHE = "states"
"""The folder of hidden states in the output."""


def analyze(
    path: str | Path,
    output: str | Path,
    against: str | Path | None = None,
    prompts: str | Path | None = None,
    tokenizer: str | Path | None = None,
    draws: int = 100,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """Study the teacher, student or bundle at `path`, beside the teacher `against`, and write the report to `output`.

    `prompts`: a CSV file, by default our own; `tokenizer`: of a model without one; `draws`: how many times labels are
    shuffled and prompts drawn again. Hidden states are kept in `output`/states and taken from there the next time.
    Returns what docs/json.md says. DfssmError for what the user can mend, before slow work where that can be.
    """
    require(PACKAGES)
    rows = read_prompts(prompts or ATLAS)
    folder = paths.output_folder(output)
    subject = open_subject(path, tokenizer)
    teacher = open_subject(against, tokenizer) if against else None
    if teacher:
        require_comparable(subject, teacher)
    asked = tokenize(rows, subject.tokenizer)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    material = Material.read(subject, teacher, asked, folder / CACHE, progress, draws=draws)
    seconds = {"states": time.perf_counter() - start}
    studies: dict[str, Study] = {}
    whole = len(STUDIES) + bool(teacher)
    for done, make in enumerate([*STUDIES, *([lambda m: against_teacher(m, studies)] if teacher else [])], 1):
        start = time.perf_counter()
        study = make(material)
        studies[study.name] = study
        seconds[study.name] = time.perf_counter() - start
        progress("studies", done, whole)
    result = {
        "model": subject.name,
        "kind": subject.kind,
        "against": teacher and teacher.name,
        "prompts": str(prompts or ATLAS.name),
        "count": len(asked),
        "categories": {name: sum(row.category == name for row in rows) for name in asked.categories},
        "answers": {"one_token": int(asked.whole.sum()), "different": len(set(asked.answer_ids.tolist()))},
        "layers": material.n_layer,
        "curves": [who for who in (MODEL, AGAINST, RANDOM) if who in material.states],
        "draws": draws,
        "seconds": seconds,
        "studies": {
            name: {"title": study.title, "says": study.says, "null": study.null_says} for name, study in studies.items()
        },
    }
    if teacher:
        arrays = studies["teacher"].arrays
        result |= {"cka": plain(arrays["cka"]), "correlations": arrays["correlations"]}
    result["files"] = write_report(folder, result, list(studies.values()))
    return result
