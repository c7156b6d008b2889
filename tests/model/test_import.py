"""Checkpoints in and out: both layouts, all containers, and what was saved is what transformers opens."""

import json
import math

import pytest
import torch
from mamba2_ref import edit_json, hf_folder, hf_model
from safetensors.torch import save_file

from dfssm.base import DfssmError
from dfssm.model.config import PRESETS, DFSSMConfig, Mamba2Config
from dfssm.model.hf_config import read_config
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.student import DFSSMLM
from dfssm.model.teacher import Mamba2LM

CONFIG = Mamba2Config(vocab_size=48, d_model=32, n_layer=2, d_state=8, headdim=16, ngroups=2, norm_groups=2, d_conv=3)
PROMPT = torch.arange(20).view(2, 10)
# What a mamba_ssm config.json says of CONFIG: the vocabulary is padded to a multiple of 16 on loading.
MAMBA_SSM_JSON = {
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 45,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2, "d_conv": 3, "chunk_size": 128},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on more threads, many times so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_teacher(config=CONFIG, seed=0) -> Mamba2LM:
    torch.manual_seed(seed)
    model = Mamba2LM(config).requires_grad_(False)
    for parameter in model.parameters():  # norms and D start at 1, which would hide a swap
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mamba_ssm_tensors(model) -> dict[str, torch.Tensor]:
    """The state_dict of mamba_ssm's MambaLMHeadModel for these weights: the head is there though tied."""
    named = {
        "backbone.embedding.weight": model.embedding.weight,
        "backbone.norm_f.weight": model.norm_f.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, layer in enumerate(model.layers):
        prefix = f"backbone.layers.{i}"
        named |= {
            f"{prefix}.norm.weight": layer.norm.weight,
            f"{prefix}.mixer.dt_bias": layer.scan.dt_bias,
            f"{prefix}.mixer.A_log": layer.scan.A_log,
            f"{prefix}.mixer.D": layer.scan.D,
            f"{prefix}.mixer.in_proj.weight": layer.in_proj.weight,
            f"{prefix}.mixer.conv1d.weight": layer.conv.weight[:, None],
            f"{prefix}.mixer.conv1d.bias": layer.conv.bias,
            f"{prefix}.mixer.norm.weight": layer.gated_norm.weight,
            f"{prefix}.mixer.out_proj.weight": layer.out_proj.weight,
        }
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def mamba_ssm_folder(path, model, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MAMBA_SSM_JSON | changes))
    torch.save(mamba_ssm_tensors(model), path / "pytorch_model.bin")
    return path


def test_mamba_ssm_layout(tmp_path):
    model = random_teacher()
    loaded = load_teacher(mamba_ssm_folder(tmp_path / "tied", model))
    assert loaded.config == CONFIG and same_weights(loaded, model)
    model = random_teacher(Mamba2Config(**CONFIG.to_dict() | {"tie_embeddings": False}))
    loaded = load_teacher(mamba_ssm_folder(tmp_path / "untied", model, tie_embeddings=False))
    assert loaded.lm_head is not None and same_weights(loaded, model)


def test_mamba_ssm_defaults_are_those_of_mamba2_1_3b(tmp_path):
    published = MAMBA_SSM_JSON | {
        "d_model": 2048,
        "n_layer": 48,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, conv_bias = read_config(tmp_path / "config.json")
    ids = {"bos_token_id": 0, "eos_token_id": 0}  # which mamba_ssm's config.json does not have
    assert Mamba2Config(**config.to_dict() | ids) == PRESETS["mamba2-1.3b"] and conv_bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_loaded_as_fp32(tmp_path, dtype):
    model = random_teacher()
    folder = mamba_ssm_folder(tmp_path / "half", model)
    torch.save({k: v.to(dtype) for k, v in mamba_ssm_tensors(model).items()}, folder / "pytorch_model.bin")
    loaded = load_teacher(folder)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert same_weights(loaded, model.to(dtype).float())


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_transformers_weights(tmp_path, zipped):
    reference = hf_model(ngroups=2, tied=False)
    folder = hf_folder(reference, tmp_path / "hf")
    expected = load_teacher(folder)
    (folder / "model.safetensors").unlink()
    torch.save(reference.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same_weights(load_teacher(folder), expected)


def test_sharded_weights(tmp_path):
    reference = hf_model(ngroups=2)
    expected = load_teacher(hf_folder(reference, tmp_path / "whole"))
    folder = hf_folder(reference, tmp_path / "shards", max_shard_size="150KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    assert same_weights(load_teacher(folder), expected)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    tensors = reference.state_dict()
    names = sorted(tensors)
    index = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for shard in set(index.values()):
        torch.save({name: tensors[name] for name in names if index[name] == shard}, pickled / shard)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (pickled / "config.json").write_text((folder / "config.json").read_text())
    assert same_weights(load_teacher(pickled), expected)


def test_without_a_convolution_bias(tmp_path):
    reference = hf_model(use_conv_bias=False)
    model = load_teacher(hf_folder(reference, tmp_path / "hf"))
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT)[0], reference(PROMPT).logits, rtol=1e-4, atol=1e-5)
    assert not model.layers[0].conv.bias.any()


def test_norm_groups_follow_n_groups_unless_the_file_says_otherwise(tmp_path):
    folder = hf_folder(hf_model(ngroups=4), tmp_path / "hf")
    edit_json(folder / "config.json", norm_groups=None)
    assert load_teacher(folder).config.norm_groups == 4
    edit_json(folder / "config.json", norm_groups=1)
    assert load_teacher(folder).config.norm_groups == 1


def test_infinity_of_every_version_and_a_list_of_ends(tmp_path):
    folder = hf_folder(hf_model(), tmp_path / "hf")
    (folder / "generation_config.json").unlink()
    for bounds in ([0.5, math.inf], [0.5, {"__float__": "Infinity"}], [0.5, None]):
        edit_json(folder / "config.json", time_step_limit=bounds, eos_token_id=[7, 9], bos_token_id=3)
        config = load_teacher(folder).config
        assert config.dt_limit == (0.5, math.inf)
        assert (config.eos_token_id, config.bos_token_id) == ((7, 9), 3)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
        {"ngroups": 1, "norm_groups": 1, "d_conv": 2, "dt_limit": (0.001, 0.5), "norm_eps": 1e-6},
        {"expand": 1, "headdim": 8, "dt_limit": (0.01, math.inf)},
    ],
)
def test_saved_teachers_are_opened_by_us_and_by_transformers(tmp_path, change):
    from transformers import AutoModelForCausalLM

    model = random_teacher(Mamba2Config(**CONFIG.to_dict() | change))
    save_teacher(model, tmp_path / "saved")
    loaded = load_teacher(tmp_path / "saved")
    assert loaded.config == model.config and same_weights(loaded, model)
    reference, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = reference(PROMPT, use_cache=False).logits
        torch.testing.assert_close(model(PROMPT)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saving_in_half(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    model = random_teacher()
    save_teacher(model, tmp_path, dtype)
    expected = random_teacher().to(dtype)
    assert same_weights(load_teacher(tmp_path), expected.float())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert reference.dtype == dtype
    whole = tmp_path / "whole"
    save_teacher(model, whole)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, whole)]
    assert sizes[0] < 0.6 * sizes[1]


def test_saving_again_replaces_two_files_and_no_other(tmp_path):
    save_teacher(random_teacher(seed=1), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = random_teacher(seed=2)
    save_teacher(model, tmp_path)
    assert same_weights(load_teacher(tmp_path), model)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    save_teacher(random_teacher(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = random_teacher(seed=3)
    model.layers[1].out_proj.weight[0, 0] = 1e5
    with pytest.raises(DfssmError, match="layers.1.mixer.out_proj.weight has values that float16 cannot hold"):
        save_teacher(model, tmp_path, torch.float16)
    with pytest.raises(DfssmError, match="dtype torch.int8 is not supported"):
        save_teacher(model, tmp_path, torch.int8)
    with pytest.raises(DfssmError, match="student, not a teacher"):
        save_teacher(DFSSMLM(DFSSMConfig.from_teacher(CONFIG, rank=2)), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class TestTokens:
    """Which ids end a text is known at import, from whatever file of the folder says so."""

    @pytest.fixture
    def folder(self, tmp_path):
        """A checkpoint as state-spaces publishes them: its config.json names no token."""
        mamba_ssm_folder(tmp_path / "ssm", random_teacher())
        return tmp_path / "ssm"

    @staticmethod
    def write(folder, **files):
        for name, content in files.items():
            (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))

    @staticmethod
    def ends(folder):
        return load_teacher(folder).config.eos_token_id

    def test_nothing_says_so(self, folder):
        assert self.ends(folder) is None

    @pytest.mark.parametrize(
        "tokenizer",
        [
            {"added_tokens": [{"id": 11, "content": "<|endoftext|>", "special": True}], "model": {"vocab": {"a": 0}}},
            {"model": {"type": "BPE", "vocab": {"a": 0, "<|endoftext|>": 11}}},
            {"model": {"type": "Unigram", "vocab": [[f"t{i}", -1.0] for i in range(11)] + [["<|endoftext|>", 0.0]]}},
        ],
    )
    def test_the_tokenizers_end_of_text(self, folder, tokenizer):
        self.write(folder, tokenizer=tokenizer)
        assert self.ends(folder) == 11

    def test_all_that_is_said_in_order_and_once(self, folder):
        self.write(
            folder,
            tokenizer={"added_tokens": [{"id": 11, "content": "<|endoftext|>"}, {"id": 12, "content": "</s>"}]},
            tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": "<|endoftext|>"},
            generation_config={"eos_token_id": [30, 12]},
        )
        assert (self.ends(folder), load_teacher(folder).config.bos_token_id) == ((30, 12, 11), 11)
        edit_json(folder / "generation_config.json", eos_token_id=31)
        assert self.ends(folder) == (31, 12, 11)

    def test_config_json_comes_first(self, tmp_path):
        folder = hf_folder(hf_model(), tmp_path / "hf")
        edit_json(folder / "config.json", eos_token_id=[7, 9], bos_token_id=3)
        self.write(folder, generation_config={"eos_token_id": 9}, tokenizer_config={"eos_token": "<e>"})
        self.write(folder, tokenizer={"added_tokens": [{"id": 20, "content": "<e>"}]})
        config = load_teacher(folder).config
        assert (config.eos_token_id, config.bos_token_id) == ((7, 9, 20), 3)

    def test_ids_beside_the_tokenizer_config_alone(self, folder):
        self.write(folder, tokenizer_config={"eos_token": "<e>", "added_tokens_decoder": {"5": {"content": "<e>"}}})
        assert self.ends(folder) == 5

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "[" * 9999, '{"eos_token": 3, "eos_token_id": "x", "added_tokens": 1, "model": []}', "\xff"],
    )
    def test_files_that_say_nothing(self, folder, content):
        self.write(folder, tokenizer=content, tokenizer_config=content, generation_config=content)
        assert self.ends(folder) is None

    def test_ids_that_the_model_does_not_have(self, folder):
        self.write(folder, generation_config={"eos_token_id": [48, -1, True, 47]})
        assert self.ends(folder) == 47

    def test_they_go_on_into_the_student(self, folder, tmp_path):
        from dfssm.model.convert import convert

        self.write(folder, generation_config={"eos_token_id": [30, 12]})
        assert convert(load_teacher(folder))[0].eos_token_id == (30, 12)


def renamed(model, rename):
    return {rename(name): tensor for name, tensor in mamba_ssm_tensors(model).items()}


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model._orig_mod.module.", ""]
)
def test_names_with_what_training_puts_in_front(tmp_path, prefix):
    model = random_teacher()
    folder = mamba_ssm_folder(tmp_path / "a", model)
    torch.save(renamed(model, lambda name: prefix + name), folder / "pytorch_model.bin")
    assert same_weights(load_teacher(folder), model)
    torch.save({"epoch": 3, "state_dict": renamed(model, lambda name: prefix + name)}, folder / "pytorch_model.bin")
    assert same_weights(load_teacher(folder), model)
    if prefix:  # the model without its head, which is tied
        names = renamed(model, lambda name: prefix + name.removeprefix("backbone."))
        del names[f"{prefix}lm_head.weight"]
        torch.save(names, folder / "pytorch_model.bin")
        assert same_weights(load_teacher(folder), model)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    model = random_teacher()
    folder = mamba_ssm_folder(tmp_path / "a", model)
    torch.save(mamba_ssm_tensors(model) | renamed(model, lambda name: f"module.{name}"), folder / "pytorch_model.bin")
    with pytest.raises(DfssmError, match=r"is there twice, once as module\.backbone"):
        load_teacher(folder)


def test_configs_as_other_programs_write_them(tmp_path):
    folder = hf_folder(hf_model(), tmp_path / "hf")
    expected = load_teacher(folder)
    values = json.loads((folder / "config.json").read_text()) | {"expand": 2.0, "time_step_limit": None}
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    assert load_teacher(folder).config == expected.config and same_weights(load_teacher(folder), expected)
    for bounds in ([None, None], [0.0, None], [None, math.inf]):
        (folder / "config.json").write_text(json.dumps(values | {"time_step_limit": bounds}))
        assert load_teacher(folder).config.dt_limit == (0.0, math.inf)
    ssm = MAMBA_SSM_JSON["ssm_cfg"] | {"dt_limit": [0.0, None], "d_state": 8.0}
    folder = mamba_ssm_folder(tmp_path / "ssm", random_teacher(), ssm_cfg=ssm)
    assert load_teacher(folder).config == CONFIG


def test_mistrals_own_weights(tmp_path):
    """Codestral Mamba as Mistral gives it: one file, under mamba_ssm's names inside a module of their own."""
    model = random_teacher(Mamba2Config(**CONFIG.to_dict() | {"tie_embeddings": False}))
    save_teacher(model, tmp_path / "raw")
    (tmp_path / "raw" / "model.safetensors").unlink()
    save_file(renamed(model, lambda name: f"model.{name}"), tmp_path / "raw" / "consolidated.safetensors")
    assert same_weights(load_teacher(tmp_path / "raw"), model)
    assert same_weights(load_teacher(tmp_path / "raw" / "consolidated.safetensors"), model)
    (tmp_path / "raw" / "config.json").rename(tmp_path / "raw" / "params.json")
    with pytest.raises(
        DfssmError, match=r"it has Mistral's params.json but no config.json; put transformers' own there"
    ):
        load_teacher(tmp_path / "raw")
