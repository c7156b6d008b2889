"""The model type `dfssm` of lm-evaluation-harness: a teacher, a student or a bundle behind it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (it registers its own types only where there are none yet)
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from dfssm.base.errors import DfssmError
from dfssm.base.extras import require
from dfssm.runtime.text import StopFilter, TextStream, Vocabulary
from dfssm.targets.chat import ChatTemplate, Message
from dfssm.targets.text import encode

from .continuations import Request, score_continuations
from .scorer import BATCH, Scorer, locate, open_scorer, packages

# Options of a generation that make it another than the greedy one, and what they are where they are not wanted.
_NOT_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "penalty_alpha": None}


@register_model("dfssm")
class DfssmLM(TemplateLM):
    """`--model dfssm --model_args path=MODEL[,tokenizer=FILE]`, in one process; `path` may also be an open Scorer.

    What becomes tokens, and what of them text, is by the rules of the harness's own model type `hf`, of which
    `add_bos_token` and `prefix_token_id` are options. A state has the same size after any number of tokens: no text is
    cut, and `loglikelihood_rolling` needs no windows.
    Raises DfssmError as `open_scorer` does, and for anything but greedy generation.
    """

    def __init__(
        self,
        path: str | Path | Scorer,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        super().__init__()
        self.folder: Path | None = None
        if isinstance(path, str | Path):
            kind, place, file = locate(path, tokenizer)
            self.folder = file.parent if file else place
            path = open_scorer(path, tokenizer, _usable(kind, device))
        self.scorer = path
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id
        # "auto", the harness's search for the largest batch that fits, means ours here.
        wanted = int(batch_size or 0) if str(batch_size or "").isdigit() else BATCH
        self.batch_size = min(wanted, int(max_batch_size or wanted))
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return self.scorer.end

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has nothing before it: the token that begins one, else that which ends one."""
        if self._prefix is not None:
            return int(self._prefix)
        return self.eot_token_id if self.scorer.begin is None else self.scorer.begin

    @property
    def tokenizer_name(self) -> str:
        """Tells in the harness's cache which template the requests were made with."""
        return str(self.folder or "").replace("/", "__")

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """That beside the model's tokenizer."""
        if self.folder is None:
            raise DfssmError("a model that was opened before has no chat template: give its path")
        return ChatTemplate(self.folder)

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a chat. Messages of the role system are left out if the template refuses them."""
        try:
            return self.chat_template(chat_history, add_generation_prompt)
        except DfssmError:
            others = [message for message in chat_history if message["role"] != "system"]
            if not others or len(others) == len(chat_history):
                raise
            return self.chat_template(others, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; where nothing else is asked for those of the tokenizer's template, unless `add_bos_token` is False
        or the string begins with that token itself. `add_bos_token` = True adds it also where the template does not.
        """
        tokenizer, begin = self.scorer.tokenizer, self.prefix_token_id
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tokenizer.decode([begin], skip_special_tokens=False))
        if not add_special_tokens or self.add_bos_token is False:
            return encode(string, tokenizer, begins=False)
        missing = self.add_bos_token and begin not in encode("", tokenizer)  # in the template
        return [begin] * bool(missing) + encode(string, tokenizer)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, after the token of `prefix_token_id`."""
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
        settings = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        asked = [f"{name}={settings[name]}" for name, none in _NOT_GREEDY.items() if settings.get(name, none) != none]
        if asked:
            raise DfssmError(f"the task asks for {', '.join(asked)}; the model type dfssm generates greedily")
        tokenizer, ids = self.scorer.tokenizer, self.tok_encode(context) or [self.prefix_token_id]
        end = tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(settings.get("until"), eos=end)
        count = int(settings["max_gen_toks"])
        if "max_length" in settings:  # of the context with the answer
            count = max(0, int(settings["max_length"]) - len(ids))
        ends = {*self.scorer.ends, *map(tokenizer.token_to_id, stop)}  # a special token is a stop, though no text
        stream, stops = TextStream(Vocabulary(tokenizer)), StopFilter(stop)
        tokens: list[int] = []
        logits, state = self.scorer.read(np.array([ids]), self.scorer.new_state(1))
        while len(tokens) < count:
            tokens.append(int(logits[0].argmax()))
            stops.push(stream.push(tokens[-1]))
            if tokens[-1] in ends or stops.stopped:
                break
            logits, state = self.scorer.read(np.array([tokens[-1:]]), state)
        return postprocess_generated_text(tokenizer.decode(tokens), stop, None)


def _usable(kind: str, device: str | None) -> str | None:
    """The harness's command asks for cuda:0 unless told otherwise, also for a bundle and where there is none."""
    if device is None or kind == "bundle":
        return None
    require(packages(kind))
    import torch

    return device if not device.startswith("cuda") or torch.cuda.is_available() else None
