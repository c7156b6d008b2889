"""What makes a target: tests that any module of `dfssm.targets` passes, and that nothing else knows one by its name."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import student_ref
import tiny

from dfssm.base import DfssmError
from dfssm.cli.compile import command
from dfssm.opset.layouts import LAYOUTS
from dfssm.opset.schema import STATE_DTYPES
from dfssm.runtime.ort import OrtBackend
from dfssm.runtime.state import State
from dfssm.targets import TARGETS, EngineTarget, Target, get_target, has_engine
from dfssm.targets.bundle import MODEL, open_bundle

ROOT = Path(__file__).parents[2]
PARTS = [path.name for path in (ROOT / "dfssm").iterdir() if path.is_symlink()]


@pytest.fixture(params=TARGETS)
def target(request) -> Target:
    return get_target(request.param)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """bundle(target): the folder of a bundle of the tiny student, made once; skipped where the target cannot build."""
    folders = {}

    def make(target: Target) -> Path:
        if not (probe := target.probe()).usable:
            pytest.skip(probe.why_not)
        if target.NAME not in folders:
            folder = tmp_path_factory.mktemp("conformance") / target.NAME
            folders[target.NAME] = tiny.write_bundle(folder, target=target.NAME, tokenizer=False)
        return folders[target.NAME]

    return make


def protocol_of(target: Target) -> type:
    return EngineTarget if has_engine(target) else Target


def test_it_has_every_member_with_the_types_and_parameters_of_the_protocol(target):
    kinds = {"str": str, "int": int, "bool": bool}
    members = {
        name: kind
        for base in protocol_of(target).__mro__
        for name, kind in vars(base).get("__annotations__", {}).items()
    }
    assert len(members) >= 11
    for name, kind in members.items():
        assert isinstance(getattr(target, name), kinds.get(kind, tuple)), name
    methods = [name for name, value in inspect.getmembers(protocol_of(target), inspect.isfunction) if name[0] != "_"]
    assert len(methods) >= 5
    for name in methods:
        _, *wanted = inspect.signature(getattr(protocol_of(target), name)).parameters.values()
        found = inspect.signature(getattr(target, name)).parameters.values()
        assert [(p.name, p.kind, p.default is p.empty) for p in found] == [
            (p.name, p.kind, p.default is p.empty) for p in wanted
        ], name


def test_what_it_says_of_itself_means_something(target):
    assert get_target(target.NAME) is target and target.SUMMARY and not target.SUMMARY.endswith(".")
    assert set(target.LAYOUTS) <= set(LAYOUTS) and target.DEFAULT_STATE_DTYPE in STATE_DTYPES
    assert target.layout(**{option.name: option.default for option in target.OPTIONS}) in target.LAYOUTS
    assert target.WEIGHTS in target.FILES and target.VERIFY_STEPS >= 1
    assert target.IS_ENGINE != (MODEL in target.FILES)
    runners = [get_target(name) for name in target.VERIFIED_BY]
    assert runners and not any(runner.IS_ENGINE for runner in runners), "a graph verifies it"
    assert target.IS_ENGINE or runners == [target]
    assert any(runner.probe().usable for runner in runners), "there is one on every machine"


def test_its_probe_names_it_and_says_why_not(target):
    probe = target.probe()
    assert probe.target == target.NAME and probe.uses and probe.usable == (probe.why_not == "")
    for text in (probe.why_not, target.why_not_run()):
        assert "\n" not in text


def test_its_options_are_flags_that_take_their_defaults(target):
    flags = {name: parameter for parameter in command.params for name in parameter.opts}
    others = {option.name for name in TARGETS if name != target.NAME for option in get_target(name).OPTIONS}
    for option in target.OPTIONS:
        parameter = flags[option.flag]
        assert parameter.name == option.name and parameter.help.startswith(f"{target.NAME}: {option.help}")
        assert parameter.is_flag == (option.default is False) and option.name not in others
    assert target.probe(**{option.name: option.default for option in target.OPTIONS}) == target.probe()


def test_importing_it_takes_nothing_heavy(target):
    code = (
        "import sys; from dfssm.targets import get_target; get_target(sys.argv[1])\n"
        "print({'torch', 'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'tensorrt_rtx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, target.NAME], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_lowering_keeps_the_names_and_whole_dtypes(target):
    tensors = tiny.tensors(student_ref.config("plain"))
    for layout in target.LAYOUTS:
        lowered = target.lower(tensors, layout)
        assert list(lowered) == list(tensors)
        for name, tensor in lowered.items():
            assert tensor.shape == np.asarray(tensor).shape and tensor.dtype == tensors[name].dtype


def test_what_it_builds_is_a_bundle(target, bundle):
    folder = bundle(target)
    manifest = open_bundle(folder).manifest
    assert set(target.FILES) <= set(manifest.files) and manifest.weights == target.WEIGHTS
    assert manifest.layout == target.layout() and bool(manifest.engine) == target.IS_ENGINE


def test_a_session_runs_the_graph_or_the_refusal_is_one_line(target, bundle):
    folder = bundle(target)
    if target.IS_ENGINE:
        with pytest.raises(DfssmError) as caught:
            target.open_session(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return
    session = target.open_session(folder, threads=1)
    assert isinstance(session, onnxruntime.InferenceSession)
    names = {value.name for value in session.get_inputs()}
    assert {"input_ids", "conv_state.0", "ssm_state.0"} <= names


@pytest.mark.parametrize("target", [get_target(name) for name in TARGETS if get_target(name).IN_PLACE])
def test_states_in_place_are_those_that_are_not(target, bundle):
    session = target.open_session(bundle(target), threads=1)
    apart, together = (OrtBackend(session, in_place) for in_place in (False, True))
    states = [State.zeros("m", apart.layout, apart.vocab_size, 2) for _ in range(2)]
    for backend, state in zip((apart, together), states, strict=True):
        pool = backend.bind(state)
        for token in range(4):
            pool.run(np.array([[token], [9 - token]]), 0, lambda: None)
    assert np.array_equal(states[0].logits, states[1].logits)
    for name, tensor in states[0].tensors.items():
        assert np.array_equal(tensor, states[1].tensors[name]), name


@pytest.mark.parametrize(
    "part", sorted({path.name for path in (ROOT / "dfssm").iterdir() if path.is_symlink()} - {"targets"})
)
def test_nothing_outside_compares_with_a_targets_name(part):
    names = set(TARGETS) - {"onnx"}  # which is a package, too
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                assert not words & names, f"{path.relative_to(ROOT)}:{node.lineno}"
