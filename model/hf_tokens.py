"""The tokens that begin and end a text, as the files of a checkpoint folder name them: looked for once, at import."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfssm.base.endings import END_OF_TEXT, end_ids
from dfssm.base.jsonfile import json_object

from .config import Mamba2Config


def with_tokens(config: Mamba2Config, folder: Path) -> Mamba2Config:
    """`config` with all the ids that end a text: those of config.json, generation_config.json, the eos_token of
    tokenizer_config.json and the tokenizer's <|endoftext|>, in this order; and with the bos_token that
    tokenizer_config.json may have. Files that are missing or no JSON say nothing.
    """
    names, find = json_object(folder / "tokenizer_config.json"), _ids(folder)
    ends = list(end_ids(config.eos_token_id))
    generation = json_object(folder / "generation_config.json").get("eos_token_id")
    found = generation if isinstance(generation, list) else [generation]
    found = [*found, find(names.get("eos_token")), find(END_OF_TEXT)]
    ends += [token for token in found if type(token) is int and 0 <= token < config.vocab_size]
    begin = find(names.get("bos_token"))
    begin = begin if begin is not None and begin < config.vocab_size else None
    return dataclasses.replace(
        config, eos_token_id=tuple(ends), bos_token_id=config.bos_token_id if begin is None else begin
    )


def _ids(folder: Path) -> Any:
    """A function from a token, as a name or as transformers writes it, to its id or None."""
    known = dict(_named(json_object(folder / "tokenizer.json")))
    for token, entry in _object(json_object(folder / "tokenizer_config.json").get("added_tokens_decoder")).items():
        if token.isascii() and token.isdigit() and len(token) < 10:
            known.setdefault(str(_object(entry).get("content")), int(token))

    def find(token: Any) -> int | None:
        token = _object(token).get("content") if isinstance(token, dict) else token
        return known.get(token) if isinstance(token, str) else None

    return find


def _named(tokenizer: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The tokens of a tokenizer.json, those that were added last."""
    vocabulary = _object(tokenizer.get("model")).get("vocab")
    if isinstance(vocabulary, list):  # Unigram: tokens with their scores
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = tokenizer.get("added_tokens")
    entries = [_object(entry) for entry in added] if isinstance(added, list) else []
    for name, token in [*_object(vocabulary).items(), *((entry.get("content"), entry.get("id")) for entry in entries)]:
        if isinstance(name, str) and type(token) is int:
            yield name, token


def _object(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
