"""A chat template is Jinja from elsewhere: whatever it does is text or one line."""

import json
import os

import pytest

from dfssm.eval.chat import ChatTemplate
from dfssm.opset import DfssmError, child

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


def test_a_system_message_is_left_out_where_it_is_refused(template):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}{{ messages | tojson }}"
    assert json.loads(template(refusing)(CHAT)) == CHAT[1:]
    with pytest.raises(DfssmError, match=r"the chat template refuses these messages \(no\): use another"):
        template("{{ raise_exception('no') }}")(CHAT)


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
