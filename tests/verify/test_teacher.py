"""Student and bundle against their teacher, beside the same recurrences worked out in NumPy."""

import json

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from mamba2_ref import scan_ref

from dfssm.base import DfssmError
from dfssm.cli.main import dfssm
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.model.checkpoint import load_student_tensors, save_student
from dfssm.model.config import Mamba2Config
from dfssm.model.convert import convert
from dfssm.model.hf_import import save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.opset.reference import REFERENCES
from dfssm.verify.teacher import SEED, compare_teacher, text_ids

END = tiny.CONFIG.eos_token_id
CONFIG = Mamba2Config(
    vocab_size=END + 1, d_model=32, n_layer=2, d_state=8, headdim=16, ngroups=2, dt_limit=(0.001, 0.2), eos_token_id=END
)
TOKENS = 70  # more than a piece, and a last octave that is not full


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = Mamba2LM(CONFIG)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    save_teacher(model, folder)
    tiny.write_tokenizer(folder / "tokenizer.json")
    return folder, model


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    file = tmp_path_factory.mktemp("student") / "model.pt"
    save_student(file, *convert(teacher[1], rank=2))
    return file


def walk(config, tensors, linear, table, ids):
    """Of each layer A [T,H], y [T,H*P] and the states [T,H,N,P], in float64 but for `linear` and `table`."""

    def weight(name):
        return np.asarray(tensors[name], np.float64)

    def normed(x, name, groups=1):
        parts = x.reshape(*x.shape[:-1], groups, -1)
        parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + config.norm_eps)
        return parts.reshape(x.shape) * weight(name)

    def silu(x):
        return x / (1 + np.exp(-x))

    c, h, found = config, table(ids).astype(np.float64), []
    for i in range(c.n_layer):
        layer = f"layers.{i}"
        projected = linear(f"{layer}.in_proj", normed(h, f"{layer}.norm.weight"))
        z, xBC, dt = np.split(projected, np.cumsum([c.d_inner, c.conv_dim]), axis=-1)
        padded = np.concatenate([np.zeros((c.d_conv - 1, c.conv_dim)), xBC])
        taps = weight(f"{layer}.conv.weight")
        xBC = silu(sum(padded[k : k + len(ids)] * taps[:, k] for k in range(c.d_conv)) + weight(f"{layer}.conv.bias"))
        x, B, C = np.split(xBC, np.cumsum([c.d_inner, c.ngroups * c.d_state]), axis=-1)
        A_log, D, bias = (weight(f"{layer}.scan.{name}") for name in ("A_log", "D", "dt_bias"))
        state, ys, states = np.zeros((1, c.nheads, c.d_state, c.headdim)), [], []
        for t in range(len(ids)):
            token = (v[None, t : t + 1] for v in (x, dt, B, C))
            y, state = scan_ref(*token, A_log, D, bias, state, c.ngroups, c.dt_limit)
            ys.append(y[0, 0])
            states.append(state[0])
        A = np.exp(-np.exp(A_log) * np.clip(np.logaddexp(0, dt + bias), *c.dt_limit))
        found.append((A, np.array(ys), np.array(states)))
        h = h + linear(f"{layer}.out_proj", normed(ys * silu(z), f"{layer}.gated_norm.weight", c.norm_groups))
    return found


@pytest.fixture(scope="module")
def by_hand(teacher, student):
    """What student and teacher do over the random tokens: a pair for each layer."""
    ids = np.random.default_rng(SEED).integers(0, CONFIG.vocab_size, TOKENS)
    floats = {name: tensor.numpy() for name, tensor in teacher[1].state_dict().items()}
    theirs = walk(
        CONFIG, floats, lambda name, x: x @ floats[f"{name}.weight"].T.astype(float),
        lambda ids: floats["embedding.weight"][ids], ids,
    )  # fmt: skip
    packed = {name: tensor.numpy() for name, tensor in load_student_tensors(student)[1].items()}

    def scaffold(name, x):
        parts = (packed[f"{name}.{part}"] for part in ("bits", "scale", "down", "down_scale", "up", "up_scale"))
        return REFERENCES["BinaryScaffoldMatMul"](x[None].astype(np.float32), *parts, planes=1)[0].astype(float)

    def embedded(ids):
        return packed["embedding.weight"][ids] * packed["embedding.scale"][ids, None]

    return list(zip(walk(CONFIG, packed, scaffold, embedded, ids), theirs, strict=True))


def rms_rel(ours, theirs):
    return np.sqrt(((ours - theirs) ** 2).sum() / (theirs**2).sum())


# In fp64 an activation may fall on the other side of a rounding tie: one code in 127 of one token, of an error that is
# itself about as large as the values.
ROUNDING = 2e-3


def check(figures, by_hand, of_state=ROUNDING):
    for layer, (ours, theirs) in zip(figures["layers"], by_hand, strict=True):
        for name, one, other in zip(("decay", "y", "state"), ours, theirs, strict=True):
            tolerance = of_state if name == "state" else ROUNDING
            assert layer[name]["rms_rel"] == pytest.approx(rms_rel(one, other), rel=tolerance), name
            assert layer[name]["max_abs"] == pytest.approx(np.abs(one - other).max(), rel=tolerance), name
        states = dict(zip(range(1, TOKENS + 1), zip(ours[2], theirs[2], strict=True), strict=True))
        begin = 1
        for last, error in layer["state"]["by_tokens"].items():
            pairs = [states[t] for t in range(begin, min(int(last), TOKENS) + 1)]
            expected = rms_rel(*(np.array(side) for side in zip(*pairs, strict=True)))
            assert error == pytest.approx(expected, rel=of_state), last
            begin = int(last) + 1
        assert list(layer["state"]["by_tokens"]) == ["1", "2", "4", "8", "16", "32", "64", "128"]


def test_errors_of_a_student_are_those_worked_by_hand(teacher, student, by_hand):
    seen = []
    found = compare_teacher(student, teacher[0], (), TOKENS, lambda done, total: seen.append((done, total)))
    assert seen == [(64, TOKENS), (TOKENS, TOKENS)]
    assert (found["kind"], found["tokens"], found["data"]) == ("student", TOKENS, [])
    assert all(layer["y"]["rms_rel"] > 0.05 for layer in found["layers"])  # there is something to measure
    check(found, by_hand)


def test_errors_of_a_bundle_are_those_of_its_student(teacher, student, by_hand, tmp_path):
    for state_dtype, of_state in (("fp32", ROUNDING), ("int8", 0.05)):  # an int8 state is off by 0.4 % itself
        compile_model(Request(student, "ort-cpu", tmp_path / state_dtype, state_dtype, verify=False, tokenizer=None))
        found = compare_teacher(tmp_path / state_dtype, teacher[0], (), TOKENS, lambda done, total: None)
        assert found["kind"] == "bundle"
        if state_dtype == "fp32":
            check(found, by_hand, of_state)
        else:
            of_fp32 = [rms_rel(ours[2], theirs[2]) for ours, theirs in by_hand]
            errors = [layer["state"]["rms_rel"] for layer in found["layers"]]
            assert errors == pytest.approx(of_fp32, rel=of_state) and errors != pytest.approx(of_fp32, rel=1e-5)


def test_a_student_that_is_its_teacher_has_no_error(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("dfssm.verify.teacher.load_student", lambda path: teacher[1])
    (tmp_path / "model.pt").write_bytes(b"PK")
    found = compare_teacher(tmp_path / "model.pt", teacher[0], (), 3, lambda done, total: None)
    for layer in found["layers"]:
        assert layer["decay"]["rms_rel"] == layer["y"]["rms_rel"] == layer["state"]["rms_rel"] == 0.0


def test_the_text_is_read_as_in_training(teacher, tmp_path):
    (tmp_path / "a.txt").write_text("hello world<|endoftext|>he will")
    (tmp_path / "b.jsonl").write_text('{"text": "hell"}\n')
    ids = text_ids([tmp_path], teacher[0], CONFIG, 4096)
    ends = np.flatnonzero(ids == END)
    assert len(ends) == 3 and ends[-1] == len(ids) - 1
    assert (text_ids([tmp_path], teacher[0], CONFIG, 5) == ids[:5]).all()
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(DfssmError, match="there is no text to read; give --data more"):
        text_ids([tmp_path / "a.txt"], teacher[0], CONFIG, 5)


def test_another_teacher_and_states_that_are_not_held_are_refused(teacher, student, tmp_path):
    other = tmp_path / "other"
    save_teacher(Mamba2LM(Mamba2Config(vocab_size=END + 1, d_model=32, n_layer=1, d_state=8, headdim=16)), other)
    with pytest.raises(DfssmError, match=r"265 tokens, 2 layers and states of 4 x 8 x 16, .*265 tokens, 1 layers"):
        compare_teacher(student, other, (), 4, lambda done, total: None)
    compile_model(Request(student, "ort-cpu", tmp_path / "late", "int8-deferred", verify=False))
    with pytest.raises(DfssmError, match="stores its states after every eighth token: give the student"):
        compare_teacher(tmp_path / "late", teacher[0], (), 4, lambda done, total: None)


def test_the_command_prints_a_table_and_json(teacher, student, tmp_path):
    def command(*arguments):
        return CliRunner().invoke(dfssm, ["compare", *map(str, arguments)])

    (tmp_path / "text.txt").write_text("hello world, he will say hello")
    told = command(student, "--teacher", teacher[0], "--tokens", 40, "--data", tmp_path / "text.txt")
    assert told.exit_code == 0, told.output
    found = json.loads(command(student, "--teacher", teacher[0], "--tokens", 9, "--json").stdout)
    assert len(found["layers"]) == 2 and found["tokens"] == 9
    lines = told.output.splitlines()
    assert lines[0].split()[1] == "tokens;" and lines[2].split()[:3] == ["layer", "A", "A,"]
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    for wrong in ((student,), (student, student, "--teacher", teacher[0]), (student, student, "--data", student)):
        assert command(*wrong).exit_code == 2
