"""Plain text files -> a byte-level BPE tokenizer, a token stream, random training windows and perplexity."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dfssm.opset.errors import DfssmError

END_OF_TEXT = "<|endoftext|>"


@dataclass
class Corpus:
    """Tokenized text: train and held_out int64[tokens], starts int64[documents] into train."""

    train: torch.Tensor
    held_out: torch.Tensor
    starts: torch.Tensor


def text_files(paths: list[Path]) -> list[Path]:
    """The files named, and every *.txt below the folders named, sorted; DfssmError if there is none."""
    files = []
    for path in paths:
        if not path.exists():
            raise DfssmError(f"{path}: no such file or folder; give --data text files or folders of *.txt")
        files += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DfssmError(f"no *.txt file below {', '.join(map(str, paths))}; name the files themselves")
    return files


def split_documents(path: Path, held_out: float) -> tuple[list[str], list[str]]:
    """Documents (separated by <|endoftext|>) of one file: training part, and the last ``held_out`` share."""
    text = path.read_text(encoding="utf-8", errors="replace")
    separator = END_OF_TEXT if END_OF_TEXT in text else "\n"
    cut = text.rfind(separator, 0, int(len(text) * (1 - held_out)))
    if cut < 0:
        raise DfssmError(f"{path}: too short to hold out {held_out:.0%}; give it together with a longer file")
    return tuple([doc.strip() for doc in part.split(END_OF_TEXT) if doc.strip()] for part in (text[:cut], text[cut:]))


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
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
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json. Raises DfssmError if the file is missing, or has no <|endoftext|> token."""
    if not path.is_file():
        raise DfssmError(f"{path}: no tokenizer; it is written beside the teacher by 01_train_teacher.py")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DfssmError(f"{path}: the tokenizer has no {END_OF_TEXT} token; use the one of the teacher")
    return tokenizer


def read_corpus(
    paths: list[Path], held_out: float, tokenizer: Tokenizer | None = None, vocab_size: int = 4096
) -> tuple[Corpus, Tokenizer]:
    """Tokenize all files; trains the tokenizer on the training part when none is given."""
    parts = [split_documents(file, held_out) for file in text_files(paths)]
    train = [doc for part, _ in parts for doc in part]
    test = [doc for _, part in parts for doc in part]
    tokenizer = tokenizer or train_tokenizer(train, vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)

    def stream(documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = [[*enc.ids, end] for enc in tokenizer.encode_batch(documents)]
        lengths = torch.tensor([len(ids) for ids in encoded])
        return torch.tensor([i for ids in encoded for i in ids]), lengths.cumsum(0) - lengths

    tokens, starts = stream(train)
    return Corpus(tokens, stream(test)[0], starts), tokenizer


def windows(corpus: Corpus, batch: int, tokens: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless random int64[batch, tokens + 1]; a quarter begin where a document does, as prompts do."""
    last = len(corpus.train) - tokens - 1
    if last < 1:
        raise DfssmError(f"the text has {len(corpus.train)} tokens, a window {tokens + 1}; give more --data")
    starts = corpus.starts[corpus.starts <= last]

    def draw() -> torch.Tensor:
        first = torch.randint(last + 1, (batch,), generator=generator)
        document = torch.randint(len(starts), (batch // 4,), generator=generator)
        first[: batch // 4] = starts[document]
        return torch.stack([corpus.train[i : i + tokens + 1] for i in first.tolist()])

    return iter(draw, None)


@torch.no_grad()
def perplexity(logits: Callable[[torch.Tensor], torch.Tensor], held_out: torch.Tensor, tokens: int) -> float:
    """exp(mean loss) over consecutive windows of ``tokens`` predictions, each from a zero state.

    ``logits`` maps int64[B, T] to f32[B, T, V]; the last, shorter window is left out.
    """
    count = (len(held_out) - 1) // tokens
    if count < 1:
        raise DfssmError(f"the held-out text has {len(held_out)} tokens, a window {tokens}; hold out more")
    inputs = held_out[: count * tokens].view(count, tokens)
    targets = held_out[1 : count * tokens + 1].view(count, tokens)
    loss = sum(
        F.cross_entropy(logits(x).flatten(0, 1).float(), y.flatten(), reduction="sum").double()
        for x, y in zip(inputs.split(16), targets.split(16), strict=True)
    )
    return float(torch.exp(loss / targets.numel()))
