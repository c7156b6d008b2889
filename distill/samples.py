"""What a student writes while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer

from dfssm.targets.text import encode

LENGTH = 64  # tokens at most


@torch.no_grad()
def samples(
    model: Callable, prompts: Sequence[str], tokenizer: Tokenizer, ends: Sequence[int], device: torch.device
) -> list[dict[str, str]]:
    """`prompt` and `text`, its most likely continuation token by token, up to one of `ends`.

    `model(ids[1,T], state)` gives logits[1,T,V] and the new state, as `Mamba2LM.forward`.
    """
    found = []
    with torch.compiler.set_stance("force_eager"):  # a program for each length would take longer than it saves
        for prompt in prompts:
            ids, state = encode(prompt, tokenizer), None
            new: list[int] = []
            while len(new) < LENGTH:
                logits, state = model(torch.tensor([ids], device=device), state)
                ids = [int(logits[0, -1].argmax())]
                if ids[0] in ends:
                    break
                new += ids
            found.append({"prompt": prompt, "text": tokenizer.decode(new)})
    return found
