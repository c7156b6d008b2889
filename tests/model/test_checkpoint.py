"""model.pt and .safetensors: what was written is read, and every fault is one line that names it."""

import dataclasses
import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dfssm.base import DfssmError
from dfssm.model.checkpoint import check_tensors, load_student_tensors, save_student, tensor_specs
from dfssm.model.config import DFSSMConfig
from dfssm.model.convert import init_student
from dfssm.model.student import DFSSMLM, load_student

CONFIG = DFSSMConfig(vocab_size=48, d_model=32, n_layer=2, d_state=8, headdim=16, rank=2)
SUFFIXES = ("model.pt", "model.safetensors")


@pytest.fixture(scope="module")
def tensors():
    return init_student(CONFIG, seed=1)[1]


def raw_save(path, tensors, format="dfssm", version=1, config=None):
    """What a wrong or foreign program might have written."""
    config = CONFIG.to_dict() if config is None else config
    if path.suffix == ".pt":
        torch.save({"format": format, "version": version, "config": config, "tensors": tensors}, path)
    else:
        save_file(tensors, path, {"format": format, "version": str(version), "config": json.dumps(config)})
    return path


def refused(path) -> str:
    with pytest.raises(DfssmError) as caught:
        load_student_tensors(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"rank": 0}, {"planes": 2}])
def test_round_trip(tmp_path, name, change):
    config, tensors = init_student(DFSSMConfig(**CONFIG.to_dict() | change), seed=2)
    save_student(tmp_path / name, config, tensors)
    loaded_config, loaded = load_student_tensors(tmp_path / name)
    assert loaded_config == config
    assert list(loaded) == list(tensor_specs(config)) or name.endswith("safetensors")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", SUFFIXES)
def test_one_student_is_one_file(tmp_path, tensors, name):
    contents = set()
    for _ in range(10):  # safetensors orders the metadata at random: six orders of three keys
        save_student(tmp_path / name, CONFIG, tensors)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("name", SUFFIXES)
def test_only_what_fp16_holds_exactly_is_stored_as_fp16(tmp_path, tensors, name):
    fine = tensors["layers.0.gated_norm.weight"] + 2.0**-20  # needs more digits than fp16 has
    tensors = tensors | {"layers.0.gated_norm.weight": fine}
    path = tmp_path / name
    save_student(path, CONFIG, tensors)
    stored = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)["tensors"]
    assert stored["layers.0.conv.weight"].dtype == torch.float16
    assert stored["layers.0.gated_norm.weight"].dtype == torch.float32
    loaded = load_student_tensors(path)[1]
    assert all(loaded[key].dtype == tensors[key].dtype for key in tensors)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_specs_are_the_buffers_of_the_packed_student():
    for change in ({}, {"tie_embeddings": False, "planes": 3}, {"rank": 0, "ngroups": 2}):
        config = DFSSMConfig(**CONFIG.to_dict() | change)
        held = DFSSMLM(config, packed=True).state_dict()
        assert {k: (tuple(v.shape), v.dtype) for k, v in held.items()} == tensor_specs(config)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("key", ["norm_f.weight", "layers.0.in_proj.bits"])
def test_what_torch_saves_of_a_tensor(tmp_path, tensors, key):
    """A view or a parameter is read as its numbers; a tensor without them is refused."""
    path, tensor = tmp_path / "model.pt", tensors[key]
    views = [torch.cat([torch.zeros_like(tensor), tensor])[len(tensor) :], tensor.t().contiguous().t()]
    if tensor.is_floating_point():
        views += [torch.nn.Parameter(tensor), tensor.half().requires_grad_()]
    for view in views:
        loaded = load_student_tensors(raw_save(path, tensors | {key: view}))[1][key]
        assert (loaded.numpy() == view.detach().float().numpy()).all()
    for odd in (tensor.to_sparse(), tensor.to("meta"), torch.nested.as_nested_tensor([tensor])):
        message = refused(raw_save(path, tensors | {key: odd}))
        assert f"{key} is a Tensor; expected a tensor of {tensor.dtype}, dense" in message


@pytest.mark.parametrize("name", SUFFIXES)
def test_missing_extra_misshapen_and_mistyped_tensors_are_named(tmp_path, tensors, name):
    path = tmp_path / name
    key = "layers.1.out_proj.up"
    without = {k: v for k, v in tensors.items() if k != key}
    assert f"{key} is missing" in refused(raw_save(path, without))
    extra = "layers.2.norm.weight"
    assert extra in refused(raw_save(path, tensors | {extra: torch.ones(32)}))
    message = refused(raw_save(path, tensors | {key: tensors[key][:-1].clone()}))
    assert f"{key} has shape [31, 2]" in message and "[32, 2]" in message
    assert f"{key} is torch.float32" in refused(raw_save(path, tensors | {key: tensors[key].float()}))
    nan = tensors["norm_f.weight"].clone()
    nan[3] = float("nan")
    assert "norm_f.weight holds NaN" in refused(raw_save(path, tensors | {"norm_f.weight": nan}))


@pytest.mark.parametrize("name", SUFFIXES)
def test_wrong_format_version_and_configuration_are_named(tmp_path, tensors, name):
    path = tmp_path / name
    assert "not a DF-SSM student" in refused(raw_save(path, tensors, format="other"))
    assert "format version is 3" in refused(raw_save(path, tensors, version=3))
    assert "'rank_'" in refused(raw_save(path, tensors, config=CONFIG.to_dict() | {"rank_": 1}))
    assert "headdim is 7" in refused(raw_save(path, tensors, config=CONFIG.to_dict() | {"headdim": 7}))
    assert "config" in refused(raw_save(path, tensors, config=[1]))
    limit = CONFIG.to_dict() | {"dt_limit": [0, 10**400]}
    assert "dt_limit has a bound of over 300 digits" in refused(raw_save(path, tensors, config=limit))


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("rank, version", [(2, 1), ((2, 0, 1, 2), 2)])
def test_only_projections_that_differ_need_version_2(tmp_path, name, rank, version):
    config, tensors = init_student(dataclasses.replace(CONFIG, rank=rank))
    save_student(tmp_path / name, config, tensors)
    if name.endswith(".pt"):
        written = torch.load(tmp_path / name, weights_only=True)["version"]
    else:
        with safe_open(tmp_path / name, framework="pt") as content:
            written = int(content.metadata()["version"])
    found, loaded = load_student_tensors(tmp_path / name)
    assert (written, found) == (version, config)
    assert {key: value.shape for key, value in loaded.items()} == {key: value.shape for key, value in tensors.items()}


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, tensors, name, share):
    path = tmp_path / name
    save_student(path, CONFIG, tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


@pytest.mark.parametrize("name", SUFFIXES)
def test_missing_files_and_noise_are_refused(tmp_path, name):
    path = tmp_path / name
    assert "does not exist: give a model.pt or .safetensors" in refused(path)
    path.write_bytes(os.urandom(4096))
    refused(path)


def test_other_models_are_refused(tmp_path):
    student = {"format": "dfssm", "version": 1, "config": CONFIG.to_dict()}
    for content in ({"state_dict": {}}, [1, 2], torch.ones(3), student | {"tensors": [1]}):
        torch.save(content, tmp_path / "model.pt")
        assert "not a DF-SSM student" in refused(tmp_path / "model.pt")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert "not a DF-SSM student" in refused(tmp_path / "model.safetensors")
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.safetensors").read_bytes())
    refused(tmp_path / "model.pt")


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


@pytest.mark.parametrize("config", ["", "{", "[" * 100_000, "9" * 10_000])
def test_metadata_that_is_no_json_is_refused(tmp_path, tensors, config):
    save_file(tensors, tmp_path / "a.safetensors", {"format": "dfssm", "version": "1", "config": config})
    assert "its metadata cannot be read; export the student again" in refused(tmp_path / "a.safetensors")


def test_code_in_a_file_is_not_run(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"format": "dfssm", "version": 1, "tensors": Payload()}, path)
    refused(path)
    path.write_bytes(pickle.dumps(Payload()))
    refused(path)
    assert not Payload.ran


def test_refused_tensors_leave_the_old_file(tmp_path, tensors):
    path = tmp_path / "model.pt"
    save_student(path, CONFIG, tensors)
    before = path.read_bytes()
    with pytest.raises(DfssmError, match="embedding.scale is missing"):
        save_student(path, CONFIG, {k: v for k, v in tensors.items() if k != "embedding.scale"})
    assert path.read_bytes() == before
    with pytest.raises(DfssmError, match="cannot write "):
        save_student(path / "below.pt", CONFIG, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_views_are_written_without_their_base(tmp_path, tensors):
    base = torch.zeros(1_000_000)
    save_student(tmp_path / "model.pt", CONFIG, tensors | {"norm_f.weight": base[:32]})
    assert (tmp_path / "model.pt").stat().st_size < 200_000


@torch.no_grad()
def test_loaded_student_runs(tmp_path, tensors):
    results = []
    for name in SUFFIXES:
        save_student(tmp_path / name, CONFIG, tensors)
        results.append(load_student(tmp_path / name)(torch.tensor([[1, 2, 3]]))[0])
    assert torch.equal(*results)


def test_more_layers_than_tensors_is_said_before_they_are_listed(tmp_path):
    """52 kB that asked for a list of ten million layers: minutes and gigabytes."""
    config = dataclasses.replace(tiny.CONFIG, n_layer=10**7)
    with pytest.raises(DfssmError, match="has 1 tensors, too few for the 10000000 layers of its configuration"):
        check_tensors("m.pt", config, {"embedding.weight": torch.zeros(1)})


@pytest.mark.parametrize("shape", [(10**9, 32), (10**12, 10**6)])
def test_a_number_that_is_repeated_without_end_is_refused(tmp_path, tensors, shape):
    """A stride of 0: a file of 50 kB that asked for 32 GB and more. What is shared by two names is no such thing."""
    endless = torch.zeros(1, dtype=torch.int8).expand(shape)
    config = CONFIG.to_dict() | {"vocab_size": shape[0]}
    path = raw_save(tmp_path / "model.pt", tensors | {"embedding.weight": endless}, config=config)
    assert re.search(r"cannot be read \(its tensors have [\d,]{14,} bytes, the file [\d,]+\); ", refused(path))
    shared = tensors["layers.0.in_proj.bits"]
    load_student_tensors(raw_save(tmp_path / "model.pt", tensors | {"layers.1.in_proj.bits": shared}))


@pytest.mark.parametrize("size", [2**31 - 1, 2**52])
def test_a_pickle_that_asks_for_memory_is_refused(archive, size):
    """52 bytes that took 2 GB, before anything was looked at."""
    path, records = archive
    asked = b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", size) + b"\x85R."
    contents = {r.filename: zipfile.ZipFile(path).read(r) for r in records}
    with zipfile.ZipFile(path, "w") as changed:
        for name, content in contents.items():
            changed.writestr(name, asked if name.endswith("data.pkl") else content)
    assert "cannot be read (it holds a bytearray); " in refused(path)


def test_a_damaged_pickle_is_one_line(tmp_path):
    """torch's unpickler raises IndexError, TypeError, struct.error and others over bytes that mean nothing."""
    path = tmp_path / "m.pt"
    save_student(path, tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()})
    records = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            records[name] = archive.read(name)
    (pickled,) = [name for name in records if name.endswith("data.pkl")]
    refused = 0
    for at in range(0, len(records[pickled]), 7):
        damaged = bytearray(records[pickled])
        damaged[at] ^= 0x55
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, bytes(damaged) if name == pickled else content)
        try:
            load_student_tensors(path)
        except DfssmError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


@pytest.fixture
def archive(tmp_path, tensors):
    """A student of torch's format, and the records of its archive, the largest first."""
    path = tmp_path / "m.pt"
    save_student(path, CONFIG, tensors)
    with zipfile.ZipFile(path) as opened:
        return path, sorted(opened.infolist(), key=lambda record: -record.file_size)


@pytest.mark.parametrize("which", ["largest", "smallest", "pickle"])
def test_one_inverted_byte_of_a_record_is_found(archive, which):
    path, records = archive
    named = {"largest": records[0], "smallest": [r for r in records if "/data/" in r.filename][-1]}
    named["pickle"] = next(record for record in records if record.filename.endswith("data.pkl"))
    whole, content = path.read_bytes(), zipfile.ZipFile(path).read(named[which])
    for at in (whole.index(content), whole.index(content) + len(content) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        name = named[which].filename
        assert f"cannot be read (the CRC32 of {name} differs); copy or export it again" in refused(path)
    path.write_bytes(whole)
    load_student_tensors(path)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(archive):
    path, records = archive
    contents = {record.filename: zipfile.ZipFile(path).read(record) for record in records}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
    assert "its records are not stored as they are" in refused(path)
