"""A chat template is Jinja from elsewhere: whatever it does is text or one line."""

import json
import os

import pytest

from dfssm.base import DfssmError, child
from dfssm.targets.chat import ChatTemplate, beside

CHAT = [{"role": "system", "content": "é"}, {"role": "user", "content": "a"}]


SOON = 2.0
"""Of what never ends; what does has a minute, whatever else the machine does."""


@pytest.fixture(autouse=True)
def _a_minute(monkeypatch):
    monkeypatch.setattr(child, "SECONDS", 60.0)


@pytest.fixture
def template(tmp_path, monkeypatch):
    def make(text, seconds=60.0, **config):
        monkeypatch.setattr(child, "SECONDS", seconds)
        (tmp_path / "chat_template.jinja").write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ChatTemplate(tmp_path)

    return make


def test_it_renders_again_and_again(template):
    made = template("{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}", bos_token={"content": "<s>"})
    assert made(CHAT) == "<s>é|a|" and made(CHAT[1:]) == "<s>a|"
    assert made(CHAT, add_generation_prompt=False) == "<s>é|a"


def test_a_template_may_refuse(template):
    with pytest.raises(DfssmError, match=r"the chat template refuses these messages \(no\): use another"):
        template("{{ raise_exception('no') }}")(CHAT)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], r"the messages are \[\]: give a list of at least one"),
        ("hello", "a message is 'h': give an object with role and content"),
        ([{"content": "a"}], r"a message is \{'content': 'a'\}: give an object with role"),
        ([{"role": "user", "content": b"a"}], r"refuses these messages \(.*bytes is not JSON serializable\)"),
    ],
)
def test_what_are_no_messages_is_named(template, messages, named):
    made = template("{{ messages }}")
    with pytest.raises(DfssmError, match=named):
        made(messages)
    assert made(CHAT)


# As published models have them: ChatML, with and without a default system message; Llama 2's turns; one that asks
# whether there are tools; one that writes JSON.
PUBLISHED = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system": "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{%- endif -%}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "turns": "{{ bos_token }}{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% set ns.last = m.role %}{% endfor %}",
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% endif %}"
    "{% if documents is none %}{{ unk_token }}{% endif %}"
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ sep_token | default('none') }}{{ mask_token }}",
}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [*((name, True) for name in PUBLISHED), *((name, False) for name in ("chatml", "system", "turns"))],
)
def test_texts_are_those_of_transformers(tokenizer, tmp_path, name, prompt):
    from transformers import PreTrainedTokenizerFast

    asked = {"add_generation_prompt": True} if prompt else {"continue_final_message": True}
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|end|>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "unk_token": "<unk>"}
    config = names | {
        "mask_token": "[M]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": PUBLISHED[name],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), ChatTemplate(tmp_path)
    talk = [CHAT[1], {"role": "assistant", "content": ' é\n"b" <&> ', "extra": None}, {"role": "user", "content": "c "}]
    for messages in (CHAT, talk[:1], talk, [CHAT[0], *talk]):
        assert ours(messages, prompt) == theirs.apply_chat_template(messages, tokenize=False, **asked)


TOOLS = [{"type": "function", "function": {"name": "add", "description": "é<", "parameters": {"type": "object"}}}]
TOOL_TEMPLATES = {
    "json": "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "each": "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}\n{% endfor %}{%- endif %}"
    "{% for m in messages %}{% for c in m.tool_calls %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>"
    "{% endfor %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_tools_are_those_of_transformers(tokenizer, tmp_path, name):
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TOOL_TEMPLATES[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), ChatTemplate(tmp_path)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours(talk, tools=tools) == expected


def test_a_template_without_a_place_for_tools_refuses_them(template):
    made = template("{% for m in messages %}{{ m.content }} tools{% endfor %}")
    with pytest.raises(DfssmError, match=r"refuses these messages \(it takes no tools\)"):
        made(CHAT, tools=TOOLS)


def test_what_goes_with_a_tokenizer(tmp_path):
    assert beside(tmp_path / "tokenizer.json") == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert beside(tmp_path / "tokenizer.json") == [], "names alone are of no use"
    (tmp_path / "chat_template.jinja").write_text("a")
    assert {path.name for path in beside(tmp_path / "tokenizer.json")} == {
        "chat_template.jinja",
        "tokenizer_config.json",
    }
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a"}))
    assert [path.name for path in beside(tmp_path / "tokenizer.json")] == ["tokenizer_config.json"]


def test_what_marks_a_training_is_no_text(template):
    made = template("{% for m in messages %}\n{% generation %}\n[{{ m.content }}]\n{% endgeneration %}{% endfor %}")
    assert made(CHAT) == "[é]\n[a]\n"


def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    assert ChatTemplate(tmp_path)(CHAT) == "é"


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    "text, words",
    [
        (LOOP, f"it takes more than {SOON:.0f} s"),
        ("{{ 9 ** ((messages | length + 7) ** 9) }}", f"it takes more than {SOON:.0f} s"),
        (DOUBLE, f"it takes more than {SOON:.0f} s|MemoryError"),
        ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
        ("{{ 'a' * (messages | length * 5 * 10 ** 7) }}", "its answer has 1000000.. bytes"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ messages[0].content.encode().nothing.x }}", "has no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined|has no"),
    ],
)
def test_what_takes_too_much_or_reaches_out_is_one_line_and_the_next_is_rendered(template, text, words):
    text = "{% if messages | length == 2 %}" + text + "{% endif %}b"
    made = template(text, seconds=SOON if "takes" in words else 60.0)
    with pytest.raises(DfssmError, match=rf"^the chat template refuses these messages \(.*({words}).*\): use another$"):
        made([CHAT[1], CHAT[1]])
    assert made(CHAT[1:]) == "b"


@pytest.mark.parametrize("text", ["{% if %}", "{{ a", "{{" + "(" * 100_000, "{{ 9 ** (9 ** 9) }}", b"\xff"])
def test_what_is_no_template_is_one_line(template, text, tmp_path):
    with pytest.raises(DfssmError, match=rf"^{tmp_path}.*cannot be read \(.*\); put a right one there$"):
        template(text, seconds=SOON if b"**" in os.fsencode(text) else 60.0)


def test_it_runs_elsewhere(template, tmp_path):
    """What a template prints, or changes in its process, is not seen here."""
    made = template("{{ strftime_now('%Y') }}")
    before = os.getpid()
    assert len(made(CHAT)) == 4 and os.getpid() == before and made._child._process.pid != before
