"""Prompts: our own file, the facts language, what a tokenizer makes of them, and files that are none."""

from collections import Counter

import pytest
from tokenizers import Tokenizer

from dfssm.analysis.facts import facts_prompts
from dfssm.analysis.prompts import ATLAS, Prompt, read_prompts, to_csv, tokenize
from dfssm.base import DfssmError
from dfssm.eval.fair.facts_language import Facts
from dfssm.eval.fair.language import tokenizer as words

PUBLISHED = {
    **{"capitals": 50, "languages": 30, "continents": 30, "elements": 30},
    **dict.fromkeys(("physics", "writers", "animals", "math"), 25),
    **dict.fromkeys(("scientists", "companies", "currencies", "food", "music", "sports", "medical", "history"), 20),
    **dict.fromkeys(("colors", "mythology", "materials"), 15),
}


def test_our_prompts_have_the_published_categories(tokenizer):
    rows = read_prompts(ATLAS)
    assert Counter(row.category for row in rows) == PUBLISHED and len(rows) == 445
    assert len({row.prompt for row in rows}) == 445
    assert not [row for row in rows if row.answer.lower() in row.prompt.lower().split()[-3:]]
    of_template = {row.template: row.category for row in rows}
    assert all(of_template[row.template] == row.category for row in rows)  # a wording is of one category
    prompts = tokenize(rows, tokenizer)
    assert sum(prompts.uniform) == 6 and not prompts.answers_shared
    for row, ids, answer in zip(rows, prompts.ids, prompts.answer_ids, strict=True):
        assert tokenizer.decode(ids.tolist()) == row.prompt
        assert f" {row.answer}".startswith(tokenizer.decode([int(answer)]).rstrip("\ufffd"))


def test_the_answers_of_the_facts_are_known_by_construction():
    language = Facts(side=16, seed=3)
    rows = facts_prompts(language, 100)
    assert len({row.prompt for row in rows}) == 100
    prompts = tokenize(rows, Tokenizer.from_str(words(language)))
    assert prompts.whole.all() and prompts.answers_shared and not any(prompts.uniform)
    for row, ids, answer in zip(rows, prompts.ids, prompts.answer_ids, strict=True):
        first, last, relation, wanted = (language.words.index(word) for word in [*row.prompt.split()[1:], row.answer])
        number = ((first - language.begin["first"]) * 16 + last - language.begin["last"]) * 4
        number += relation - language.begin["relation"]
        assert language.fact(number) == [first, last, relation, wanted] == [*ids[1:], answer]
        assert (row.category, row.template) == (language.words[first], language.words[relation])


def test_a_file_is_read_as_it_was_written(write):
    rows = [Prompt('say "a, b"', "é", "one", "x"), Prompt("two\nlines", "2", "one", "y")] + [
        Prompt(f"p{i}", "a", "two", "z") for i in range(2)
    ]
    assert read_prompts(write(to_csv(rows), "p.csv")) == rows
    text = "\ufefftemplate,more,answer,category,prompt\nt,m, a ,c,p\nt,m,a,c,q\nt,m,a,d,r\nt,m,a,d,s\n"
    assert read_prompts(write(text, "q.csv"))[0] == Prompt("p", "a", "c", "t")


@pytest.mark.parametrize(
    "content, message",
    [
        ("prompt,answer,category\n", "has no column 'template': give prompt, answer, category, template in its first"),
        ("", "has no column 'prompt'"),
        ("prompt,answer,category,template\np,a,c,t\nq,,c,t\n", "line 3: answer is empty; fill it in"),
        ("prompt,answer,category,template\np,a\n", "line 2: category is empty; fill it in"),
        ("prompt,answer,category,template\np,a,c,t\nq,a,c,t\n", "has 1 categories; give two or more, each of two prom"),
        ("prompt,answer,category,template\np,a,c,t\nq,a,d,t\n", "has 2 categories; give two or more, each of two prom"),
        ("prompt,answer,category,template\n", "has 0 categories"),
        (b"prompt,answer,category,template\n\xff,a,c,t\n", "is no CSV file in UTF-8"),
        ('prompt,answer,category,template\n"p,a,c,t\n', "is no CSV file in UTF-8"),
    ],
)
def test_files_that_are_none(write, content, message):
    with pytest.raises(DfssmError, match=message) as error:
        read_prompts(write(content, "bad.csv"))
    assert "\n" not in str(error.value)


def test_answers_that_a_tokenizer_does_not_know():
    known = Tokenizer.from_str(words(Facts()))
    rows = [Prompt("first1 last1", answer, "c", "t") for answer in ("Paris", "Rome")]
    with pytest.raises(DfssmError, match="all answers begin with the same token: the tokenizer does not know them"):
        tokenize(rows, known)


def test_a_prompt_whose_end_belongs_to_the_answer():
    from tokenizers import models, pre_tokenizers

    merging = Tokenizer(models.BPE({"a": 0, " ": 1, "b": 2, " b": 3, "a b": 4}, [(" ", "b"), ("a", " b")]))
    merging.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    with pytest.raises(DfssmError, match="prompt 'a': its tokens change when its answer follows; change its end"):
        tokenize([Prompt("a", "b", "c", "t")], merging)


def test_the_first_token_of_an_answer(tokenizer):
    prompts = tokenize([Prompt("hello", "world", "c", "t"), Prompt("x", "é", "c", "u")], tokenizer)
    assert [tokenizer.id_to_token(int(i)) for i in prompts.answer_ids] == ["Ġwor", "Ġ"]
    assert prompts.labels("template").tolist() == [0, 1] and prompts.whole.tolist() == [False, False]
