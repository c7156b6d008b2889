"""dfcompile run in an empty folder, and what a refusal looks like. For tests/compiler."""

import student_ref
import tiny
import torch

from dfssm.model.checkpoint import save_student
from dfssm.targets import TARGETS, get_target

RUN_HERE = [name for name in TARGETS if name in get_target(name).VERIFIED_BY]
"""Targets whose bundles run on any machine; those of the others are in test_trt.py."""


def save(path, config=None, seed=0):
    config = config or student_ref.config("plain")
    tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors(config, seed).items()}
    save_student(path, config, tensors)
    return path


def fails(result, words, left=()):
    """One line on stderr with `words` in it, exit status 1, and nothing in the folder but what was there before."""
    status, out, err, names = result
    assert status == 1 and out == ""
    assert err.startswith("dfcompile: error: ") and err.count("\n") == 1 and words in err, err
    assert names == list(left)
