import dataclasses

import numpy as np
import pytest
import tiny

from dfssm.model.ledger import model_bytes, operations_of_step, weight_bytes_of_step
from dfssm.model.tensors import ROLES, role
from dfssm.opset.layouts import LAYOUT_CANONICAL, LAYOUTS
from dfssm.targets import get_target

CONFIGS = [
    tiny.CONFIG,
    dataclasses.replace(tiny.CONFIG, tie_embeddings=False),
    dataclasses.replace(tiny.CONFIG, rank=0),
    dataclasses.replace(tiny.CONFIG, planes=3),
    dataclasses.replace(tiny.CONFIG, planes=(2, 1, 1, 3), rank=(0, 4, 1, 2)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied", "rank 0", "planes 3", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_config_gives_the_bytes_of_the_tensors(config, layout):
    tensors = tiny.tensors(config)
    if layout != LAYOUT_CANONICAL:
        tensors = {name: np.asarray(t) for name, t in get_target("ort-cpu").lower(tensors, layout).items()}
    sizes = dict.fromkeys(ROLES, 0)
    for name, tensor in tensors.items():
        sizes[role(name)] += tensor.nbytes
    assert model_bytes(config.to_dict(), layout) == sizes


def test_a_step_reads_every_weight_but_the_table_of_an_untied_embedding():
    tied, untied = (config.to_dict() for config in CONFIGS[:2])
    assert weight_bytes_of_step(tied) == sum(model_bytes(tied).values())
    assert weight_bytes_of_step(untied) == weight_bytes_of_step(tied)


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied", "rank 0", "planes 3", "mixed"])
def test_operations_are_two_a_weight_and_five_a_number_of_the_state(config):
    c, products = config, 0
    for name, tensor in tiny.tensors(c).items():
        if name.endswith((".bits", ".down", ".up", "conv.weight")):
            products += tensor.size * (8 if name.endswith(".bits") else 1)
    products += c.vocab_size * c.d_model
    assert operations_of_step(c.to_dict()) == 2 * products + 5 * c.n_layer * c.nheads * c.d_state * c.headdim


def test_another_name_is_no_role():
    with pytest.raises(KeyError, match="layers.0.surprise"):
        role("layers.0.surprise")
