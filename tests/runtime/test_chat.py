"""A conversation in one state: each turn reads what is new, and the answers are those of reading all again."""

import shutil

import numpy as np
import pytest
import tiny
from chats import TEMPLATE, add_template

from dfssm.base import DfssmError
from dfssm.runtime import Chat, Engine, GenerationConfig

TRIMMING = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")


def letters(ids, logits):
    """Random weights make of bytes what is no text: here they choose whole characters."""
    logits[94:] = -np.inf  # the first are printable ASCII
    return logits


CONFIG = GenerationConfig(max_tokens=12, temperature=1.0, seed=4, presence_penalty=0.5, processors=letters)


@pytest.fixture(scope="module")
def engine(cpu_target, tmp_path_factory):
    """Its deferred state has the same bits, however what it reads is cut."""
    folder = tiny.write_bundle(tmp_path_factory.mktemp("chat") / "b", target=cpu_target, state_dtype="fp16-deferred")
    return Engine.load(add_template(folder), threads=1)


def again(engine, ids, **settings):
    """The tokens of the text that follows `ids`, read anew."""
    generation = engine.generate(ids, CONFIG, **settings)
    list(generation)
    return generation.tokens


def test_a_turn_reads_what_is_new(engine):
    chat, read, lines = Chat(engine, CONFIG, "be brief"), [], ["hello", "é world", "c", "d"]
    for turn, line in enumerate(lines):
        answer = chat.say(line)
        assert "".join(answer) + answer.flush() == answer.text
        if turn:
            new = f"<|end|><user>{line}<|end|><assistant>"
        else:
            new = f"<system>be brief<|end|><user>{line}<|end|><assistant>"
        new = engine.tokenizer.encode(new, add_special_tokens=False).ids
        assert answer.prompt_tokens == len(new)
        read += new
        assert answer.tokens == again(engine, read), "penalties see all that was read as the prompt"
        assert answer.history == (read, answer.tokens)
        read = read + answer.tokens
        assert chat.state.tokens.tolist() == [len(read)]
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert [m["content"] for m in chat.messages[1::2]] == lines


def test_an_answer_that_is_not_what_was_read_is_read_again(engine):
    """After a stop string, which is read and is no part of the answer, and with a template that trims answers."""
    free = Chat(engine, CONFIG)
    text = "".join(free.say("hello"))
    chat = Chat(engine, CONFIG, None)
    answer = chat.say("hello", stop=text[3:5])
    list(answer)
    second = chat.say("a")
    list(second)
    whole = engine.chat_prompt([*chat.messages])
    assert (
        second.prompt_tokens == len(whole)
        and chat.messages[1]["content"] == answer.text == text[: text.find(text[3:5])]
    )
    assert second.tokens == again(engine, whole)


def test_a_template_that_writes_answers_otherwise(tiny_bundle, tmp_path):
    engine = Engine.load(add_template(shutil.copytree(tiny_bundle, tmp_path / "b"), TRIMMING), threads=1)
    chat = Chat(engine, GenerationConfig(max_tokens=4, logit_bias={engine.tokenizer.encode(" ").ids[0]: 100}))
    assert "".join(chat.say("hello")) == "    "
    assert chat.say("b").prompt_tokens == len(engine.chat_prompt(chat.messages))


def test_an_answer_that_is_cut_short_or_never_read(engine):
    chat = Chat(engine, CONFIG)
    answer = chat.say("hello")
    next(answer)
    second = chat.say("b")  # the first is ended
    assert answer.finish_reason == "cancelled" and chat.messages[1] == {"role": "assistant", "content": answer.text}
    assert second.prompt_tokens < len(engine.chat_prompt(chat.messages))
    third = chat.say("c")  # the second has read nothing
    list(third)
    assert third.tokens == again(engine, engine.chat_prompt(chat.messages))
    chat.state.rows.broken[0] = "by a test"
    fourth = chat.say("d")
    list(fourth)
    assert fourth.prompt_tokens == len(engine.chat_prompt(chat.messages))


def test_a_refused_message_is_not_said(engine):
    chat = Chat(engine, CONFIG)
    list(chat.say("a"))
    with pytest.raises(DfssmError, match="is not UTF-8"):
        chat.say("caf\udce9")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    list(chat.say("b"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "user"]


def test_without_a_template_it_says_what_is_missing(tiny_bundle):
    with pytest.raises(DfssmError, match="has no chat template; put chat_template.jinja beside the model's tokenizer"):
        Chat(Engine.load(tiny_bundle))
