"""Where `dfssm run` takes its text from: an option, a file, the standard input, the lines of a chat."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from chats import add_template
from click.testing import CliRunner

from dfssm.base import DfssmError
from dfssm.runtime import Chat, Engine, GenerationConfig


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    return add_template(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("chat") / "b"))


def run(bundle, *arguments, stdin=None):
    from dfssm.cli.main import dfssm

    words = ["run", bundle, "-n", 9, "--threads", 1, *arguments]
    return CliRunner().invoke(dfssm, [str(word) for word in words], input=stdin, catch_exceptions=False)


def found(bundle, *arguments, stdin=None):
    result = run(bundle, "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("content", "prompt"), [("hello\nworld", None), ("hé\n\n", "hé\n"), ("a\r\n", "a"), ("\ufeffa", "a")]
)
def test_a_text_from_a_file_or_the_standard_input(bundle, tmp_path, content, prompt):
    (tmp_path / "a.txt").write_bytes(content.encode())
    expected = found(bundle, "-p", prompt or content)
    for arguments, stdin in ((["-f", tmp_path / "a.txt"], None), (["-p", "-"], content.encode())):
        one = found(bundle, *arguments, stdin=stdin)
        assert (one["tokens"], one["prompt_tokens"]) == (expected["tokens"], expected["prompt_tokens"])


def test_a_chat_answers_one_prompt(bundle):
    chat = Chat(Engine.load(bundle, threads=1), GenerationConfig(max_tokens=9), "é")
    answer = chat.say("hello")
    list(answer)
    one = found(bundle, "--chat", "-p", "hello", "--system", "é")
    assert (one["tokens"], one["prompt_tokens"]) == (answer.tokens, answer.prompt_tokens)


def test_several_texts_of_a_prompt(bundle):
    options = ["--temperature", 1.5, "--seed", 3, "--logprobs", 1]
    keys = ("text", "tokens", "finish_reason", "logprobs")
    for more in ([], ["--chat", "--system", "é"]):
        alone = [found(bundle, "-p", "hello", *more, *options, "--seed", seed) for seed in (3, 4, 5)]
        several = found(bundle, "-p", "hello", *more, *options, "--texts", 3)
        assert several["texts"] == [{key: one[key] for key in keys} for one in alone]
        assert several["prompt_tokens"] == alone[0]["prompt_tokens"] and several["new_tokens"] == 27
    result = run(bundle, "-p", "hello", "--temperature", 1.5, "--seed", 3, "--texts", 2)
    expected = [run(bundle, "-p", "hello", "--temperature", 1.5, "--seed", seed).stdout for seed in (3, 4)]
    assert result.stdout == "---\n".join(expected)


def test_a_chat_answers_line_after_line(bundle):
    chat = Chat(Engine.load(bundle, threads=1), GenerationConfig(max_tokens=9, temperature=1.5, seed=2))
    expected = []
    for line in ("hello", "and then?"):
        answer = chat.say(line)
        expected.append("".join(answer) + answer.flush() + "\n")
    result = run(bundle, "--chat", "--temperature", 1.5, "--seed", 2, stdin="hello\n\nand then?\n")
    assert (result.exit_code, result.stdout) == (0, "".join(expected))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-p", "a", "-f", "a.txt"], "Give either --prompt or --file"),
        (["-p", "a", "--system", "b"], "--system is for --chat"),
        (["--chat", "--load-state", "a"], "--chat keeps its state itself: leave out --load-state and --save-state"),
        (["--chat", "--json"], "--chat with --json answers one prompt: give it with -p or -f"),
        (["--chat", "--texts", 2], "--texts with --chat answers one prompt: give it with -p or -f"),
        (["-p", "a", "--texts", 2, "--speculate"], "--texts makes several: leave out"),
    ],
)
def test_options_that_do_not_go_together_are_named(bundle, arguments, named):
    result = run(bundle, *arguments)
    assert result.exit_code == 2 and named in result.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "named"),
    [
        (["-p", "-"], b"caf\xe9", "the standard input is not UTF-8: convert it"),
        (["-p", "-"], b"", "there is nothing to continue"),
        (["-p", "-", "--chat"], b"", "there is nothing to continue"),
        (["-p", "-", "--chat", "--json"], b"\n", "there is nothing to continue"),
        (["-f", "a.txt"], None, "a.txt does not exist: give a text"),
        (["--chat"], b"caf\xe9\n", "the standard input is not UTF-8: convert it"),
    ],
)
def test_what_is_no_text_is_named(bundle, tmp_path, monkeypatch, arguments, stdin, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DfssmError, match=named):
        run(bundle, *arguments, stdin=stdin)


def test_without_a_template_it_says_what_is_missing(tiny_bundle):
    with pytest.raises(DfssmError, match="has no chat template; put chat_template.jinja beside"):
        run(tiny_bundle, "--chat", stdin="hello\n")


@pytest.mark.parametrize(("words", "found"), [("dfssm ru", "run"), ("dfssm run --repet", "--repetition-penalty")])
def test_the_shell_completes_words(words, found):
    """As docs/runtime.md says it is asked for."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_DFSSM_COMPLETE": "bash_complete"}
    command = [sys.executable, "-m", "dfssm.cli.main"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert done.stdout == f"plain,{found}\n"
