"""The model type `dfssm` of lm-evaluation-harness: a teacher, a student or a bundle behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (it registers its own types only where there are none yet)
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from dfssm.opset.errors import DfssmError
from dfssm.opset.extras import require
from dfssm.runtime.text import StopFilter, TextStream

from .continuations import Request, score_continuations
from .scorer import BATCH, Scorer, locate, open_scorer, packages


@register_model("dfssm")
class DfssmLM(TemplateLM):
    """`--model dfssm --model_args path=MODEL[,tokenizer=FILE]`, in one process; `path` may also be an open Scorer.

    A state has the same size after any number of tokens: no text is cut, and `loglikelihood_rolling` needs no windows.
    Raises DfssmError as `open_scorer` does, and for sampling, since generation is greedy.
    """

    def __init__(
        self,
        path: str | Path | Scorer,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        if isinstance(path, str | Path):
            path = open_scorer(path, tokenizer, _usable(locate(path, tokenizer)[0], device))
        self.scorer = path
        # "auto", the harness's search for the largest batch that fits, means ours here.
        wanted = int(batch_size or 0) if str(batch_size or "").isdigit() else BATCH
        self.batch_size = min(wanted, int(max_batch_size or wanted))
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return self.scorer.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens only where they are asked for, as with the harness's own causal models."""
        return self.scorer.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, after an end-of-text token."""
        pairs = [([self.prefix_token_id], self.tok_encode(text)) for (text,) in (request.args for request in requests)]
        found = self._score(pairs, disable_tqdm)
        for request, (value, _) in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return [value for value, _ in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The likeliest tokens, up to a stop string, the end-of-text token or the number of tokens asked for."""
        texts = []
        for request in tqdm(requests, desc="generate", disable=disable_tqdm or None, leave=False):
            context, settings = request.args
            texts.append(self._generate(context, settings))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for (texts, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def _score(self, pairs: Sequence[Request], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(pairs), desc="score", disable=disable_tqdm or None, leave=False) as bar:
            return score_continuations(self.scorer, pairs, self.batch_size, bar.update)

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise DfssmError("the task asks for sampling; the model type dfssm generates greedily: set do_sample=False")
        stop = settings.get("until") or []
        ids = self.tok_encode(context) or [self.prefix_token_id]
        stream, stops = TextStream(self.scorer.tokenizer, ids), StopFilter([stop] if isinstance(stop, str) else stop)
        logits, state = self.scorer.read(np.array([ids]), self.scorer.new_state(1))
        text = ""
        for _ in range(int(settings.get("max_gen_toks", self.max_gen_toks))):
            token = int(logits[0].argmax())
            if token == self.eot_token_id:
                break
            text += stops.push(stream.push(token))
            if stops.stopped:
                return text
            logits, state = self.scorer.read(np.array([[token]]), state)
        text += stops.push(stream.flush())
        return text if stops.stopped else text + stops.flush()


def _usable(kind: str, device: str | None) -> str | None:
    """The harness's command asks for cuda:0 unless told otherwise, also for a bundle and where there is none."""
    if device is None or kind == "bundle":
        return None
    require(packages(kind))
    import torch

    return device if not device.startswith("cuda") or torch.cuda.is_available() else None
