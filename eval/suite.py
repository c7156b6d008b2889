"""Tasks of lm-evaluation-harness, run and reported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dfssm.base import paths
from dfssm.base.errors import DfssmError, reason
from dfssm.base.extras import require

from .scorer import locate, open_scorer, packages

PACKAGES = {"eval": ("lm-eval",)}
"""What tasks take, the model aside; see `dfssm.base.extras`."""

TASKS = Path(__file__).with_name("tasks")
"""Task files that read local data."""

BOOTSTRAPS = 1000
"""Resamples for a standard error that has no formula: good to some 2 %, in 2 s for LAMBADA instead of minutes."""

FEWSHOT_SEED = 1234  # the harness's default


def run_tasks(
    path: str | Path,
    names: Sequence[str],
    data: str | Path | None = None,
    limit: int | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run tasks on the model at `path` (see `open_scorer`); the keys of the result are those of docs/json.md.

    Args: `data`: folder of the files that the task files in TASKS read; without it a name is one of the harness's own
        tasks, which it downloads. `limit`: only so many questions of each task.
    Raises DfssmError when lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    kind, *_ = locate(path, tokenizer)  # all of this before seconds of imports and data
    if data is not None:
        data = paths.folder(data, "--data the folder of the questions")
    require(PACKAGES, packages(kind))
    import lm_eval
    from lm_eval.tasks import TaskManager

    from .harness import DfssmLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task file that has a dataset of its own
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forking after torch and ONNX Runtime made their threads can hang
    if data is None:
        manager = TaskManager()
        remedy = "lm_eval ls tasks lists them, --data DIR chooses the local ones"
    else:
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data": str(data)})
        remedy = f"with --data there are {', '.join(manager.all_tasks)}"
    for name in names:
        if name not in manager.all_tasks:
            raise DfssmError(f"task {name!r} is not known: {remedy}")
    with redirect_stdout(sys.stderr):  # the harness prints, and stdout is for the result
        try:
            loaded = manager.load(list(names))
        except OSError as error:
            raise DfssmError(
                f"the data of {', '.join(names)} cannot be had ({reason(error)}): give --data DIR"
            ) from None
        for task in loaded["tasks"].values():
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        model = DfssmLM(open_scorer(path, tokenizer, device))
        found = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return {
        "model": str(path),
        "kind": kind,
        "tasks": {name: _task(name, found) for name in loaded["tasks"]},
        "limit": limit,
        "harness": lm_eval.__version__,
    }


def _task(name: str, found: dict[str, Any]) -> dict[str, Any]:
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        stderr = found["results"][name].get(f"{metric}_stderr,{chosen}")
        label = metric if chosen == "none" else key
        metrics[label] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
    samples = found["n-samples"][name]
    return {
        "metrics": metrics,
        "count": samples["effective"],
        "available": samples["original"],
        "fewshot": found["n-shot"][name],
    }
