"""dfcompile --emit triton-repository: the config against Triton's protocol buffers, and played as Triton plays it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import tritonclient
from google.protobuf import text_format

from dfssm.base import DfssmError
from dfssm.cli.main import dfcompile
from dfssm.cli.main import main as dfssm
from dfssm.compiler import triton
from dfssm.model.checkpoint import save_student
from dfssm.opset.tolerances import Tolerance, model_tolerance
from dfssm.runtime import Engine
from dfssm.targets import cuda, get_target, trt_options
from dfssm.targets.bundle import read_manifest

TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int64)": "TYPE_INT64",
}
NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT8": np.int8}


@pytest.fixture(scope="module")
def protocol():
    """Triton's model_config.proto, compiled; from its file, since the package around it wants gRPC."""
    path = Path(tritonclient.__path__[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_student(path, tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()})
    return path


def run(capsys, *arguments, command=dfcompile) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        command(list(map(str, arguments)))
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def emit(model, tmp_path, capsys):
    """emit(target, state_dtype): the folder of a repository."""

    def make(target, state_dtype="fp16", *options):
        if not (probe := get_target(target).probe()).usable:
            pytest.skip(probe.why_not)
        arguments = ("--target", target, "--state-dtype", state_dtype, "--emit", "triton-repository")
        status, out, err = run(capsys, model, *arguments, "-o", tmp_path / "repo", "--json", *options)
        assert status == 0, err
        assert json.loads(out)["output"] == str(tmp_path / "repo")
        return tmp_path / "repo"

    return make


class Server:
    """What Triton does with a model of its onnxruntime backend, as far as our config asks for it: a state is a buffer
    of its sequence, zero at first, read and written; sequences run as a batch.
    """

    def __init__(self, folder: Path, config):
        options = onnxruntime.SessionOptions()
        for library in config.model_operations.op_library_filename:
            options.register_custom_ops_library(library)  # as it stands there, from where the server was started
        model = folder / "1" / config.default_model_filename
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.states = config.sequence_batching.state

    def start(self):
        assert all(state.initial_state[0].zero_data for state in self.states)
        types = {state.input_name: NUMPY[_type(state)] for state in self.states}
        return {state.input_name: np.zeros(list(state.dims), types[state.input_name]) for state in self.states}

    def infer(self, ids, sequences):
        feeds = {name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
        outputs = ["logits", *(state.output_name for state in self.states)]
        logits, *written = self.session.run(outputs, {"input_ids": np.array(ids), **feeds})
        for state, values in zip(self.states, written, strict=True):
            for sequence, value in zip(sequences, values, strict=True):
                sequence[state.input_name][...] = value
        return logits


def _type(tensor) -> str:
    return tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name


@pytest.mark.parametrize(
    "target, state_dtype", [("ort-cpu", "fp32"), ("ort-cpu", "fp16"), ("ort-cpu", "int8"), ("onnx", "fp32")]
)
def test_sequences_are_those_of_the_engine(target, state_dtype, emit, protocol, monkeypatch):
    """Two sequences in one batch, a prompt and steps: as the bundle in it gives them, with our kernels to the bit."""
    folder = emit(target, state_dtype)
    config = text_format.Parse((folder / "dfssm/config.pbtxt").read_text(), protocol.ModelConfig())
    monkeypatch.chdir(folder)
    c = tiny.CONFIG
    bound = Tolerance(0, "exact") if get_target(target).EXACT else model_tolerance(c.n_layer, c.d_model)
    server, engine = Server(folder / "dfssm", config), Engine.load(folder / "dfssm/1", threads=1)
    ids = np.random.default_rng(0).integers(0, 200, (2, 9))
    sequences, states = [server.start(), server.start()], [engine.new_state(), engine.new_state()]
    for piece in np.split(ids, [5, 6, 7, 8], axis=1):
        logits = server.infer(piece, sequences)
        assert logits.shape == (2, 1, tiny.CONFIG.vocab_size)
        for row, state in enumerate(states):
            bound.check(logits[row], engine.prefill(piece[row], state))


@pytest.mark.parametrize("state_dtype", ["fp32", "fp16", "int8"])
def test_the_config_is_that_of_the_graph(state_dtype, emit, protocol):
    folder = emit("ort-cpu", state_dtype)
    assert sorted(path.name for path in folder.rglob("*") if path.parent == folder / "dfssm") == ["1", "config.pbtxt"]
    config = text_format.Parse((folder / "dfssm/config.pbtxt").read_text(), protocol.ModelConfig())
    assert (config.backend, config.max_batch_size, config.platform) == ("onnxruntime", triton.MAX_BATCH, "")
    assert config.default_model_filename in read_manifest(folder / "dfssm/1").files
    assert list(config.model_operations.op_library_filename) == ["dfssm/1/libdfssm_ort_cpu.so"]
    assert [group.kind for group in config.instance_group] == [protocol.ModelInstanceGroup.KIND_CPU]
    assert {key: value.string_value for key, value in config.parameters.items()}["execution_mode"] == "0"
    batching = config.sequence_batching
    assert batching.WhichOneof("strategy_choice") == "oldest" and batching.max_sequence_idle_microseconds >= 10**6
    check_states(config, get_target("ort-cpu").open_session(folder / "dfssm/1"))


def check_states(config, session):
    """Inputs and outputs are the graph's, each once: name, type, dims without the batch."""
    said = {t.name: (_type(t), list(t.dims)) for t in (*config.input, *config.output)}
    for state in config.sequence_batching.state:
        said[state.input_name] = said[state.output_name] = _type(state), list(state.dims)
        (zero,) = state.initial_state
        assert (_type(zero), list(zero.dims), zero.zero_data, bool(zero.name)) == (*said[state.input_name], True, True)
        assert state.use_same_buffer_for_input_output
    assert len(said) == len(config.input) + len(config.output) + 2 * len(config.sequence_batching.state)
    found = {t.name: (TYPES[t.type], t.shape[1:]) for t in (*session.get_inputs(), *session.get_outputs())}
    assert found.pop("input_ids") == ("TYPE_INT64", ["T"]) and said.pop("input_ids") == ("TYPE_INT64", [-1])
    assert found.pop("logits")[1][1:] == said.pop("logits")[1][1:] == [tiny.CONFIG.vocab_size]
    assert said == found


def test_the_config_of_an_engine(protocol, cpu_target, tmp_path):
    engine = {"profiles": [{"max": [16, 1]}, {"max": [16, 512]}]}
    target = get_target("trt")
    text = triton.config_text("tensorrt", target, tiny.CONFIG, "fp16", engine)
    config = text_format.Parse(text, protocol.ModelConfig())
    assert (config.backend, config.max_batch_size, config.default_model_filename) == ("tensorrt", 16, "model.engine")
    (group,) = config.instance_group
    assert group.kind == protocol.ModelInstanceGroup.KIND_GPU and list(group.profile) == ["0", "1"]
    assert not config.model_operations.op_library_filename and not config.parameters
    bundle = tiny.write_bundle(tmp_path / "b", target="onnx", state_dtype="fp16", tokenizer=False)
    check_states(config, get_target("onnx").open_session(bundle))


def test_only_engines_of_tensorrt_are_for_triton(model, tmp_path, capsys, monkeypatch):
    arguments = (model, "--target", "trt", "--emit", "triton-repository", "-o", tmp_path / "r")
    status, out, err = run(capsys, *arguments, "--builder", "tensorrt-rtx", "--lowering", "native")
    assert status == 1 and err.count("\n") == 1 and not out and not (tmp_path / "r").exists()
    assert "Triton runs engines of builder tensorrt, this one would be of tensorrt-rtx: compile with --builder" in err


def test_an_engine_for_triton_gives_the_last_tokens_logits(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trt_options, "_builder", lambda wanted, no_gpu: ("tensorrt", wanted))
    monkeypatch.setattr(cuda, "devices", lambda: ([cuda.Device("GPU", 86)], ""))
    with pytest.raises(DfssmError, match="logits of the last token only: compile with --max-logits 1"):
        get_target("trt").triton_backend()
    assert get_target("trt").triton_backend(max_logits=1) == "tensorrt"


def test_the_bundle_in_it_is_verified_and_replaced(emit, model, capsys):
    folder = emit("onnx")
    status, out, _ = run(capsys, "verify", folder / "dfssm/1", command=dfssm)
    assert status == 0 and "passed" in out
    before = (folder / "dfssm/1/manifest.json").read_bytes()
    emit("onnx", "int8", "--force")
    assert (folder / "dfssm/1/manifest.json").read_bytes() != before
    (folder / "dfssm/1/manifest.json").unlink()
    arguments = ("--target", "onnx", "--emit", "triton-repository", "-o", folder, "--force")
    status, _, err = run(capsys, model, *arguments)
    assert status == 1 and "exists and is not a bundle at dfssm/1, so --force does not replace it" in err
