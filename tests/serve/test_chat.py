"""Chats, by the template of the bundle."""

import openai
import pytest
from browser import CHROMIUM, Browser
from serving import serving

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "h\u00e9llo"}]
WRONG_CALL = {"function": {"name": "add", "arguments": "{"}}
OPTIONS = {"max_tokens": 30, "temperature": 1.2, "seed": 5}


@pytest.fixture(scope="module")
def server(talking):
    with serving(talking, slots=2) as running:
        yield running


def test_answers_are_those_of_the_templates_prompt(server, talking):
    ids = talking.chat_prompt(MESSAGES)
    generation = talking.generate(ids, **OPTIONS, logprobs=2)
    text = "".join(generation)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions
        options = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **OPTIONS}
        answer = chat.create(**options)
        message = answer.choices[0].message
        assert (message.role, message.content) == ("assistant", text)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(generation.tokens))
        content = answer.choices[0].logprobs.content
        assert [entry.logprob for entry in content] == [entry.logprob for entry in generation.logprobs]
        assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
        for entry in content:
            assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
        chunks = list(chat.create(**options, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text
        assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
        parts = [
            MESSAGES[0],
            {"role": "user", "content": [{"type": "text", "text": "h\u00e9"}, {"type": "text", "text": "llo"}]},
        ]
        again = chat.create(model="tiny", messages=parts, max_completion_tokens=30, temperature=1.2, seed=5)
        assert again.choices[0].message.content == text and again.choices[0].logprobs is None


def test_tools_go_into_the_prompt(server, talking):
    function = {"name": "add", "parameters": {"type": "object"}}
    tools, call = [{"type": "function", "function": function}], {"name": "add", "arguments": '{"a": [1, "\u00e9"]}'}
    talk = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    plain = call | {"arguments": {"a": [1, "\u00e9"]}}
    read = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": plain}]}]
    read[2]["tool_calls"][0] = {"id": "1"} | read[2]["tool_calls"][0]
    read.append(talk[3])
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        for choice, given in (("auto", tools), ("none", None)):
            ids = talking.chat_prompt(read, tools=given)
            answer = client.chat.completions.create(
                model="tiny", messages=talk, tools=tools, tool_choice=choice, **OPTIONS
            )
            message = answer.choices[0].message
            assert message.content == "".join(talking.generate(ids, **OPTIONS)) and message.tool_calls is None
            assert answer.usage.prompt_tokens == len(ids)
        with pytest.raises(openai.BadRequestError, match="tool_choice: Input should be 'auto' or 'none'"):
            client.chat.completions.create(model="tiny", messages=talk, tools=tools, tool_choice="required")


def test_what_is_wrong_is_answered(server, talking, engine):
    for body, message in (
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
            "messages: Input should be",
        ),
        ({"messages": [{"role": "user"}]}, "messages: Value error, a message without tool_calls has content"),
        ({"messages": [{"role": "assistant", "tool_calls": [WRONG_CALL]}]}, "messages: Invalid JSON"),
        ({"messages": MESSAGES, "max_completion_tokens": 401}, "max_tokens is 401"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "the prompt has "),
    ):
        status, answer, _ = server.ask("/v1/chat/completions", body)
        assert status == 400 and answer["error"]["message"].startswith(message), answer
    assert server.ask("/v1/models")[1]["data"][0]["chat"] is True
    with serving(engine) as other:
        status, answer, _ = other.ask("/v1/chat/completions", {"messages": MESSAGES})
        assert status == 400
        assert answer["error"]["message"] == "the model 'tiny' has no chat template: use /v1/completions"
        assert other.ask("/v1/models")[1]["data"][0]["chat"] is False


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")
def test_the_page_chats(server, talking, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.until("document.getElementById('prompt').placeholder === 'Message'")
        browser.run("document.getElementById('temperature').value = 0; document.getElementById('tokens').value = 9")
        said, messages = [], []
        for text in ("hello", "world"):
            browser.run(f"document.getElementById('prompt').value = '{text}'")
            browser.run("document.getElementById('form').requestSubmit()")
            messages.append({"role": "user", "content": text})
            answer = "".join(talking.generate(talking.chat_prompt(messages), max_tokens=9))
            messages.append({"role": "assistant", "content": answer})
            said += [text, answer]
            browser.until(f"document.querySelectorAll('main p').length === {len(said)}")
            browser.until("document.getElementById('send').textContent === 'Send'")
        assert browser.run("[...document.querySelectorAll('main p')].map(p => p.textContent)") == said
