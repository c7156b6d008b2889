"""Configurations: what is wrong is named, and a JSON round trip keeps all."""

import json
import math

import pytest

from dfssm.base import DfssmError
from dfssm.model.config import PRESETS, DFSSMConfig, Mamba2Config, preset

SIZES = dict(vocab_size=48, d_model=32, n_layer=2, d_state=8, headdim=16)


def test_derived_sizes():
    config = Mamba2Config(**SIZES, ngroups=2)
    assert (config.d_inner, config.nheads, config.conv_dim) == (64, 4, 64 + 2 * 2 * 8)
    assert config.d_in_proj == 64 + 96 + 4


@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.25, math.inf), (0.001, 0.5)])
def test_json_round_trip(dt_limit):
    for config in (
        Mamba2Config(**SIZES, dt_limit=dt_limit, tie_embeddings=False, eos_token_id=0),
        DFSSMConfig(**SIZES, dt_limit=dt_limit, rank=0, planes=3, norm_groups=4),
        DFSSMConfig(**SIZES, dt_limit=dt_limit, rank=(0, 2, 1, 0), planes=(1, 1, 2, 3)),
    ):
        text = json.dumps(config.to_dict(), allow_nan=False)
        assert type(config).from_dict(json.loads(text)) == config


def test_a_student_has_its_teachers_shape():
    teacher = Mamba2Config(**SIZES, ngroups=2, d_conv=3, dt_limit=(0.0, 1.0), eos_token_id=5)
    student = DFSSMConfig.from_teacher(teacher, rank=3, planes=2)
    assert student.to_dict() == teacher.to_dict() | {"rank": 3, "planes": 2}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer >= 1"),
        ({"n_layer": 2.0}, "n_layer is 2.0"),
        ({"d_model": True}, "d_model is True"),
        ({"d_conv": 1}, "d_conv is 1; it must be an integer 2..4"),
        ({"d_conv": 5}, "d_conv is 5"),
        ({"headdim": 24}, "headdim is 24; it must divide d_inner (expand * d_model), which is 64"),
        ({"ngroups": 3}, "ngroups is 3; it must divide the number of heads, which is 4"),
        ({"norm_groups": 5}, "norm_groups is 5; it must divide d_inner (expand * d_model), which is 64"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit is (0.5, 0.1)"),
        ({"dt_limit": (-1.0, 1.0)}, "dt_limit is (-1.0, 1.0)"),
        ({"dt_limit": 0.1}, "dt_limit is 0.1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_wrong_values_are_named(change, message):
    for kind in (Mamba2Config, DFSSMConfig):
        with pytest.raises(DfssmError) as caught:
            kind(**SIZES | change)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": -1}, "rank is -1"),
        ({"planes": 0}, "planes is 0"),
        ({"d_model": 48, "headdim": 16}, "d_model is 48; a binary scaffold needs a multiple of 32"),
    ],
)
def test_wrong_values_of_a_student_are_named(change, message):
    with pytest.raises(DfssmError) as caught:
        DFSSMConfig(**SIZES | change)
    assert message in str(caught.value)


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(DfssmError, match="unknown key 'd_modell'"):
        Mamba2Config.from_dict(SIZES | {"d_modell": 32})
    with pytest.raises(DfssmError, match="unknown key 'rank'"):
        Mamba2Config.from_dict(SIZES | {"rank": 2})
    with pytest.raises(DfssmError, match="'n_layer' is missing"):
        DFSSMConfig.from_dict({name: value for name, value in SIZES.items() if name != "n_layer"})
    with pytest.raises(DfssmError, match="expected a mapping"):
        DFSSMConfig.from_dict(None)


def test_presets():
    assert preset("mamba2-130m") is PRESETS["mamba2-130m"]
    with pytest.raises(DfssmError, match="'mamba2-7b' is not known; choose one of mamba2-130m, "):
        preset("mamba2-7b")


@pytest.mark.parametrize(
    ("given", "kept", "written"),
    [
        (None, None, None),
        ([], None, None),
        (5, 5, 5),
        ([5], 5, 5),
        ([7, 9, 7], (7, 9), [7, 9]),
        ((0, 3), (0, 3), [0, 3]),
    ],
)
def test_one_id_is_a_number_and_several_are_a_list(given, kept, written):
    config = Mamba2Config(**SIZES, eos_token_id=given)
    assert (config.eos_token_id, config.to_dict()["eos_token_id"]) == (kept, written)
    assert Mamba2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_projections_may_differ():
    config = DFSSMConfig(**SIZES, rank=(0, 2, 1, 4), planes=2)
    assert config.scaffolds == [(0, 2), (2, 2), (1, 2), (4, 2)] and not config.alike
    assert [config.scaffold(f"layers.{i}.{name}").rank for i in (0, 1) for name in ("in_proj", "out_proj")] == [
        0,
        2,
        1,
        4,
    ]
    assert DFSSMConfig(**SIZES, rank=[3, 3, 3, 3], planes=[1, 1, 1, 1]) == DFSSMConfig(**SIZES, rank=3, planes=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": (1, 2, 3)}, "rank has 3 numbers; give one, or one for each of the 4 projections"),
        ({"planes": []}, "planes has 0 numbers"),
        ({"planes": (1, 0, 1, 1)}, "planes[1] is 0; it must be an integer >= 1"),
        ({"rank": (1, 2, 3, 4.0)}, "rank[3] is 4.0"),
        ({"rank": {"in_proj": 1}}, "rank is {'in_proj': 1}; it must be an integer >= 0"),
    ],
)
def test_wrong_projections_are_named(change, message):
    with pytest.raises(DfssmError) as caught:
        DFSSMConfig(**SIZES | change)
    assert message in str(caught.value)
