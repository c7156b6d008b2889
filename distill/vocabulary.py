"""A tokenizer of a teacher's own, from the text that it is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dfssm.base.endings import END_OF_TEXT
from dfssm.model.text import documents, text_files


def beginnings(data: Sequence[str | Path], held_out: float) -> Iterator[str]:
    """The documents of files but for about the last `held_out` share of each file's characters."""
    for file in text_files(data):
        left = math.floor((1 - held_out) * sum(map(len, documents(file))))
        for text in documents(file):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (any text can be encoded) whose token 0 is <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
