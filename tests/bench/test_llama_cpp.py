"""The peer llama.cpp does the same work: its file has the shapes of ours, and llama.cpp computes with it."""

import dataclasses

import pytest
import tiny

from dfssm.base import DfssmError

pytest.importorskip("gguf", reason="`make bench-peers` installs it")
pytest.importorskip("llama_cpp", reason="`make bench-peers` installs it")

from dfssm.bench import llama_cpp  # noqa: E402
from dfssm.model.config import DFSSMConfig  # noqa: E402

CONFIG = dataclasses.replace(tiny.CONFIG, d_model=256, headdim=64, d_state=128, ngroups=1, vocab_size=300).to_dict()


def test_its_file_has_the_weights_of_the_shape(tmp_path):
    import gguf

    c = DFSSMConfig.from_dict(CONFIG)
    found = {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist())
        for tensor in gguf.GGUFReader(llama_cpp.build(CONFIG, tmp_path / "m.gguf", "Q2_K")).tensors
    }
    assert found["blk.1.ssm_in.weight"] == ("Q2_K", [c.d_model, c.d_in_proj])
    assert found["blk.0.ssm_out.weight"] == ("Q2_K", [c.d_inner, c.d_model])
    assert found["token_embd.weight"] == ("Q8_0", [c.d_model, c.vocab_size])
    assert found["blk.0.ssm_a"] == ("F32", [1, c.nheads])
    assert len(found) == 2 + 9 * c.n_layer


@pytest.mark.parametrize("kind", llama_cpp.KINDS)
def test_it_decodes_and_reads_prompts(tmp_path, kind):
    peer = llama_cpp.open_peer(CONFIG, tmp_path, threads=1, kind=kind)
    assert peer.decode(3) > 0 and peer.prefill(600) > 0
    peer.close()


def test_a_row_without_whole_blocks_is_refused(tmp_path):
    config = CONFIG | {"d_model": 64}
    with pytest.raises(DfssmError, match="llama.cpp TQ2_0 has blocks of 256 weights: a row of 64 has no whole"):
        llama_cpp.build(config, tmp_path / "m.gguf", "TQ2_0")


def test_a_process_that_ends_is_named(tmp_path):
    peer = llama_cpp.open_peer(CONFIG, tmp_path, threads=1, kind="Q4_0")
    peer.close()
    with pytest.raises(DfssmError, match="llama.cpp ended while it ran the Q4_0 model"):
        peer.decode(1)
