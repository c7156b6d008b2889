"""Bundles of target trt in libdfssm_runtime: it compiles against NVIDIA's headers, and runs a toy in their place."""

import os

import pytest
from examples.test_trt_cpp import cuda_headers, expected
from native.runtime_library import ROOT, drive, ids_of, run
from plugins_trt import adapter

from dfssm.targets.bundle import Manifest, file_entry

pytestmark = pytest.mark.xdist_group("native")

# The toy's states, as a config gives them: conv_state f32[3,1], ssm_state half[1,1,1].
SIZES = dict(vocab_size=97, d_model=1, n_layer=1, d_state=1, headdim=1, expand=1, ngroups=1, d_conv=2)
GREEDY = "0 0 0 0 -"


def test_it_compiles_against_the_headers_of_tensorrt_and_cuda():
    tensorrt = adapter.headers()[adapter.TRT_HEADER] or pytest.skip(f"no {adapter.TRT_HEADER} here")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-DDFSSM_TENSORRT"]
    folders = [f"-I{ROOT / 'native/include'}", "-isystem", tensorrt, "-isystem", cuda_headers()]
    run("g++", *flags, *folders, ROOT / "native/src/backend_tensorrt.cpp")


def write_bundle(folder, engine: str = "97 4 2 4", **said):
    folder.mkdir()
    (folder / "model.engine").write_text(engine)
    (folder / "libdfssm_trt.so").write_text("plugins")
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    about = {"lowering": "plugin", "embed_plugins": False, "version_compatible": False} | said
    manifest = Manifest("trt", SIZES, "fp16", 0, files, engine=about, machine=os.uname().machine)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def prompt(length: int) -> list[int]:
    return [(13 * i + 5) % 97 for i in range(length)]


def prefill(length: int) -> str:
    return " ".join(map(str, ["prefill", *prompt(length)]))


@pytest.mark.parametrize("engine", ["97 1 1 3", "97 4 2 4", "97 4 1 4"], ids=["one token", "TensorRT", "TensorRT-RTX"])
def test_it_decodes(engine, tmp_path):
    """Prompts of one token, of a part of a run, a whole one, and of runs whose last has one token."""
    bundle, lengths = write_bundle(tmp_path / "bundle", engine), (1, 3, 4, 5, 9)
    lines = sum(([prefill(n), f"generate 12 {GREEDY}", "reset"] for n in lengths), [])
    answers = drive(f"open {bundle} 1", *lines)
    assert [ids_of(answer) for answer in answers[2::3]] == [expected(prompt(n), 12, 97) for n in lengths]


def test_states_come_from_the_device_and_go_back(tmp_path):
    """A clone and a file have what the device has; what is copied into a state is what it then runs from."""
    bundle, file = write_bundle(tmp_path / "bundle"), tmp_path / "state"
    go = f"generate 5 {GREEDY}"
    one, other = prefill(6), prefill(2)
    lines = [one, go, "keep", f"save {file}", go, "back", go, "reset", other, go, f"load {file}", go, "about"]
    answers = drive(f"open {bundle} 1", *lines)
    made = expected(prompt(6), 10, 97)
    assert ids_of(answers[2]) == made[:5]
    assert ids_of(answers[5]) == ids_of(answers[7]) == ids_of(answers[12]) == made[5:]
    assert ids_of(answers[10]) == expected(prompt(2), 5, 97) and answers[13].endswith(" 97 16")


def test_an_engine_runs_only_if_it_is_trusted_or_ones_own(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    environment = {"DFSSM_TRT_LIBRARY": str(bundle / "libdfssm_trt.so"), "XDG_STATE_HOME": str(tmp_path / "state")}
    (refused,) = drive(f"open {bundle}", **environment)
    assert refused.startswith(f"error 3 {bundle / 'model.engine'} is a program")
    records = tmp_path / "state/dfssm/engines"
    records.parent.mkdir(parents=True)
    records.write_text(f"{'0' * 64}\n{file_entry(bundle / 'model.engine')['sha256']}\n")
    assert drive(f"open {bundle}", **environment) == [""]


@pytest.mark.parametrize(
    "engine, said, words",
    [
        ("", {}, "2 TensorRT cannot load"),
        ("96 4 2 4", {}, "its manifest and its graph differ in vocab_size"),
        ("97 4 2 4", {"lowering": 3}, "'lowering' is missing or no text"),
    ],
)
def test_another_engine_is_refused(engine, said, words, tmp_path):
    (answer,) = drive(f"open {write_bundle(tmp_path / 'bundle', engine, **said)} 1")
    assert answer.startswith("error 2 ") and words in answer
