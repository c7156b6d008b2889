"""The server, over real connections: answers are the engine's texts, and nothing that a client does is suffered."""

import json
import socket
import threading

import openai
import pytest
from serving import LIMITS, POST, serving

from dfssm.runtime.sampler import Sampler
from dfssm.serve.http import Connection


def alone(engine, prompt, **options):
    generation = engine.generate(prompt, **options)
    return "".join(generation), generation


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_gets_the_engines_texts(server, client, engine):
    assert [model.id for model in client.models.list()] == ["tiny"]
    options = {"max_tokens": 30, "temperature": 1.2, "seed": 5}
    text, generation = alone(engine, "hello", **options, logprobs=2)
    answer = client.completions.create(model="tiny", prompt="hello", logprobs=2, **options)
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 30)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == [entry.logprob for entry in generation.logprobs]
    assert [len(top) for top in logprobs.top_logprobs] and len(logprobs.tokens) == 30
    stream = client.completions.create(
        model="tiny", prompt="hello", logprobs=2, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert sum((chunk.choices[0].logprobs.token_logprobs for chunk in chunks[:-1]), []) == logprobs.token_logprobs
    assert sum((chunk.choices[0].logprobs.text_offset for chunk in chunks[:-1]), []) == logprobs.text_offset
    assert sum((chunk.choices[0].logprobs.text_offset for chunk in chunks[:-1]), []) == logprobs.text_offset
    assert chunks[-1].usage == answer.usage


def test_several_texts_and_prompts(server, client, engine):
    answer = client.completions.create(
        model="tiny", prompt=["hello", [7, 8, 9]], n=2, max_tokens=9, temperature=1, seed=3
    )
    expected = [alone(engine, p, max_tokens=9, temperature=1, seed=s)[0] for p in ("hello", [7, 8, 9]) for s in (3, 4)]
    assert [choice.text for choice in answer.choices] == expected
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 36)


def test_stop_strings_and_ids(server, client, engine):
    text, generation = alone(engine, "hello", max_tokens=30, temperature=0)
    stop = text[3:6]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt="hello", max_tokens=30, temperature=0, stop=[stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
    end = generation.tokens[4]
    answer = client.completions.create(
        model="tiny", prompt="hello", max_tokens=30, temperature=0, extra_body={"stop_token_ids": [end]}
    )
    assert answer.usage.completion_tokens == generation.tokens.index(end)
    assert answer.choices[0].finish_reason == "stop"


def test_one_text_shares_the_prompt_of_the_others(engine):
    prompt = [*range(200), *range(200)] * 5 + [7] * 48
    assert len(prompt) == 2048
    with serving(engine, slots=4, queue=16) as server:
        status, answer, _ = server.ask("/v1/completions", {"prompt": prompt, "n": 16, "max_tokens": 3, "seed": 1})
        assert status == 200 and answer["usage"]["prompt_tokens"] == 2048 == server.scheduler.read
        assert server.scheduler.reused == 15 * 2048
        metrics = server.ask("/metrics")[1]
    assert "dfssm_prompt_tokens_total 2048.0" in metrics and "dfssm_cached_tokens_total 30720.0" in metrics
    assert 'dfssm_requests_total{status="200"} 1.0' in metrics


WRONG = {
    b"{": ("JSON decode error", None),
    b'{"prompt": "\xff\xfe"}': ("parsing the body", None),
    b'{"prompt": "\\ud800"}': ("is not UTF-8", None),
    b"[" * 20000: ("", None),
    b'"hello"': ("", None),
    b"{}": ("Field required", "prompt"),
    b'{"prompt": "a", "temperature": NaN}': ("finite number", "temperature"),
    b'{"prompt": "a", "temperature": -1}': ("temperature is -1.0: give a number from 0", None),
    b'{"prompt": "a", "top_p": 7}': ("top_p is 7.0", None),
    b'{"prompt": "a", "tools": []}': ("Extra inputs are not permitted", "tools"),
    b'{"prompt": "a", "echo": true}': ("should be False", "echo"),
    b'{"prompt": ""}': ("the prompt is tokens [0]", None),
    b'{"prompt": []}': ("the prompt is tokens [0]", None),
    b'{"prompt": [265]}': ("token id 265 is out of range", None),
    b'{"prompt": [1e30]}': ("prompt: Input should be", "prompt"),
    b'{"prompt": [99999999999999999999999999]}': ("give integers", None),
    b'{"prompt": "a", "max_tokens": 401}': ("max_tokens is 401: at most 400", "max_tokens"),
    b'{"prompt": "a", "n": 17}': ("at most 16 texts", "n"),
    b'{"prompt": "a", "n": 10000000000000000000000}': ("at most 16 texts", "n"),
    b'{"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}': ("there are 5 stops: at most 4", "stop"),
    b'{"prompt": "a", "logit_bias": {"999": 1}}': ("logit_bias names token 999", None),
    b'{"prompt": "a", "best_of": 2}': ("best_of is 2", "best_of"),
    b'{"prompt": "' + b"ab " * 1500 + b'"}': ("the prompt has 4500 tokens: at most 3000", "prompt"),
}


@pytest.mark.parametrize("body", WRONG, ids=lambda body: body[:40].decode(errors="replace"))
def test_what_is_wrong_is_answered_in_openais_shape(server, body):
    message, param = WRONG[body]
    status, answer, _ = server.ask("/v1/completions", body)
    assert status in (400, 422) and answer["error"].keys() == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"] and answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error" and "\n" not in answer["error"]["message"]
    assert server.scheduler.running == server.scheduler.waiting == 0


def test_other_answers_that_are_errors(server, client):
    for path, body, status, code in (
        ("/v1/nothing", None, 404, "not_found"),
        ("/v1/completions", None, 405, "method_not_allowed"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model_not_found"),
        ("/v1/models/other", None, 404, "model_not_found"),
        ("/v1/completions", b"x" * (LIMITS.body + 1), 413, "content_too_large"),
    ):
        found, answer, _ = server.ask(path, body)
        assert (found, answer["error"]["code"].replace("request_entity", "content")) == (status, code)
    assert server.ask("/v1/completions", {"prompt": "a"}, {"content-type": "text/plain"})[0] in (400, 415, 422)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="other", prompt="a")


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


def send(server, data, wait=True):
    """What comes back for bytes, until the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        found = b""
        while wait and (part := connection.recv(65536)):
            found += part
        return found.decode()


def test_half_sent_requests_are_answered(server, monkeypatch):
    monkeypatch.setattr(Connection, "SECONDS", 0.3)
    for data, status in (
        (HEAD, 408),
        (HEAD + b"content-length: 10\r\n\r\n{", 408),
        (HEAD + b"content-length: 30000\r\n\r\n{", 413),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n7000\r\n" + b" " * 0x7000, 413),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),  # a client that speaks TLS
        (b"GET / HTTP/1.1\r\n" + b"a" * 100_000, 400),
        (HEAD + b"content-length: -1\r\n\r\n", 400),
    ):
        found = send(server, data)
        assert found.startswith(f"HTTP/1.1 {status} "), found
        assert json.loads(found.partition("\r\n\r\n")[2])["error"]["message"]
    send(server, HEAD + b"content-length: 10\r\n\r\n{", wait=False)
    assert server.text("hello", max_tokens=2, temperature=0)


def test_who_leaves_frees_the_slot(server):
    body = json.dumps({"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "n": 4}).encode()
    for stream in (b"", b', "stream": true'):
        content = body[:-1] + stream + b"}"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(content) + content)
            server.until(lambda: server.scheduler.running == 4)
        written = server.scheduler.written
        server.until(lambda: server.scheduler.running == 0)
        assert server.scheduler.written - written < 4 * 400


def test_a_full_queue_is_429_and_others_are_served(engine):
    with serving(engine, slots=1, queue=1) as server:
        body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}
        threads = [threading.Thread(target=server.ask, args=("/v1/completions", body)) for _ in range(2)]
        for thread in threads:
            thread.start()
            server.until(lambda: server.scheduler.running == 1)
        server.until(lambda: server.scheduler.waiting == 1)
        status, answer, headers = server.ask("/v1/completions", body)
        assert (status, headers["retry-after"]) == (429, "1") and answer["error"]["type"] == "rate_limit_error"
        assert server.ask("/health")[0] == 200
        for thread in threads:
            thread.join(30)
        assert server.text("hello", max_tokens=2)


def test_a_reader_that_does_not_read_is_dropped(engine, monkeypatch):
    monkeypatch.setattr(Connection, "SECONDS", 0.3)
    monkeypatch.setattr("dfssm.serve.http.BUFFER", 4096)
    with serving(engine, slots=4) as server:
        body = json.dumps(
            {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n{body}".encode())
            server.until(lambda: server.scheduler.running)
            server.until(lambda: not server.server.server_state.connections)
            server.until(lambda: not server.scheduler.running)
        assert server.scheduler.written < 8 * 400


def test_idle_connections_cost_nothing(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    assert server.text("hello", max_tokens=3, temperature=0)
    for connection in idle:
        connection.close()


def test_the_key(engine):
    with serving(engine, key="secret") as server:
        for given in ({}, {"authorization": "Bearer secre"}, {"authorization": "Bearer s\xe9"}):
            for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/completions", {"prompt": "a"})):
                status, answer, _ = server.ask(path, body, POST | given)
                assert status == 401 and answer["error"]["type"] == "authentication_error"
        assert server.ask("/v1/models", None, {"authorization": "Bearer secret"})[0] == 200
        assert server.ask("/health")[0] == server.ask("/")[0] == 200


def test_a_failure_of_the_model_is_one_answer(engine):
    with serving(engine, slots=2) as server:
        choose = Sampler.choose
        with pytest.MonkeyPatch.context() as patch:

            def fails(self, logits, position):
                if self.sampling.presence_penalty == 1.5:
                    raise ZeroDivisionError
                return choose(self, logits, position)

            patch.setattr(Sampler, "choose", fails)
            body = {"prompt": "a", "presence_penalty": 1.5}
            status, answer, _ = server.ask("/v1/completions", body)
            assert (status, answer["error"]["type"]) == (500, "server_error")
            assert "ZeroDivision" not in json.dumps(answer)
            status, events, _ = server.ask("/v1/completions", body | {"stream": True})
            assert json.loads(events.removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.text("a", max_tokens=2)


def test_shutting_down_ends_texts_in_time(engine):
    with serving(engine, grace=0.3) as server:
        found = []
        body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "n": 8}
        thread = threading.Thread(target=lambda: found.append(server.ask("/v1/completions", body)))
        thread.start()
        server.until(lambda: server.scheduler.running)
        server.server.should_exit = True
    thread.join(10)
    assert found[0][0] in (200, 503)


def test_many_clients_get_what_each_gets_alone(server, engine):
    """8 clients, half of them streaming."""
    expected = {seed: alone(engine, f"hello {seed}", max_tokens=12, temperature=1, seed=seed)[0] for seed in range(40)}
    found = {}

    def ask(first):
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            for seed in range(first, 40, 8):
                options = {"prompt": f"hello {seed}", "max_tokens": 12, "temperature": 1, "seed": seed}
                if seed % 2:
                    found[seed] = client.completions.create(model="tiny", **options).choices[0].text
                else:
                    stream = client.completions.create(model="tiny", stream=True, **options)
                    found[seed] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_the_page(server):
    status, page, headers = server.ask("/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert "v1/chat/completions" in page and "https://" not in page and "http://" not in page
