"""`dfssm run`: text from a bundle."""

from __future__ import annotations

import sys
import time
from io import TextIOWrapper
from typing import Any

import click

from dfssm.base import paths
from dfssm.base.errors import DfssmError, reason
from dfssm.base.reading import read_file
from dfssm.targets.text import require_utf8

from .options import SEED, bundle_argument, json_option, print_result, real, threads_option, trust_option, whole


class Bias(click.ParamType):
    """ID=NUMBER."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        token, equals, number = str(value).partition("=")
        if not equals:
            self.fail(f"{value} is not ID=NUMBER", param, ctx)
        return whole(0).convert(token, param, ctx), real(-100, 100).convert(number, param, ctx)


@click.command()
@bundle_argument
@click.option(
    "-p", "--prompt", default="", show_default=False, metavar="TEXT", help="Text to continue; -: the standard input."
)
@click.option(
    "-f",
    "--file",
    type=click.Path(),
    metavar="FILE",
    help="Continue the text of FILE, without the line end at its end.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Answer the prompt by the bundle's chat template; without a prompt, answer each line of the standard input.",
)
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@click.option("-n", "--max-tokens", type=whole(0), default=128, metavar="N", help="Generate at most N tokens.")
@click.option(
    "--texts",
    type=whole(1, 4096),
    default=1,
    metavar="N",
    help="Make N texts of the prompt, which is read once. With --seed S they have the seeds S, S + 1 and so on.",
)
@click.option(
    "--temperature",
    type=real(0, 1_000_000),
    default=0.0,
    metavar="T",
    help="Sampling temperature; 0: the most likely token.",
)
@click.option("--top-k", type=whole(0), default=0, metavar="K", help="Sample from the K most likely tokens; 0: all.")
@click.option(
    "--top-p",
    type=real(1e-9, 1),
    default=1.0,
    metavar="P",
    help="Sample from the most likely tokens whose probabilities add up to P.",
)
@click.option(
    "--min-p",
    type=real(0, 1),
    default=0.0,
    metavar="P",
    help="Sample from the tokens at least P times as likely as the most likely one; 0: all.",
)
@click.option(
    "--repetition-penalty",
    type=real(0.01, 100),
    default=1.0,
    metavar="R",
    help="Divide the logits of tokens of the prompt and the text by R where positive, else multiply; 1: off.",
)
@click.option(
    "--presence-penalty",
    type=real(-2, 2),
    default=0.0,
    metavar="A",
    help="Lower the logits of tokens that the text has by A; 0: off.",
)
@click.option(
    "--frequency-penalty",
    type=real(-2, 2),
    default=0.0,
    metavar="A",
    help="Lower the logits of tokens that the text has by A for each time; 0: off.",
)
@click.option(
    "--logit-bias", multiple=True, type=Bias(), metavar="ID=BIAS", help="Add BIAS to the logit of a token. Repeatable."
)
@click.option("--seed", type=SEED, metavar="S", help="Random seed; the same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable.")
@click.option(
    "--stop-id", "stop_ids", multiple=True, type=whole(0), metavar="ID", help="Stop at this token, too. Repeatable."
)
@click.option(
    "--eos", multiple=True, type=whole(0), metavar="ID", help="Stop at this token, not at the model's own. Repeatable."
)
@click.option("--ignore-eos", is_flag=True, help="Go on where the model ends its text.")
@click.option(
    "--logprobs",
    type=whole(0),
    metavar="K",
    help="With --json: the log-probability of each token, and the K most likely ones.",
)
@click.option(
    "--speculate", is_flag=True, help="Guess tokens from what was there before, and check them together: the same text."
)
@click.option("--load-state", type=click.Path(), metavar="FILE", help="Continue from a state that was saved.")
@click.option("--save-state", type=click.Path(), metavar="FILE", help="Save the state at the end.")
@threads_option
@trust_option
@json_option
def run(
    bundle, prompt, file, chat, system, texts, eos, logit_bias, speculate, load_state, save_state, threads, as_json,
    **settings,
) -> None:  # fmt: skip
    """Generate text with BUNDLE. It streams to stdout; a line with the speed follows on stderr."""
    if settings["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs is for --json.")
    if settings["ignore_eos"] and eos:
        raise click.UsageError("Give either --eos or --ignore-eos.")
    if system is not None and not chat:
        raise click.UsageError("--system is for --chat.")
    if chat and (load_state or save_state):
        raise click.UsageError("--chat keeps its state itself: leave out --load-state and --save-state.")
    asked = bool(prompt or file)
    prompt = _prompt(prompt, file)
    if chat and as_json and not asked:
        raise click.UsageError("--chat with --json answers one prompt: give it with -p or -f.")
    if texts > 1 and (load_state or save_state or speculate):
        raise click.UsageError("--texts makes several: leave out --load-state, --save-state and --speculate.")
    if texts > 1 and chat and not prompt:
        raise click.UsageError("--texts with --chat answers one prompt: give it with -p or -f.")
    bundle = paths.bundle(bundle)
    if load_state is not None:
        load_state = paths.file(load_state, "a file that --save-state wrote")
    if save_state is not None:
        save_state = paths.output_file(save_state, bundle, file and paths.file(file, "a text"))
    if not (prompt or load_state or (chat and not asked)):
        raise DfssmError("there is nothing to continue: give a prompt with -p or a state with --load-state")
    for text in (prompt, system or "", *settings["stop"]):
        require_utf8(text)
    from dfssm.runtime import Chat, Engine, GenerationConfig
    from dfssm.runtime.speculation import MOST

    config = GenerationConfig(eos=eos or None, logit_bias=dict(logit_bias), **settings)
    engine = Engine.load(bundle, threads=threads)
    state = engine.load_state(load_state) if load_state else engine.new_state() if save_state else None
    most = MOST if speculate else 0
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end the run
    if texts > 1:
        said = [{"role": "system", "content": system}] if system is not None else []
        ids = engine.chat_prompt([*said, {"role": "user", "content": prompt}]) if chat else prompt
        _several(engine, ids, config, texts, as_json)
        return
    if chat:
        conversation = Chat(engine, config, system)
        if not prompt:
            _converse(conversation, most)
            return
        generation = conversation.say(prompt, speculate=most)
    else:
        generation = engine.generate(prompt, config, state=state, speculate=most)
    for piece in generation:
        if not as_json:
            click.echo(piece, nl=False)
    if save_state:
        generation.state.save(save_state)
    elif rest := generation.flush():
        if not as_json:
            click.echo(rest, nl=False)
    figures = _figures(generation, engine)
    if as_json:
        print_result(_made(generation, engine) | figures, True, str)
    else:
        click.echo()
        click.echo(_speed(figures), err=True)


def _prompt(prompt: str, file: str | None) -> str:
    """The text to continue, from where it is given."""
    if file is None and prompt != "-":
        return prompt
    if file is not None and prompt:
        raise click.UsageError("Give either --prompt or --file.")
    if file is None:
        name, content = "the standard input", sys.stdin.buffer.read()
    else:
        path = paths.file(file, "a text")
        try:
            name, content = str(path), read_file(path)
        except OSError as error:
            raise DfssmError(f"{path} cannot be read ({reason(error)}): give a text") from None
    try:
        # Editors of Windows put a byte order mark in front.
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeError:
        raise _not_utf8(name) from None


def _not_utf8(name: str) -> DfssmError:
    return DfssmError(f"{name} is not UTF-8: convert it")


def _converse(chat, speculate: int) -> None:
    """Answer line after line. Ctrl-C ends an answer, and between answers the command."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401 (input then edits the line)
    while True:
        try:
            line = input("> ") if asks else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except UnicodeError:
            raise _not_utf8("the standard input") from None
        if not line.strip():
            continue
        require_utf8(line)
        answer = chat.say(line.rstrip("\r\n"), speculate=speculate)
        try:
            for piece in answer:
                click.echo(piece, nl=False)
            click.echo(answer.flush())
        except KeyboardInterrupt:
            click.echo()


def _several(engine, prompt, config, count: int, as_json: bool) -> None:
    """`count` texts of a prompt, made together and printed one after another."""
    from dfssm.runtime import Scheduler

    begin = time.perf_counter()
    with Scheduler(engine, min(count, 8, engine.backend.max_batch), queue=count) as scheduler:
        requests = [scheduler.submit(prompt, config.of_text(index)) for index in range(count)]
        for index, request in enumerate(requests):
            if index and not as_json:
                click.echo("---")
            for piece in request:
                if not as_json:
                    click.echo(piece, nl=False)
            if not as_json:
                click.echo()
    seconds, tokens = time.perf_counter() - begin, sum(len(request.tokens) for request in requests)
    if as_json:
        figures = {"prompt_tokens": requests[0].prompt_tokens, "new_tokens": tokens, "seconds": seconds}
        found = [_made(request, engine) | {"finish_reason": request.finish_reason} for request in requests]
        print_result({"texts": found} | figures | {"threads": engine.threads}, True, str)
    else:
        click.echo(f"[{count} texts, {tokens} tokens, {seconds:.1f} s | {engine.threads} threads]", err=True)


def _made(text, engine) -> dict:
    """What has come of a text."""
    told = None
    if text.config.logprobs is not None:
        told = [_told(one, engine.tokenizer) for one in text.logprobs]
    return {"text": text.text, "tokens": text.tokens, "logprobs": told}


def _told(one, tokenizer) -> dict:
    """The log-probabilities of a token, with the texts of it and of the most likely ones by themselves."""
    entries = [
        {"token": token, "text": tokenizer.decode([token], skip_special_tokens=False), "logprob": logprob}
        for token, logprob in ((one.token, one.logprob), *one.top)
    ]
    return entries[0] | {"top": entries[1:]}


def _figures(generation, engine) -> dict:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": len(generation.tokens),
        "finish_reason": generation.finish_reason,
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        "prefill_tok_s": _rate(generation.prompt_tokens, generation.prefill_seconds),
        "tok_s": _rate(generation.steps, generation.decode_seconds),
        "threads": engine.threads,
        "speculation": _speculation(generation.speculation),
    }


def _speculation(counts) -> dict | None:
    return counts and {"runs": counts.runs, "drafted": counts.drafted, "kept": counts.kept}


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds else None


def _speed(figures: dict) -> str:
    parts = []
    if figures["prefill_tok_s"]:
        parts.append(f"prompt {figures['prompt_tokens']} tokens, {figures['prefill_tok_s']:.1f} tok/s")
    if figures["tok_s"]:
        parts.append(f"text {figures['new_tokens']} tokens, {figures['tok_s']:.1f} tok/s")
    if counts := figures["speculation"]:
        parts.append(f"{counts['kept']} of {counts['drafted']} drafts right, {counts['runs']} runs")
    return f"[{' | '.join([*parts, figures['finish_reason']])} | {figures['threads']} threads]"
