"""Mamba-2 checkpoints in and out: folders of transformers (Mamba2ForCausalLM) and of mamba_ssm.

Strict: a tensor that is missing, unexpected or misshapen is a DfssmError that names it; nothing is guessed.
Pickled weights are read with weights_only, so no code runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.files import write_file
from dfssm.base.paths import WEIGHTS

from .checkpoint import is_plain, read_tensors
from .config import DFSSMConfig
from .hf_config import hf_config, read_config, read_json
from .hf_tokens import with_tokens
from .teacher import Mamba2LM
from .tensors import EMBEDDING, HEAD, weights

CONFIG_FILE, WEIGHTS_FILE = paths.CONFIG, WEIGHTS[0]
_AROUND = re.compile(r"^(?:(?:_orig_mod|module|model|_fsdp_wrapped_module)\.)+")
_BACKBONE = "backbone."
_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def load_teacher(path: str | Path, widen: bool = True) -> Mamba2LM:
    """Read a checkpoint folder into an fp32 Mamba2LM, whatever float type it is stored in. Not to `widen` it leaves the
    tensors in that type, mapped from the file where its format allows: for what takes one layer at a time.

    Layouts: transformers (config.json has model_type mamba2) and mamba_ssm (config.json has ssm_cfg); weights
    in model.safetensors or pytorch_model.bin, whole or sharded. Raises DfssmError as the module says.
    """
    path = paths.teacher(path)
    config, conv_bias = read_config(path / CONFIG_FILE)
    config = with_tokens(config, path)
    source = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if source is None:
        raise DfssmError(f"{path}: holds no weights; put {' or '.join(WEIGHTS)} there")
    tensors = _plain_names(source, _read_weights(source))
    if EMBEDDING.alias in tensors and EMBEDDING.source not in tensors:
        tensors[EMBEDDING.source] = tensors.pop(EMBEDDING.alias)
    if config.tie_embeddings:
        _drop_tied_head(source, tensors)
    if config.n_layer > len(tensors):  # before a list of a million layers is made
        raise DfssmError(
            f"{source}: has {len(tensors)} tensors, too few for {config.n_layer} layers; copy the checkpoint again"
        )
    loaded = {}
    for weight in weights(config):
        if weight.name.endswith("conv.bias") and not conv_bias:
            loaded[weight.name] = torch.zeros(weight.shape(config))
        else:
            tensor = _take(source, tensors, weight.source, weight.source_shape(config))
            loaded[weight.name] = (tensor.float() if widen else tensor).view(weight.shape(config))
    if tensors:
        raise DfssmError(f"{source}: tensor {min(tensors)} does not belong to the model of {CONFIG_FILE}")
    with torch.device("meta"):
        model = Mamba2LM(config)
    model.load_state_dict(loaded, assign=True)
    return model


def save_teacher(model: Mamba2LM, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` as a folder that load_teacher and transformers open; `dtype` is fp32, fp16 or bf16.

    Each file is replaced atomically, config.json last. Other files of the folder (a tokenizer) stay. A weight
    that `dtype` cannot hold raises DfssmError and writes nothing.
    """
    path = Path(path)
    if isinstance(model.config, DFSSMConfig):
        raise DfssmError(f"{path}: the model is a DF-SSM student, not a teacher; save it as model.pt")
    if dtype not in _FLOATS:
        raise DfssmError(f"{path}: dtype {dtype} is not supported; choose {' or '.join(_FLOATS.values())}")
    values, tensors = model.state_dict(), {}
    for weight in weights(model.config):
        tensor = values[weight.name].to("cpu", dtype).reshape(weight.source_shape(model.config)).contiguous()
        if not tensor.isfinite().all():
            raise DfssmError(f"{path}: {weight.source} has values that {_FLOATS[dtype]} cannot hold; use float32")
        tensors[weight.source] = tensor
    config = json.dumps(hf_config(model.config, _FLOATS[dtype]), indent=2, sort_keys=True) + "\n"
    write_file(path / WEIGHTS_FILE, lambda draft: save_file(tensors, draft, {"format": "pt"}), parents=True)
    write_file(path / CONFIG_FILE, config)


def _plain_names(source: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that checkpoints have, without what torch.compile, DistributedDataParallel, FSDP or a module around the
    model put in front; the tensors of a model saved without its head get theirs.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = _AROUND.sub("", name, count=1)
        if not plain.startswith((_BACKBONE, HEAD.source)):
            plain = _BACKBONE + plain
        if plain in named:
            raise DfssmError(f"{source}: tensor {plain} is there twice, once as {name}; save the model alone")
        named[plain] = tensor
    return named


def _take(source: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove a tensor from `tensors`, checked."""
    if name not in tensors:
        raise DfssmError(f"{source}: tensor {name} is missing; copy the checkpoint again")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        found = list(tensor.shape)
        raise DfssmError(f"{source}: tensor {name} has shape {found}; its {CONFIG_FILE} asks {list(shape)}")
    if tensor.dtype not in _FLOATS:
        raise DfssmError(f"{source}: tensor {name} is {tensor.dtype}; it must be {' or '.join(_FLOATS.values())}")
    if not tensor.isfinite().all():
        raise DfssmError(f"{source}: tensor {name} holds NaN or infinity; copy or train the checkpoint again")
    return tensor


def _drop_tied_head(source: Path, tensors: dict[str, Tensor]) -> None:
    """A tied checkpoint may hold its embedding a second time, under the head's name."""
    head, embedding = tensors.pop(HEAD.source, None), tensors.get(EMBEDDING.source)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise DfssmError(f"{source}: {HEAD.source} is not the embedding, yet {CONFIG_FILE} ties them; untie them there")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.name.endswith(".index.json"):
        content = read_tensors(path, "copy the checkpoint again")[0]
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]  # a training's checkpoint has more beside it
        if not isinstance(content, dict) or not all(map(is_plain, content.values())):
            raise DfssmError(f"{path}: is not a mapping of names to tensors; save the model's state_dict")
        return dict(content)
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise DfssmError(f"{path}: weight_map is missing; copy the checkpoint again")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        if Path(name).name != name or len(name) > 255:  # NAME_MAX
            raise DfssmError(f"{path}: shard {name!r} is not beside the index; copy the checkpoint again")
        if not (path.parent / name).is_file():
            raise DfssmError(f"{path.parent}: shard {name} is missing; copy the checkpoint again")
        tensors |= _read_weights(path.parent / name)
    return tensors
