"""The engine over a device, its states there and its decoding from a recorded graph, against the engine on the CPU."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from fake_device import BINDINGS, Allocation, FakeConfig, FakeCuda, FakeEngine, Strategy

from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets.trt_build import Profile
from dfssm.targets.trt_memory import memory

PROMPT = np.random.default_rng(2).integers(0, 256, 11)


@pytest.fixture(params=[*BINDINGS, "rtx", "native"])
def device(request, engine):
    if request.param in BINDINGS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return over_fake(engine, binding=request.param)
    return over_fake(engine, in_place=request.param != "native", rtx=True)


def over_fake(engine, in_place=True, current=0, **kind):
    """`engine` over the fake device, for up to 3 rows and 5 tokens a run."""
    cuda = FakeCuda(current=current)
    fake = FakeEngine(cuda, engine.backend.session, max_batch=3, max_tokens=5, **kind)
    return Engine(engine.folder, engine.manifest, TensorRTBackend(fake, cuda, in_place), threads=1)


def same(a, b):
    assert a.tokens.tolist() == b.tokens.tolist() and a.logits.tolist() == b.logits.tolist()
    for name, tensor in a.tensors.items():
        assert np.array_equal(tensor, b.tensors[name]), name


@pytest.fixture
def in_fives(engine, monkeypatch):
    """The engine on the CPU reads prompts in the pieces the device does: a narrow state is rounded after each."""
    monkeypatch.setattr(engine.backend, "max_tokens", 5)


def test_steps_are_those_of_the_cpu(engine, device):
    ours, theirs = device.new_state(), engine.new_state()
    for token in PROMPT:
        assert device.step([token], ours).tolist() == engine.step([token], theirs).tolist()
    same(ours, theirs)


def test_decoding_replays_a_graph(device):
    state = device.new_state()
    for token in PROMPT:
        device.step([token], state)
    assert device.backend.cuda.launches == len(PROMPT) - 1  # the first run is not from a graph


@pytest.mark.parametrize("binding", BINDINGS)
def test_whether_states_are_updated_in_place_is_tried(engine, binding):
    """Where TensorRT spoils a state that is read and written in one buffer, there are two, and that is said once."""
    with warnings.catch_warnings(record=True) as said:
        device = over_fake(engine, binding=binding)
        state = device.new_state(2)
        device.prefill([[1, 2, 3]] * 2, state)
        device.step([4, 5], state)
    assert device.backend.in_place == (binding != "overwritten")
    assert [warning.category for warning in said] == [RuntimeWarning] * (not device.backend.in_place)
    held = sum(map(len, device.backend.cuda.memory.values()))
    rest = state.logits.nbytes + 2 * 5 * 8 + 8 + 4 * 8  # logits, and ids of two rows; places of one token and of four
    assert held == rest + state.nbytes * (1 if device.backend.in_place else 2)


def test_states_of_an_engine_without_plugins_are_apart_and_nothing_is_tried(engine):
    device = over_fake(engine, in_place=False)
    assert not device.backend.in_place and not device.backend._step_contexts


def test_a_prompt_is_read_in_pieces_of_the_profile(engine, monkeypatch):
    """As many tokens a run as the engine was built for, whatever the CPU's pieces are."""
    cuda = FakeCuda()
    fake = FakeEngine(cuda, engine.backend.session, max_tokens=100)
    device = Engine(engine.folder, engine.manifest, TensorRTBackend(fake, cuda), threads=1)
    runs = []
    monkeypatch.setattr(
        device.backend.prompt_context, "set_input_shape", lambda name, shape: runs.append((name, shape))
    )
    monkeypatch.setattr(device.backend.prompt_context, "execute_async_v3", lambda stream: True)
    device.prefill(np.arange(250) % 200, device.new_state())
    assert [shape for name, shape in runs if name == "input_ids"] == [(1, 100), (1, 100), (1, 50)]


def test_an_engine_that_cannot_be_recorded(engine):
    device = over_fake(engine, rtx=True)
    device.backend.engine.capturable = False
    ours, theirs = device.new_state(), engine.new_state()
    for token in PROMPT[:4]:
        assert device.step([token], ours).tolist() == engine.step([token], theirs).tolist()
    assert device.backend.cuda.launches == 0


def test_states_of_other_sizes_take_turns(engine, device):
    """Each size of batch has a context of its own: a recorded step does not see what another was set to."""
    states = [(device.new_state(batch), engine.new_state(batch)) for batch in (1, 3)]
    for token in PROMPT[:4]:
        for ours, theirs in states:
            ids = [token] * ours.batch
            assert device.step(ids, ours).tolist() == engine.step(ids, theirs).tolist()


def test_threads_share_the_device(device):
    alone, states = device.new_state(), [device.new_state() for _ in range(4)]
    expected = [device.step([token], alone) for token in PROMPT]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda state: [device.step([token], state) for token in PROMPT], states))
    assert np.array_equal(found, [expected] * 4)


def test_a_prompt_and_steps(engine, device, in_fives):
    ours, theirs = device.new_state(3), engine.new_state(3)
    rows = PROMPT[:9].reshape(3, 3)
    assert device.prefill(rows, ours).tolist() == engine.prefill(rows, theirs).tolist()
    for _ in range(3):
        assert device.step([5, 6, 7], ours).tolist() == engine.step([5, 6, 7], theirs).tolist()
    same(ours, theirs)


def test_a_prompt_longer_than_the_profile(engine, device, in_fives):
    ours, theirs = device.new_state(), engine.new_state()
    assert device.prefill(PROMPT, ours).tolist() == engine.prefill(PROMPT, theirs).tolist()
    same(ours, theirs)


def test_rows_of_unequal_lengths(engine, device, in_fives):
    rows = [PROMPT[:3], PROMPT[3:10], PROMPT[10:]]
    ours, theirs = device.new_state(3), engine.new_state(3)
    device.step([1, 2, 3], ours)
    engine.step([1, 2, 3], theirs)
    assert device.prefill(rows, ours).tolist() == engine.prefill(rows, theirs).tolist()
    assert device.step([1, 2, 3], ours).tolist() == engine.step([1, 2, 3], theirs).tolist()
    same(ours, theirs)


def test_rows_of_unequal_lengths_run_together_as_far_as_they_are_alike(engine, monkeypatch):
    """Neighbours with pieces of one length; what the device copies grows with the rows, not with their square."""
    runs, moved = [], []
    for count in (4, 8):
        fake = FakeEngine(cuda := FakeCuda(), engine.backend.session, max_batch=8, max_tokens=5, prompt_rows=8)
        device = Engine(engine.folder, engine.manifest, TensorRTBackend(fake, cuda), threads=1)
        context = device.backend.prompt_context
        execute = context.execute_async_v3
        shapes = []

        def run(stream, shapes=shapes, context=context, execute=execute):
            shapes.append(context.shapes["input_ids"])
            return execute(stream)

        monkeypatch.setattr(context, "execute_async_v3", run)
        state = device.new_state(count)
        rows = [np.arange(9) + row for row in range(count // 2)] + [np.arange(12) + row for row in range(count // 2)]
        before = sum(cuda.copied.values())
        device.prefill(rows, state)
        moved.append(sum(cuda.copied.values()) - before - state.nbytes)  # they go to the device once, when bound
        runs.append(shapes)
    assert runs[1] == [(8, 5), (4, 4), (4, 5), (4, 2)] and len(runs[0]) == 4
    assert moved[0] < moved[1] <= 2 * moved[0], "ids and logits"


def test_rows_of_unequal_lengths_move_no_states(engine, monkeypatch):
    device = over_fake(engine)
    state = device.new_state(3)
    device.step([1, 2, 3], state)
    moved = []
    for name in ("copy", "to_host", "to_device"):
        monkeypatch.setattr(device.backend.cuda, name, lambda *arguments: moved.append(arguments))
    device.prefill([PROMPT[:3], PROMPT[3:10], PROMPT[10:]], state)
    arrays = [array for arguments in moved for array in arguments if isinstance(array, np.ndarray)]
    assert moved and len(arrays) == len(moved)  # ids and logits, between host and device
    assert max(array.nbytes for array in arrays) <= state.logits[0].nbytes


def test_a_row_and_its_batch_see_each_other(engine, device):
    """What runs on a row, or is copied to it, changes the batch; what runs on the batch changes the row."""
    ours, theirs = device.new_state(2), engine.new_state(2)
    for run, state in ((device, ours), (engine, theirs)):
        run.step([1, 2], state)
        row, start = state.row(1), state.row(0).clone()
        run.step([3], row)
        run.step([4, 5], state)
        run.step([6], row)
        state.row(0).copy_from(start)
        run.step([7, 8], state)
        row.reset()
    same(ours, theirs)
    assert device.step([1, 2], ours).tolist() == engine.step([1, 2], theirs).tolist()


def test_logits_of_all_tokens_take_few_runs(engine, device, monkeypatch):
    """Of three rows, two at a time, four tokens at a time; an engine of one token a call takes a run for each."""
    ids = np.concatenate([PROMPT, PROMPT[:10]]).reshape(3, 7)
    ours, theirs, runs = device.new_state(3), engine.new_state(3), []
    context = device.backend.prompt_context
    execute = context.execute_async_v3
    monkeypatch.setattr(context, "execute_async_v3", lambda stream: runs.append(context.shapes) or execute(stream))
    monkeypatch.setattr(engine.backend, "max_logits", 4)
    device.step([1, 2, 3], ours), engine.step([1, 2, 3], theirs)  # logits that lie on the device before
    assert device.logits(ids, ours).tolist() == engine.logits(ids, theirs).tolist()
    assert len(runs) == 4
    same(ours, theirs)
    for token in (4, 5):
        assert device.step([token] * 3, ours).tolist() == engine.step([token] * 3, theirs).tolist()
    assert device.logits(PROMPT[:1]).tolist() == engine.logits(PROMPT[:1]).tolist()


def test_an_engine_of_one_token_a_call(engine):
    """As native ones: a prompt, and the logits of all its tokens, are steps."""
    cuda = FakeCuda(most_largest=0)
    fake = FakeEngine(cuda, engine.backend.session, max_batch=3, prompts=False)
    device = Engine(engine.folder, engine.manifest, TensorRTBackend(fake, cuda, in_place=False), threads=1)
    ours, theirs = device.new_state(), engine.new_state()
    stepped = np.stack([engine.step([token], theirs)[0] for token in PROMPT])
    assert device.logits(PROMPT)[0].tolist() == stepped.tolist()
    assert device.prefill(PROMPT, ours).tolist() == [stepped[-1].tolist()]
    same(ours, theirs)
    assert device.generate([1, 2], max_tokens=3, eos=()).text == engine.generate([1, 2], max_tokens=3, eos=()).text


def test_a_state_is_copied_reset_saved_and_loaded(engine, device, tmp_path):
    ours, theirs = device.new_state(), engine.new_state()
    for run, state in ((device, ours), (engine, theirs)):
        run.step([1], state)
    kept = ours.clone()
    device.step([2], ours)
    ours.copy_from(kept)
    ours.save(tmp_path / "s")
    loaded = device.load_state(tmp_path / "s")
    for token in (3, 4, 5):
        expected = engine.step([token], theirs).tolist()
        assert device.step([token], ours).tolist() == device.step([token], loaded).tolist() == expected
    ours.reset()
    assert device.step([9], ours).tolist() == engine.step([9], engine.new_state()).tolist()


def test_a_state_goes_from_one_engine_to_the_other(engine, device):
    state, alone = device.new_state(), engine.new_state()
    for run in (device, engine, device):
        run.step([3], state)
        engine.step([3], alone)
    same(state, alone)


def test_a_batch_that_the_engine_was_not_built_for(device):
    with pytest.raises(DfssmError, match="4 rows, the engine was built for 3: compile with --max-batch 4"):
        device.step([1, 1, 1, 1], device.new_state(4))


@pytest.mark.parametrize(
    "more, without, named",
    [
        ("ssm_recent.0", "", "ssm_recent_out.0"),  # a state that nothing makes anew
        ("token", "", "token"),
        ("", "ssm_state_out.1", "ssm_state_out.1"),
    ],
)
def test_an_engine_whose_states_have_another_form_is_refused(engine, more, without, named):
    cuda = FakeCuda()
    fake = FakeEngine(cuda, engine.backend.session)
    fake.tensors = {name: tensor for name, tensor in fake.tensors.items() if name != without}
    fake.tensors |= {more: fake.tensors["conv_state.0"]} if more else {}
    fake.num_io_tensors = len(fake.tensors)
    with pytest.raises(DfssmError, match=rf"not those of a step, see {named}: compile the model again, or use"):
        TensorRTBackend(fake, cuda)


def test_an_engine_with_sizes_or_types_that_are_unknown_is_refused(engine, monkeypatch):
    cuda = FakeCuda()
    fake = FakeEngine(cuda, engine.backend.session)
    shape = fake.get_tensor_shape
    monkeypatch.setattr(fake, "get_tensor_shape", lambda name: (-1, 8, -1) if name == "conv_state.0" else shape(name))
    with pytest.raises(DfssmError, match=r"not those of a step, see conv_state.0: compile"):
        TensorRTBackend(fake, cuda)
    monkeypatch.setattr(fake, "get_tensor_dtype", lambda name: SimpleNamespace(name="FP8"))
    with pytest.raises(DfssmError, match=r"conv_state.0 of the engine is FP8, which this dfssm does not know: compile"):
        TensorRTBackend(fake, cuda)


def test_memory_is_given_back(device):
    state = device.new_state()
    device.step([1], state)
    memory = device.backend.cuda.memory
    assert memory
    state.pool = None
    assert len(memory) == hasattr(device.backend.engine, "device_memory_size_v2")  # what contexts share
    device.backend = state.engine = None
    assert not memory


def test_a_program_that_has_chosen_another_device(engine):
    """Threads of a program begin on device 0, unless it has told them otherwise: torch.cuda.set_device(1)."""
    device = over_fake(engine, current=1, rtx=True)
    states = ours, theirs = device.new_state(2), engine.new_state(2)
    for run_by, state in zip((device, engine), states, strict=True):
        run_by.prefill([PROMPT[:5], PROMPT[:3]], state)
        for _ in range(3):
            run_by.step([4, 5], state)
        run_by.logits([PROMPT[:3]] * 2, state)
    same(ours, theirs)


def test_slots_made_while_another_thread_records(engine, monkeypatch):
    """Their memory is zeroed in the stream, which would become a part of the graph: they wait."""
    device = over_fake(engine)
    state, made = device.new_state(), []
    context = device.backend.step_context(1)
    execute = context.execute_async_v3

    def run(stream):
        if device.backend.cuda.recording:
            other = Thread(target=lambda: made.append(device.slots(2)))
            other.start()
            other.join(0.1)
            waiting.append(other)
        return execute(stream)

    waiting = []
    monkeypatch.setattr(context, "execute_async_v3", run)
    device.step([1], state)
    (other,) = waiting
    other.join()
    assert len(made) == 1


def test_contexts_share_the_memory_between_layers(engine):
    """A context for prompts and one for each batch size: they run in turn, in one memory."""
    device = over_fake(engine, rtx=True)
    for batch in (1, 2, 3):
        state = device.new_state(batch)
        device.prefill([[1, 2, 3]] * batch, state)
        device.step([4] * batch, state)
    contexts = [device.backend.prompt_context, *device.backend._step_contexts.values()]
    assert len(contexts) == 4 and len({context.activations for context in contexts}) == 1


def test_it_takes_the_memory_that_dfcompile_tells_of(engine):
    cuda = FakeCuda()
    fake = FakeEngine(cuda, engine.backend.session, max_batch=3, max_tokens=5, prompt_rows=2, max_logits=4, rtx=True)
    device = Engine(engine.folder, engine.manifest, TensorRTBackend(fake, cuda), threads=1)
    state = device.new_state(3)
    device.prefill([range(9)] * 3, state)
    device.logits([range(9)] * 3, state)
    device.step([1, 2, 3], state)
    built = {"weights": 0, "activations": fake.device_memory_size_v2}
    told = memory(built, engine.folder / "model.onnx", (Profile(3, 1, 1, 1), Profile(2, 5, 5, 4)))
    ids_and_places = 8 * (2 * 5 + 1 + 4)
    assert told["states"] == state.nbytes
    assert sum(map(len, cuda.memory.values())) == told["total"] + ids_and_places


def test_the_stand_in_has_the_names_of_tensorrt_rtx(engine):
    trt = pytest.importorskip("tensorrt_rtx")
    fake = over_fake(engine, rtx=True).backend
    for ours, real in ((fake.engine, trt.ICudaEngine), (fake.prompt_context, trt.IExecutionContext)):
        names = [name for name in dir(ours) if callable(getattr(ours, name)) and not name.startswith("_")]
        assert len(names) > 3 and [name for name in names if not hasattr(real, name)] == []
    assert [name for name in dir(FakeConfig()) if name[0] != "_" and not hasattr(trt.IRuntimeConfig, name)] == [
        "allocation"
    ]
    assert set(Allocation.__members__) == set(trt.ExecutionContextAllocationStrategy.__members__)
    assert hasattr(trt.ICudaEngine, "device_memory_size_v2")
    assert set(Strategy.__members__) <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)
    assert "runtime_config:" in trt.ICudaEngine.create_execution_context.__doc__


def test_without_a_device_the_error_is_one_line():
    cuda = pytest.importorskip("dfssm.runtime.cuda")
    pytest.importorskip("cuda.bindings.runtime")
    try:
        cuda.Cuda()
    except DfssmError as error:
        assert "\n" not in str(error) and ("driver" in str(error) or "GPU" in str(error))
    else:
        pytest.skip("there is a CUDA device")
