"""Every fault of a checkpoint folder is one line that names it."""

import json
import os
import pickle

import pytest
import torch
from mamba2_ref import edit_json
from safetensors.torch import load_file, save_file

from dfssm.base import DfssmError
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.teacher import Mamba2LM

CONFIG = Mamba2Config(vocab_size=48, d_model=32, n_layer=2, d_state=8, headdim=16)


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint in transformers' layout."""
    save_teacher(Mamba2LM(CONFIG), tmp_path / "teacher")
    return tmp_path / "teacher"


def refused(folder) -> str:
    with pytest.raises(DfssmError) as caught:
        load_teacher(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def edit_tensors(folder, **changes):
    """Replace tensors, their names' dots written as __; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone__layers__1__mixer__D": None}, "tensor backbone.layers.1.mixer.D is missing"),
        ({"backbone__embeddings__weight": None}, "tensor backbone.embeddings.weight is missing"),
        (
            {"backbone__layers__2__norm__weight": torch.ones(32)},
            "tensor backbone.layers.2.norm.weight does not",
        ),
        ({"backbone__layers__0__mlp__fc1__weight": torch.ones(4)}, "layers.0.mlp.fc1.weight does not belong"),
        (
            {"backbone__norm_f__weight": torch.ones(33)},
            "norm_f.weight has shape [33]; its config.json asks [32]",
        ),
        ({"backbone__layers__0__mixer__conv1d__weight": torch.ones(80, 4)}, "has shape [80, 4]"),
        ({"backbone__norm_f__weight": torch.ones(32, dtype=torch.int8)}, "norm_f.weight is torch.int8"),
        ({"backbone__norm_f__weight": torch.full((32,), torch.nan)}, "norm_f.weight holds NaN or infinity"),
        ({"lm_head__weight": torch.ones(48, 32)}, "lm_head.weight is not the embedding"),
    ],
)
def test_tensors(folder, changes, message):
    edit_tensors(folder, **changes)
    assert message in refused(folder)


def test_more_layers_than_tensors(folder):
    """A list of the tensors of so many layers took all memory."""
    edit_json(folder / "config.json", num_hidden_layers=10**6)
    assert "has 20 tensors, too few for 1000000 layers" in refused(folder)


def test_a_configuration_without_an_end(folder):
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json: is not JSON (" in refused(folder)


def test_an_untied_head_must_be_there(folder):
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "tensor lm_head.weight is missing" in refused(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": None}, "model_type is None"),
        ({"use_bias": True}, "use_bias is True, which is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"num_heads": 5}, "num_heads * head_dim is 80 and expand * hidden_size 64"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"state_size": "8"}, "state_size is '8'; it must be an integer"),
        ({"expand": 2.5}, "expand is 2.5; it must be an integer"),
        ({"conv_kernel": 5}, "d_conv is 5; it must be an integer 2..4"),
        ({"n_groups": 3}, "ngroups is 3; it must divide the number of heads"),
        ({"norm_groups": 3}, "norm_groups is 3; it must divide d_inner"),
        ({"time_step_limit": [1.0, 0.5]}, "dt_limit is [1.0, 0.5]"),
        ({"time_step_limit": 0.1}, "dt_limit is 0.1"),
        ({"time_step_limit": [{"low": 0}, 1.0]}, "dt_limit is [{'low': 0}, 1.0]"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"use_conv_bias": "no"}, "use_conv_bias is 'no'"),
        ({"layer_norm_epsilon": 0}, "norm_eps is 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"ssm_cfg": []}, "ssm_cfg is not a JSON object"),
    ],
)
def test_transformers_options(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    assert message in refused(folder)


@pytest.mark.parametrize(
    "changes, ssm_changes, message",
    [
        ({"d_intermediate": 64}, {}, "d_intermediate is 64, which is not supported"),
        ({"attn_layer_idx": [1]}, {}, "attn_layer_idx is [1]"),
        ({"rms_norm": False}, {}, "rms_norm is False"),
        ({"tie_embeddings": 1.5}, {}, "tie_embeddings is 1.5"),
        ({"vocab_size": None}, {}, "vocab_size is missing"),
        ({}, {"layer": "Mamba1"}, "ssm_cfg: layer is 'Mamba1'"),
        ({}, {"layer": None}, "ssm_cfg: layer is 'Mamba1'"),
        ({}, {"norm_before_gate": True}, "ssm_cfg: norm_before_gate is True"),
        ({}, {"bias": True}, "ssm_cfg: bias is True"),
        ({}, {"rmsnorm": False}, "ssm_cfg: rmsnorm is False"),
        ({}, {"D_has_hdim": True}, "ssm_cfg: D_has_hdim is True"),
        ({}, {"activation": "relu"}, "ssm_cfg: activation is 'relu'"),
        ({}, {"d_ssm": 32}, "ssm_cfg: d_ssm is 32"),
        ({}, {"learnable_init_states": True}, "ssm_cfg: learnable_init_states is not an option"),
        ({}, {"headdim": 48}, "headdim is 48; it must divide d_inner"),
    ],
)
def test_mamba_ssm_options(tmp_path, changes, ssm_changes, message):
    ssm = {"layer": "Mamba2", "d_ssm": 64} | ssm_changes
    config = {"d_model": 32, "n_layer": 1, "vocab_size": 48, "ssm_cfg": ssm} | changes
    config["ssm_cfg"] = {name: value for name, value in ssm.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert message in refused(tmp_path)


def test_files(folder, tmp_path):
    assert "nowhere does not exist: give a checkpoint folder" in refused(tmp_path / "nowhere")
    (folder / "notes").touch()
    assert "notes is not a Mamba-2 checkpoint" in refused(folder / "notes")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: cannot be read" in refused(folder)
    weights.unlink()
    assert "holds no weights; put model.safetensors or " in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json: is not a JSON object" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: is not JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "is not a Mamba-2 checkpoint: it has no config.json" in refused(folder)


def test_shards(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert "shard model-2.safetensors is missing" in refused(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    assert "shard '../model-1.safetensors' is not beside the index" in refused(folder)
    index.write_text("{}")
    assert "weight_map is missing" in refused(folder)


class Touch:
    """Pickles as a call of os.mkdir: what a hostile checkpoint would do, made harmless."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_files(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        save({"backbone.norm_f.weight": Touch(tmp_path / "touched")}, weights)
        assert "holds more than tensors, which is never loaded" in refused(folder)
        assert not (tmp_path / "touched").exists()
    weights.write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    assert "cannot be read (it holds a bytearray)" in refused(folder)
    torch.save({"model": {"backbone.norm_f.weight": torch.ones(32)}}, weights)
    assert "is not a mapping of names to tensors" in refused(folder)
    torch.save({"backbone.norm_f.weight": torch.ones(32, device="meta")}, weights)
    assert "is not a mapping of names to tensors" in refused(folder)
    torch.save({"backbone.norm_f.weight": torch.ones(512)}, weights)
    rotten = weights.read_bytes().replace(b"\0\0\x80\x3f" * 512, b"\0\0\x80\xbf" + b"\0\0\x80\x3f" * 511)
    weights.write_bytes(rotten)
    assert "the CRC32 of pytorch_model/data/0 differs" in refused(folder)
    torch.save([torch.ones(32)], weights)
    assert "is not a mapping of names to tensors" in refused(folder)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "pytorch_model.bin: " in refused(folder)
    weights.write_bytes(b"")
    assert "pytorch_model.bin: cannot be read" in refused(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_pipe_says_nothing_of_tokens(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert load_teacher(folder).config == CONFIG
