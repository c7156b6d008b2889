"""Speculation changes no bit: texts and states are those of the plain run, whatever the drafts are."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import student_ref
import tiny
from backends import on_device
from signals import everywhere

from dfssm import _native
from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.runtime.speculation import MOST, PromptLookup

PROMPT = [104, 101, 108, 108, 111, 32]
TOTAL = 40
SETTINGS = {
    "greedy": {},
    "seeded": {"temperature": 2.0, "seed": 5},
    "nucleus": {"temperature": 2.0, "top_p": 0.9, "seed": 9},
    "top-k": {"temperature": 1.5, "top_k": 20, "seed": 3},
}


FORMS = "fp32-deferred", "fp16-deferred", "int8-deferred"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny.write_bundle(tmp_path_factory.mktemp("int8") / "bundle", state_dtype="int8-deferred")
    engine = Engine.load(folder, threads=1)
    engine.config["eos_token_id"] = None  # random weights would end the text anywhere
    return engine


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param] | {"max_tokens": TOTAL}


def finished(engine, prompt=PROMPT, **settings):
    generation = engine.generate(prompt, **settings)
    "".join(generation)
    return generation


def forced(plain, rate, seed=0):
    """Drafts of what `plain` chose, each of them right with probability `rate`."""
    rng = random.Random(seed)
    truth = [*PROMPT, *plain.tokens]

    def draft(ids, count):
        after = truth[len(ids) : len(ids) + count]
        return [token if rng.random() < rate else (token + 1) % tiny.CONFIG.vocab_size for token in after]

    return draft


def contents(engine, state):
    """What a state is, bit for bit: that is what comes of it, as its tokens may be pending or in its tensors."""
    future = engine.logits([list(range(20))] * state.batch, state.clone())
    return [array.tolist() for array in (future, state.logits, state.tokens, state.recent)]


BITS = """
import sys
import numpy as np
from dfssm.runtime import Engine
for folder in sys.argv[2:]:
    engine = Engine.load(folder, threads=int(sys.argv[1]))
    ids = np.random.default_rng(4).integers(0, engine.vocab_size, (3, 20))
    start = engine.new_state(3)
    engine.prefill(ids[:, :9], start)
    for tokens in range(2, 9):
        at_once, by_step = start.clone(), start.clone()
        every = engine.logits(ids[:, 9 : 9 + tokens], at_once)
        steps = [engine.step(column, by_step) for column in ids[:, 9 : 9 + tokens].T]
        assert every.tobytes() == np.stack(steps, 1).tobytes(), (folder, tokens)
        after = [engine.logits(ids[:, :10], state) for state in (at_once, by_step)]
        assert after[0].tobytes() == after[1].tobytes(), (folder, tokens)
"""


@pytest.mark.parametrize("isa", _native.isas())
def test_a_run_of_few_tokens_is_runs_of_one_bit_for_bit(isa, tmp_path):
    folders = [
        str(
            tiny.write_bundle(
                tmp_path / f"{name}-{laid_out}", student_ref.config(name), "ort-cpu", form, options={"isa": laid_out}
            )
        )
        for name, form in zip(student_ref.CONFIGS, itertools.cycle(FORMS))
        for laid_out in ("scalar", "avx2", "avx512vnni")
    ]
    for threads in ("1", "2"):
        command = [sys.executable, "-c", BITS, threads, *folders]
        done = subprocess.run(command, env=os.environ | {"DFSSM_ISA": isa}, capture_output=True, text=True, timeout=120)
        assert not done.returncode, done.stderr


@pytest.mark.parametrize("rate", [0, 0.5, 0.8, 1])
def test_text_and_state_are_those_of_the_plain_run(engine, settings, rate):
    plain_state = engine.new_state()
    plain, alone = finished(engine, state=plain_state, **settings), finished(engine, **settings)
    for most in range(1, MOST + 1):
        state = engine.new_state()
        found = finished(engine, state=state, speculate=most, draft=forced(plain, rate, most), **settings)
        assert (found.tokens, found.text, found.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
        assert contents(engine, state) == contents(engine, plain_state)
        own = finished(engine, speculate=most, draft=forced(plain, rate, most), **settings)
        assert (own.tokens, own.text) == (alone.tokens, alone.text)
        counts = found.speculation
        assert counts.runs + counts.kept == found.steps == TOTAL and counts.kept <= counts.drafted
        if rate == 1:
            assert counts.kept == counts.drafted and counts.runs <= TOTAL // (most + 1) + 8  # the first have few drafts


def test_drafts_of_the_prompt_leave_the_text_as_it_is(engine, settings):
    prompt = "hello world, hello world, hello"
    plain, found = (finished(engine, prompt, speculate=most, **settings) for most in (0, MOST))
    assert (found.tokens, found.text) == (plain.tokens, plain.text)


def test_a_text_in_a_loop_takes_few_runs(engine):
    """Greedy texts of this model run into one."""
    found = finished(engine, max_tokens=200, speculate=MOST)
    assert found.tokens == finished(engine, max_tokens=200).tokens
    assert found.speculation.runs < 100


def test_drafts_that_are_always_wrong_stop(engine):
    found = finished(engine, max_tokens=100, speculate=MOST, draft=lambda ids, count: [264] * count)
    assert 264 not in found.tokens and found.speculation.kept == 0
    assert found.speculation.drafted <= 3 + 2 + 1 + 100 // 16


@pytest.mark.parametrize("pieces", range(1, 12))
def test_a_text_that_is_cut_has_read_what_it_shows(engine, settings, pieces):
    plain = finished(engine, state=engine.new_state(), **settings)
    state = engine.new_state()
    with engine.generate(PROMPT, state=state, speculate=5, draft=forced(plain, 0.8), **settings) as text:
        for _ in range(pieces):
            next(text)
    assert text.finish_reason == "cancelled" and text.tokens == plain.tokens[: len(text.tokens)]
    read = engine.new_state()
    engine.prefill(PROMPT, read)
    for token in text.tokens:
        engine.step([token], read)
    assert contents(engine, state) == contents(engine, read)
    rest = finished(engine, "", state=state, speculate=3, **settings | {"max_tokens": TOTAL - len(text.tokens)})
    assert text.text + rest.text == plain.text


@pytest.mark.parametrize("settle", [False, True])
def test_the_state_is_of_the_moment_between_pieces(engine, settle):
    plain = finished(engine, max_tokens=TOTAL)
    state, read = engine.new_state(), engine.new_state()
    engine.prefill(PROMPT, read)
    seen = 0
    for _ in (text := engine.generate(PROMPT, max_tokens=TOTAL, state=state, speculate=7, draft=forced(plain, 0.9))):
        for token in text.tokens[seen:]:
            engine.step([token], read)
        seen = len(text.tokens)
        assert (state.tokens, state.recent.tolist()) == (read.tokens, read.recent.tolist())
        assert state.logits.tolist() == read.logits.tolist()
        if settle:
            assert contents(engine, state) == contents(engine, read)
    assert contents(engine, state) == contents(engine, read)


def test_rows_of_a_state_and_slots_are_settled_before_they_run(engine):
    """Between the pieces of a text on one row others run, and rows are copied, reset and written."""
    plain, batch = finished(engine, max_tokens=TOTAL), engine.new_state(3)
    draft = forced(plain, 0.9)
    texts = [engine.generate(PROMPT, max_tokens=TOTAL, state=batch.row(i), speculate=7, draft=draft) for i in (0, 2)]
    for pair in itertools.zip_longest(*texts):
        assert any(pair)
        batch.row(1).copy_from(batch.row(0))
        engine.step([3], batch.row(1))
    assert texts[0].tokens == texts[1].tokens == plain.tokens
    read = engine.new_state()
    engine.prefill([*PROMPT, *plain.tokens], read)
    assert contents(engine, batch.row(0)) == contents(engine, batch.row(2)) == contents(engine, read)


ACTS = {  # on row 0 of a pool, which has read ahead, and row 1: what both have read then
    "run": (lambda pool, arrays: pool.run(np.array([[9]]), 0, lambda: None), "kept, 9", "other"),
    "all logits": (lambda pool, arrays: pool.run_all_logits(np.array([[9]]), 0, lambda: None), "kept, 9", "other"),
    "read": (lambda pool, arrays: None, "kept", "other"),
    "copy to another": (lambda pool, arrays: pool.copy(0, 1), "kept", "kept"),
    "copy from another": (lambda pool, arrays: pool.copy(1, 0), "other", "other"),
    "write": (lambda pool, arrays: pool.write(0, arrays), "other", "other"),
    "reset": (lambda pool, arrays: pool.reset(0), "", "other"),
    "another ahead": (lambda pool, arrays: pool.ahead(1).run([9], lambda: None), "kept", "other, 9"),
}


@pytest.mark.parametrize("kept", range(1, 5))
@pytest.mark.parametrize("act", ACTS)
def test_a_row_that_reads_ahead_is_settled_or_forgotten(engine, act, kept):
    ids = {"kept": [*PROMPT, *range(10, 10 + kept)], "other": [3, 4, 5], "": []}
    states = {}
    for name in ("", "kept", "other", "kept, 9", "other, 9"):
        states[name] = engine.new_state()
        if name:
            engine.prefill(ids[name.split(",")[0]] + [9] * name.endswith("9"), states[name])
    pool = engine.backend.pool(2)
    pool.run(np.array([PROMPT]), 0, lambda: None)
    pool.run(np.array([ids["other"]]), 1, lambda: None)
    ahead = pool.ahead(0)
    ahead.run([10, 11, 12, 13], lambda: None)
    for token in range(11, 10 + kept):
        assert ahead.draft == token
        ahead.keep()
    assert pool.logits[0].tolist() == states["kept"].logits[0].tolist()
    change, *expected = ACTS[act]
    change(pool, states["other"].tensors)
    for row, name in enumerate(expected):
        found, logits = engine.new_state(), states[name].logits if act == "write" else pool.logits[row : row + 1]
        pool.read(row, found.tensors)
        found.logits[:] = logits
        found.tokens[:], found.recent[:] = states[name].tokens, states[name].recent
        assert contents(engine, found) == contents(engine, states[name]), row


def test_stops_and_ends_are_those_of_the_plain_run(engine, settings):
    free = finished(engine, **settings)
    for stop, eos in ((free.text[12:15], ()), ((), free.tokens[17]), ("\0", ()), ((), free.tokens[0])):
        ended = {**settings, "stop": stop, "eos": eos}
        states = [engine.new_state(), engine.new_state()]
        plain = finished(engine, state=states[0], **ended)
        found = finished(engine, state=states[1], speculate=7, draft=forced(free, 0.9), **ended)
        assert (found.tokens, found.text, found.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
        assert contents(engine, states[0]) == contents(engine, states[1])


def test_no_draft_is_read_past_the_last_token(engine):
    for most in range(1, 20):
        plain = finished(engine, max_tokens=most)
        asked = []

        def draft(ids, count, plain=plain, asked=asked):
            asked.append(len(ids) + count)
            return forced(plain, 1)(ids, count)

        state = engine.new_state()
        found = finished(engine, max_tokens=most, state=state, speculate=7, draft=draft)
        assert found.tokens == plain.tokens and state.tokens.tolist() == [len(PROMPT) + most]
        assert max(asked, default=0) <= len(PROMPT) + most


def test_turns_of_a_chat_are_those_of_the_plain_run(engine, settings):
    states = [engine.new_state(), engine.new_state()]
    for turn in ("hello world", " hello", " world hello world"):
        texts = [
            finished(engine, turn, state=state, speculate=most, **settings | {"max_tokens": 15})
            for state, most in zip(states, (0, 7), strict=True)
        ]
        assert texts[0].tokens == texts[1].tokens and texts[0].text == texts[1].text
    assert contents(engine, states[0]) == contents(engine, states[1])


def test_ctrl_c_at_any_point(engine):
    plain = finished(engine, max_tokens=12, state=engine.new_state())

    def make():
        state = engine.new_state()
        text = engine.generate(PROMPT, max_tokens=12, state=state, speculate=5, draft=forced(plain, 0.7))
        pieces = []

        def act():
            pieces.extend(text)
            state.clone()

        def check():
            text.close()
            if state.rows.broken:
                state.reset()
                assert contents(engine, state) == contents(engine, engine.new_state())
                return False
            if state.tokens[0]:
                read = engine.new_state()
                engine.prefill([*PROMPT, *text.tokens][: state.tokens[0]], read)
                assert contents(engine, state) == contents(engine, read)
            return True

        return act, check

    found = everywhere(make, 150)
    assert any(found) and not all(found)


def softmax(logits, kept):
    """Probabilities f64[V] of the `kept` largest."""
    largest = np.argsort(-logits, kind="stable")[:kept]
    weights = np.zeros(len(logits))
    weights[largest] = np.exp(logits[largest].astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("rank", [0, 2, 3], ids=["likely drafts", "unlikely drafts", "impossible drafts"])
def test_sampled_texts_have_the_model_s_distribution(engine, monkeypatch, rank):
    """Three tokens of three candidates each, without a seed: 27 texts, against the products of their probabilities."""
    rng, kept, draws = random.Random(rank), 3, 3000
    monkeypatch.setattr(os, "urandom", rng.randbytes)
    expected, order = {}, {}
    for first, second in itertools.product(range(kept), repeat=2):
        ids = list(PROMPT)
        probability = 1.0
        for choice in (first, second, None):
            logits = engine.logits(ids)[0, -1]
            p, order[tuple(ids)] = softmax(logits, kept), np.argsort(-logits, kind="stable").tolist()
            if choice is None:
                for token in np.flatnonzero(p).tolist():
                    expected[(*ids[len(PROMPT) :], token)] = probability * p[token]
            else:
                ids.append(order[tuple(ids)][choice])
                probability *= p[ids[-1]]

    def draft(ids, count):
        after = list(ids)
        for _ in range(count):
            if tuple(after) not in order:
                break
            after.append(order[tuple(after)][rank])
        return after[len(ids) :]

    found, drafted, right = Counter(), 0, 0
    state, start = engine.new_state(), engine.new_state()
    engine.prefill(PROMPT[:-1], start)
    for _ in range(draws):
        state.copy_from(start)
        text = engine.generate(
            PROMPT[-1:], max_tokens=3, temperature=1.0, top_k=kept, state=state, speculate=2,
            draft=lambda ids, count: draft(PROMPT + list(ids[len(PROMPT) :]), count),
        )  # fmt: skip
        list(text)
        found[tuple(text.tokens)] += 1
        drafted, right = drafted + text.speculation.drafted, right + text.speculation.kept
    assert len(expected) == 27 and found.keys() <= expected.keys()
    assert drafted >= draws and (right > 0) == (rank < kept)
    likely = {text: p for text, p in expected.items() if p * draws >= 5}
    pairs = [(found[text], p * draws) for text, p in likely.items()]
    pairs.append((draws - sum(n for n, _ in pairs), draws - sum(n for _, n in pairs)))
    chi2 = sum((n - mean) ** 2 / mean for n, mean in pairs if mean > 0)
    freedom = len(likely)
    # The 99.9 % quantile by Wilson and Hilferty. The draws are seeded: it does not fail by chance.
    assert chi2 < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3, (chi2, freedom)


def test_bundles_that_cannot_are_refused(tmp_path):
    at_once = Engine.load(tiny.write_bundle(tmp_path / "at_once"))
    portable = Engine.load(tiny.write_bundle(tmp_path / "portable", target="onnx", state_dtype="fp16-deferred"))
    for other in (at_once, portable):
        with pytest.raises(DfssmError, match="speculation needs .* --target ort-cpu --state-dtype fp16-deferred"):
            other.generate("a", speculate=2)
    with pytest.raises(DfssmError, match="TensorRT does not promise: use a bundle of target ort-cpu"):
        on_device(at_once).generate("a", speculate=2)


@pytest.mark.parametrize("most", [-1, 8, 1.5, True, None])
def test_a_number_of_drafts_is_a_whole_number(engine, most):
    with pytest.raises(DfssmError, match=f"speculate is {most!r}: give a whole number from 0 to 7"):
        engine.generate("a", speculate=most)


@pytest.mark.parametrize(
    ("drafts", "named"), [([265], "token id 265 is out of range"), ([-1], "token id -1"), ([0.5], "are float64")]
)
def test_a_wrong_draft_is_named_and_breaks_nothing(engine, drafts, named):
    state = engine.new_state()
    with pytest.raises(DfssmError, match=named):
        list(engine.generate(PROMPT, state=state, speculate=2, draft=lambda ids, count: drafts))
    read = engine.new_state()
    engine.prefill(PROMPT, read)
    assert contents(engine, state) == contents(engine, read)


def test_prompt_lookup_gives_what_followed_the_longest_end_that_was_there_before():
    rng = random.Random(1)
    for trial in range(300):
        lookup, ids = PromptLookup(), []
        for _ in range(rng.randrange(1, 60)):
            ids.append(rng.randrange(1 + trial % 4))
            count = rng.randrange(1, 8)
            ends = [at for at in range(1, len(ids)) if ids[max(0, at - 2) : at] == ids[-2:] and at >= 2]

            def alike(at, ids=ids):
                return next((n for n in range(min(at, 16)) if ids[at - 1 - n] != ids[-1 - n]), min(at, 16))

            found = lookup(ids, count)
            if not ends:
                assert found == []
                continue
            best = max(ends[-32:], key=lambda at: (alike(at), at))
            period = ids[best:]
            assert found == [period[i % len(period)] for i in range(count)]
