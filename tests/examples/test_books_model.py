"""The student of novels: what its card says of the files, and of their quality on a text that is shipped."""

import re

import numpy as np
import pytest
from documents import ROOT
from tokenizers import Tokenizer

from dfssm.eval.perplexity import measure
from dfssm.eval.scorer import open_scorer
from dfssm.eval.text import Text

HERE = ROOT / "examples" / "books"
CARD = (HERE / "README.md").read_text()


def test_the_card_has_the_sizes_of_the_files():
    sizes = {name: int(size.replace(",", "")) for name, size in re.findall(r"\| `([\w./]+)` \| ([\d,]+) \|", CARD)}
    assert sizes.keys() == {"model.pt", "tokenizer.json", "teacher/", "unseen.txt"}
    for name, size in sizes.items():
        path = HERE / name
        found = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
        assert found == size, name
    assert sum(sizes.values()) < 12e6
    assert (HERE / "teacher/tokenizer.json").read_bytes() == (HERE / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_card_has_what_the_student_is_worth_on_the_unseen_text():
    """Against its teacher, in the windows that the card names; the figures are rounded there."""
    ids = np.array(Tokenizer.from_file(str(HERE / "tokenizer.json")).encode((HERE / "unseen.txt").read_text()).ids)
    student, teacher = open_scorer(HERE / "model.pt"), open_scorer(HERE / "teacher")
    found = measure(student, Text(ids, np.zeros(len(ids), np.int64)), 257, 256, reference=teacher)
    row = re.search(r"student, `model.pt`\*\* \| unseen.txt \| (.*) \|", CARD)[1]
    perplexity, ratio, kl, same = (float(word.strip("* %")) for word in row.split("|"))
    against = found.against
    assert found.perplexity == pytest.approx(perplexity, rel=2e-3)
    assert found.perplexity / np.exp(against.nats / found.tokens) == pytest.approx(ratio, abs=2e-3)
    assert against.kl == pytest.approx(kl, abs=1e-3) and 100 * against.same_top == pytest.approx(same, abs=0.2)
