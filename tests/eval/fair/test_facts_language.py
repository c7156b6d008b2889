"""The language of facts: facts hold, nothing else tells them, and no text comes twice."""

import re

import numpy as np
import pytest

from dfssm.base.endings import END_OF_TEXT
from dfssm.eval.fair import language as languages
from dfssm.eval.fair.facts_language import OBJECTS, RELATIONS, Facts, stored
from dfssm.eval.fair.language import STUDENT, TEACHER, TEST, Fresh, seeded, vocab_size
from dfssm.model.text import documents
from dfssm.targets.text import encode, load_tokenizer

FACT = re.compile(r"first(\d+) last(\d+) relation(\d+) object(\d+)")
SENTENCE = re.compile(  # of one number throughout; what may follow the verb is of either
    r"((a|every)( adjective\d)? noun\d+ verb\ds|(some|most)( adjective\d)? noun\d+s verb\d)"
    r"( ((a|every)( adjective\d)? noun\d+|(some|most)( adjective\d)? noun\d+s))?"
)


def text(language, document):
    return " ".join(language.words[i] for i in document.ids)


@pytest.fixture(scope="module")
def language():
    return Facts(side=4, seed=1)


def many(language, count=500, whose=TEACHER):
    random = seeded(0, whose)
    return [language.document(random) for _ in range(count)]


def test_a_document_is_facts_that_hold_and_sentences_of_the_grammar(language):
    facts = {}
    shares = []
    for document in many(language):
        words = text(language, document)
        assert words.endswith(f" . {END_OF_TEXT}")
        sentences = words.removesuffix(f" . {END_OF_TEXT}").split(" . ")
        assert len(sentences) == 12
        found = [FACT.fullmatch(sentence) for sentence in sentences]
        for sentence, fact in zip(sentences, found, strict=True):
            assert fact or SENTENCE.fullmatch(sentence), sentence
        stated = [tuple(map(int, fact.groups())) for fact in found if fact]
        assert len({fact[:3] for fact in stated}) == len(stated)  # none could be copied from the context
        for *key, value in stated:
            assert facts.setdefault(tuple(key), value) == value
        known = [language.words[i] for i in document.ids[document.known]]
        assert known == [f"object{value}" for *_, value in stated]
        shares.append(len(stated) / 12)
    assert len(facts) == language.count == 4 * 4 * RELATIONS
    for number in range(language.count):
        first, last, relation, value = map(
            int, FACT.fullmatch(" ".join(language.words[i] for i in language.fact(number))).groups()
        )
        assert facts[first, last, relation] == value
    assert 0.45 < np.mean(shares) < 0.55


def test_no_text_comes_twice(language):
    texts = [document.ids.tobytes() for whose in (TEACHER, STUDENT, TEST) for document in many(language, 2000, whose)]
    assert len(set(texts)) == len(texts)
    windows = Fresh(language, 100, seed=0)
    rows = windows.take(500)
    assert len(np.unique(rows, axis=0)) == 500 and rows.shape == (500, 101)
    assert windows.state_dict() == {"position": 500}
    again = Fresh(language, 100, seed=0)
    again.load_state_dict({"position": 300})
    assert (again.take(200) == rows[300:]).all()


def test_a_window_marks_what_can_be_known(language):
    """With the marks taken off it is a text; what is marked are objects."""
    for row in Fresh(language, 200, seed=3).take(20):
        ids = np.where(row < 0, ~row, row)
        words = [language.words[i] for i in ids]
        assert {word[:6] for word, marked in zip(words, row < 0, strict=True) if marked} == {"object"}
        assert "object" not in {word[:6] for word, marked in zip(words, row < 0, strict=True) if not marked}


def test_everything_is_asked_once(language):
    asked = [
        fact for document in language.everything(seeded(0, TEST)) for fact in FACT.findall(text(language, document))
    ]
    assert len(asked) == len(set(asked)) == language.count


def test_parts_of_a_fact_tell_nothing_of_its_object():
    """Who knows the best object for each name, or each relation, but no fact, is right as often as a guess."""
    language = Facts(side=40, seed=0)
    assert language.count == 6400
    objects = language.objects.reshape(40, 40, RELATIONS)
    for axis in range(3):
        halves = np.moveaxis(objects, axis, 0).reshape(objects.shape[axis], -1)
        learned, asked = np.split(np.random.default_rng(0).permuted(halves, axis=1), 2, axis=1)
        best = [np.bincount(row, minlength=OBJECTS).argmax() for row in learned]
        right = (asked == np.array(best)[:, None]).mean()
        # Five standard deviations of a share of 3,200 guesses.
        assert right == pytest.approx(1 / OBJECTS, abs=5 * np.sqrt(1 / OBJECTS / asked.size))


@pytest.mark.parametrize(
    ("count", "right", "objects", "expected"),
    [(1024, 1.0, 32, 1024), (1024, 1 / 32, 32, 0), (1024, 0.0, 32, 0), (100, 0.75, 2, 50), (96, 2 / 3, 4, 160 / 3)],
)
def test_what_is_stored_is_what_is_right_but_for_guesses(count, right, objects, expected):
    """Of 96 facts 2/3 right with 4 objects: 64 = s + (96 - s) / 4, so s = 53.3."""
    assert stored(count, right, objects) == pytest.approx(expected)


def test_the_text_of_a_student_is_read_as_these_tokens(language, tmp_path):
    (tmp_path / "tokenizer.json").write_text(languages.tokenizer(language))
    assert languages.text(language, seeded(0, STUDENT), 1000, tmp_path) == [str(tmp_path / "text.jsonl")]
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "it", vocab_size(language))
    assert vocab_size(language) % 32 == 0
    random, count = seeded(0, STUDENT), 0
    for found in documents(tmp_path / "text.jsonl"):
        ids = language.document(random).ids
        assert encode(found, tokenizer) == ids[:-1].tolist()
        count += len(ids)
    assert 1000 <= count < 1000 + 200
