"""libdfssm_runtime: what C and C++ programs compute with it, beside what Engine does with the same bundle."""

import dataclasses
import os
import struct
import subprocess

import numpy as np
import pytest
import tiny
from native.runtime_library import ROOT, drive, environment, ids_of, program, reseal

from dfssm import Engine
from dfssm.runtime import GenerationConfig, Sampling
from dfssm.targets.bundle import file_entry

pytestmark = pytest.mark.xdist_group("native")

EXAMPLES = ROOT / "examples/runtime_cpp"

SAMPLINGS = {
    "greedy": Sampling(),
    "all": Sampling(temperature=0.9, seed=3),
    "top-k": Sampling(temperature=1.3, top_k=5, seed=2**64 - 1),
    "top-p": Sampling(temperature=1.0, top_p=0.6, seed=0),
    "min-p": Sampling(temperature=2.0, min_p=0.2, seed=11),
    "all filters": Sampling(temperature=0.7, top_k=40, top_p=0.95, min_p=0.01, seed=7),
    "one of the largest": Sampling(temperature=0.7, top_k=1, seed=7),
}


def written(sampling: Sampling) -> str:
    seed = "-" if sampling.seed is None else sampling.seed
    return f"{sampling.temperature!r} {sampling.top_k} {sampling.top_p!r} {sampling.min_p!r} {seed}"


def prefill(ids) -> str:
    return "prefill " + " ".join(map(str, ids))


def prompt(length: int) -> list[int]:
    return [(7 * i + 3) % 256 for i in range(length)]


def floats(answer: str) -> np.ndarray:
    return np.array([float.fromhex(number) for number in answer.split()], np.float32)


@pytest.fixture(scope="module", params=["fp16", "int8", "fp32-deferred", "onnx"])
def bundle(request, cpu_target, tmp_path_factory):
    of = ("onnx", "fp32") if request.param == "onnx" else (cpu_target, request.param)
    return tiny.write_bundle(tmp_path_factory.mktemp("native") / "bundle", target=of[0], state_dtype=of[1])


LENGTHS = (1, 2, 17, 64, 65, 130)
"""Of prompts: of one run, of several, and of one whose memory is given back."""


def test_logits_and_greedy_ids_are_those_of_engine(bundle):
    engine = Engine.load(bundle)
    lines = [(prefill(prompt(length)), "logits", f"generate 12 {written(Sampling())}", "reset") for length in LENGTHS]
    answers = drive(f"open {bundle}", *sum(lines, ()))[1:]
    for length, logits, made in zip(LENGTHS, answers[1::4], answers[2::4], strict=True):
        state = engine.new_state()
        np.testing.assert_array_equal(floats(logits), engine.prefill(prompt(length), state)[0])
        assert ids_of(made) == engine.generate([], state=state, max_tokens=12).result().tokens


def test_drawn_ids_are_those_of_engine(tiny_bundle):
    engine = Engine.load(tiny_bundle)
    lines = [("reset", prefill(prompt(5)), f"generate 30 {written(sampling)}") for sampling in SAMPLINGS.values()]
    answers = drive(f"open {tiny_bundle}", *sum(lines, ()))[3::3]
    for sampling, made in zip(SAMPLINGS.values(), answers, strict=True):
        fields = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
        assert ids_of(made) == engine.generate(prompt(5), max_tokens=30, **fields).result().tokens


def test_choices_from_logits_are_those_of_python(tmp_path):
    """Of 1,000 logits, more than are looked at first: peaked ones and flat ones, equal ones, and -inf."""
    rng = np.random.default_rng(5)
    rows = (rng.standard_normal((40, 1000)) * np.geomspace(1e-3, 30, 40)[:, None]).astype(np.float32)
    rows[::3, ::2] = -np.inf
    rows[::4] = np.round(rows[::4])
    rows[1] = 0.0
    (tmp_path / "logits").write_bytes(rows.tobytes())
    answers = drive(*(f"sample {written(sampling)} 17 {tmp_path / 'logits'}" for sampling in SAMPLINGS.values()))
    for sampling, found in zip(SAMPLINGS.values(), answers, strict=True):
        assert ids_of(found) == [sampling.choose(row, 17) for row in rows]


def test_without_a_seed_draws_differ(tmp_path):
    (tmp_path / "logits").write_bytes(np.zeros((20, 1000), np.float32).tobytes())
    (found,) = drive(f"sample 1 0 1 0 - 3 {tmp_path / 'logits'}")
    assert len(set(ids_of(found))) > 10


def test_a_state_goes_on_in_python_and_back(bundle, tmp_path):
    """Both write the same bytes, and each goes on from what the other wrote."""
    engine = Engine.load(bundle)
    state = engine.new_state()
    engine.prefill(prompt(20), state)
    state.save(tmp_path / "python")
    greedy = written(Sampling())
    saved = drive(f"open {bundle}", prefill(prompt(20)), f"save {tmp_path / 'c'}", f"generate 8 {greedy}")[-1]
    assert (tmp_path / "c").read_bytes() == (tmp_path / "python").read_bytes()
    loaded = engine.load_state(tmp_path / "c")
    assert list(engine.generate([], state=loaded, max_tokens=8).result().tokens) == ids_of(saved)
    *_, about, made = drive(f"open {bundle}", f"load {tmp_path / 'python'}", "about", f"generate 8 {greedy}")
    assert about == f"{engine.model} {engine.vocab_size} 20" and ids_of(made) == ids_of(saved)
    assert oct((tmp_path / "c").stat().st_mode) == oct((tmp_path / "python").stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "python"}


def test_a_clone_is_independent_and_can_be_come_back_to(tiny_bundle):
    one, other = prefill(prompt(9)), prefill([5, 6])
    lines = [f"open {tiny_bundle}", one, "keep", "logits", other, "logits", "back", "logits", other, "logits", "reset"]
    answers = drive(*lines, "logits", one, "logits", "about")
    start, after, back, again, zeros, anew = (answers[i] for i in (3, 5, 7, 9, 11, 13))
    assert start == back == anew and after == again != start
    assert not floats(zeros).any() and answers[-1].endswith(" 9")


DAMAGED_STATES = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a header of 2^60 bytes": lambda data: struct.pack("<Q", 1 << 60) + data[8:],
    "no JSON": lambda data: data[:8] + b"[" + data[9:],
    "version 2": lambda data: data.replace(b'"version":"1"', b'"version":"2"'),
    "another dtype": lambda data: data.replace(b'"dtype":"I64"', b'"dtype":"U64"'),
    "from behind": lambda data: data.replace(b'"data_offsets":[0,8]', b'"data_offsets":[8,0]'),
    "too long": lambda data: data.replace(b'"data_offsets":[0,8]', b'"data_offsets":[0,9]'),
    "a recent token of no model": lambda data: data.replace(b"[[-1, -1, ", b"[[99999, "),
    "recent tokens of two": lambda data: data.replace(b"[[-1, -1, ", b"[[],[-1, "),
}


def test_a_damaged_state_is_refused(tiny_bundle, tmp_path):
    data = Engine.load(tiny_bundle).new_state().to_bytes()
    paths = [tmp_path / name for name in DAMAGED_STATES]
    for path in paths:
        damaged = DAMAGED_STATES[path.name](data)
        assert damaged != data
        path.write_bytes(damaged)
    # Of a line a path is one word.
    lines = [f"load {path.rename(path.with_name(path.name.replace(' ', '-')))}" for path in paths]
    _, *answers, after = drive(f"open {tiny_bundle}", *lines, prefill([1]))
    for line, answer in zip(lines, answers, strict=True):
        assert answer.startswith(f"error 5 {line.removeprefix('load ')} ")
    assert after == ""


def test_states_of_several_sequences_and_of_other_models_are_refused(tiny_bundle, tmp_path):
    engine = Engine.load(tiny_bundle)
    engine.new_state(2).save(tmp_path / "two")
    other = tiny.write_bundle(tmp_path / "bundle", seed=1, target=engine.manifest.target, state_dtype="fp16")
    Engine.load(other).new_state().save(tmp_path / "other")
    two, of_other = drive(f"open {tiny_bundle}", f"load {tmp_path / 'two'}", f"load {tmp_path / 'other'}")[1:]
    assert two.startswith("error 5 ") and "one sequence" in two
    assert of_other.startswith("error 5 ") and "other weights" in of_other


def test_numbers_that_are_not_finite_break_the_state(cpu_target, tmp_path):
    edit = tiny.not_a_number("layers.0.out_proj.scale")
    folder = tiny.write_bundle(tmp_path / "bundle", target=cpu_target, edit=edit)
    lines = [f"open {folder}", prefill([1, 2]), prefill([3]), f"save {tmp_path / 'state'}", "reset", "about"]
    answers = drive(*lines)
    assert answers[1].startswith("error 6 ") and "not finite after 2 tokens" in answers[1]
    assert answers[2].startswith("error 5 ") and answers[3].startswith("error 5 ") and answers[4] == ""
    assert not (tmp_path / "state").exists()


REFUSED = {
    "prefill": "1 the prompt has no tokens",
    prefill([265]): "1 token id 265",
    prefill([3, -1]): "1 token id -1",
    "generate 1 0 0 0 0 -": "1 the state has read nothing",
    "sample -1 0 0 0 - 1 LOGITS": "1 temperature",
    "sample 1 -1 0 0 - 1 LOGITS": "1 top_k",
    "sample 1 0 1.5 0 - 1 LOGITS": "1 top_p",
    "sample 1 0 1 nan - 1 LOGITS": "1 min_p",
    "sample 0 0 0 0 - 1 LOGITS": "6 the logits are not finite",
    "save none/state": "8 cannot write none/state",
    "load none": "5 none cannot be read",
    "null": "1 a pointer is NULL",
}


def test_what_cannot_be_done_is_refused_in_one_line(tiny_bundle, tmp_path):
    (tmp_path / "logits").write_bytes(np.full(1000, np.nan, np.float32).tobytes())
    lines = [line.replace("LOGITS", str(tmp_path / "logits")) for line in REFUSED]
    _, *answers, about = drive(f"open {tiny_bundle}", *lines, "about")
    for answer, words in zip(answers, REFUSED.values(), strict=True):
        assert answer.startswith(f"error {words}")
    assert about.endswith(" 0")


def generate(*arguments: object) -> subprocess.CompletedProcess:
    command = [str(program(EXAMPLES / "generate.cpp")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=300)


@pytest.mark.parametrize("text, seed", [("hello world", None), ("h", 4), ("caf\u00e9 \U0001f600", 5)])
def test_the_example_writes_the_text_of_engine(text, seed, tiny_bundle):
    """Of a random model: most of its bytes are no character, or complete one later."""
    options = {} if seed is None else {"temperature": 0.8, "seed": seed}
    expected = Engine.load(tiny_bundle).generate(text, max_tokens=60, **options).result().text
    done = generate(tiny_bundle, text, 60, *([] if seed is None else [0.8, seed]))
    assert (done.stdout.decode(), done.stderr) == (expected + "\n", b"")


def test_the_examples_are_short_and_say_what_is_wrong(tiny_bundle, tmp_path):
    for example in EXAMPLES.iterdir():
        assert len(example.read_text().splitlines()) <= 60
    done = generate(tmp_path / "none", "hello")
    assert done.returncode == 1 and done.stderr.startswith(f"generate: {tmp_path}/none cannot be read".encode())
    untold = tiny.write_bundle(tmp_path / "bundle", tokenizer=False)
    done = generate(untold, "hello")
    assert done.returncode == 1 and b"has no tokenizer.json" in done.stderr
    done = generate(tiny_bundle, os.fsdecode(b"caf\xe9"))
    assert done.returncode == 1 and done.stderr.startswith(b"generate: the text is not UTF-8")
    assert generate().returncode == 2


def test_the_example_in_c_writes_the_ids_of_engine(tiny_bundle):
    expected = Engine.load(tiny_bundle).generate([5, 6, 7], max_tokens=9, ignore_eos=True).result().tokens
    command = [str(program(EXAMPLES / "ids.c")), str(tiny_bundle), "9", "5", "6", "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert ids_of(done.stdout) == list(expected) and "VmRSS" in done.stderr and "RssAnon" in done.stderr


@pytest.mark.parametrize("place", ["config", "two", "added", "vocabulary", "none"])
def test_the_ends_of_a_text_are_those_of_engine(place, cpu_target, tmp_path):
    """The config's; of a model that names none the tokenizer's <|endoftext|>: added, or of the vocabulary."""
    config = dataclasses.replace(tiny.CONFIG, eos_token_id={"config": 5, "two": [7, 3]}.get(place))
    folder = tiny.write_bundle(tmp_path / "bundle", config=config, target=cpu_target)
    path = folder / "tokenizer.json"
    if place in ("added", "vocabulary"):
        old = '"<|end|>"' if place == "added" else '"\u0100"'  # the token of byte 0
        path.write_text(path.read_text().replace(old, '"<|endoftext|>"', 1))
    reseal(folder, lambda manifest: manifest["files"].update({path.name: file_entry(path)}))
    expected = sorted(Engine.load(folder).ends(GenerationConfig()))
    assert bool(expected) == (place != "none")
    assert ids_of(drive(f"open {folder}", "ends")[1]) == expected
