from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from dfssm.eval.scorer import open_scorer
from dfssm.model.checkpoint import load_student_tensors, save_student
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import save_teacher
from dfssm.model.teacher import Mamba2LM

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """The tiny student with its tokenizer beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("student")
    save_student(
        folder / "model.pt", tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()}
    )
    tiny.write_tokenizer(folder / "tokenizer.json")
    return folder / "model.pt"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A random teacher with its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    end = tiny.CONFIG.eos_token_id
    save_teacher(
        Mamba2LM(Mamba2Config(vocab_size=end + 1, d_model=32, n_layer=2, d_state=8, headdim=8, eos_token_id=end)),
        folder,
    )
    tiny.write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def bundle(cpu_target, tmp_path_factory):
    """The tiny student as a bundle with fp32 states."""
    return tiny.write_bundle(tmp_path_factory.mktemp("bundle") / "b", target=cpu_target, state_dtype="fp32")


@pytest.fixture(scope="session")
def narrow_bundle(cpu_target, tmp_path_factory):
    """The tiny student as a bundle with int8 states."""
    return tiny.write_bundle(tmp_path_factory.mktemp("bundle") / "b", target=cpu_target, state_dtype="int8")


@pytest.fixture(scope="session")
def demo_bundle(cpu_target, tmp_path_factory):
    """The shipped student as a bundle with fp32 states, without a tokenizer."""
    config, tensors = load_student_tensors(DEMO / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "tensors", lambda config, seed: {name: t.numpy() for name, t in tensors.items()})
        folder = tmp_path_factory.mktemp("demo") / "b"
        return tiny.write_bundle(folder, config, target=cpu_target, state_dtype="fp32", tokenizer=False)


@pytest.fixture(scope="session")
def scorers(teacher, student, bundle):
    return {kind: open_scorer(path) for kind, path in [("teacher", teacher), ("student", student), ("bundle", bundle)]}


@pytest.fixture(params=["teacher", "student", "bundle"])
def scorer(request, scorers):
    return scorers[request.param]


@pytest.fixture(scope="session")
def demo():
    """Folder of the shipped student."""
    return DEMO


@pytest.fixture(scope="session")
def story():
    """A text of the kind the shipped student was trained on."""
    return (
        "Once upon a time, there was a little girl named Lily. She had a small red ball. One day, Lily went to the "
        "park with her mom. She saw a big dog. The dog wanted to play with the ball. Lily was scared, but her mom "
        "smiled."
    )


@pytest.fixture(scope="session")
def plain_log_probs():
    """plain_log_probs(scorer, ids) -> log-probabilities of ids[1:], f64[T-1]: one run from a zero state, then torch."""

    def run(scorer, ids):
        logits, _ = scorer.logits(np.array([ids[:-1]]), scorer.new_state(1))
        found = torch.log_softmax(torch.from_numpy(logits[0]).double(), -1)
        return found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()

    return run


@pytest.fixture(scope="session")
def assert_close():
    """assert_close(scorer, found, expected, atol): all values of a teacher, nine tenths of a student's or bundle's.

    Sums of other lengths differ in their last bit. In a student that bit can move an int8 activation across a tie, and
    a random one as lively as the tiny student has logits some percent apart from there on.
    """

    def check(scorer, found, expected, atol):
        off = np.abs(np.asarray(found) - np.asarray(expected))
        assert (off <= atol).mean() >= (1 if scorer.kind == "teacher" else 0.9), off.max()
        assert np.median(off) <= atol / 10

    return check
