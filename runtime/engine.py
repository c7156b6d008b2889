"""The engine: a bundle, opened, and its step run on states that never leave their buffers."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.memory import trim
from dfssm.base.numbers import require_whole
from dfssm.base.paths import GOLDEN, quoted
from dfssm.base.threads import default_threads
from dfssm.base.tokens import token_ids, token_rows
from dfssm.opset.hidden import Hidden, Patch, hidden_of_rows
from dfssm.targets import get_target
from dfssm.targets.bundle import TOKENIZER, Manifest, loading
from dfssm.targets.chat import ChatTemplate, Message, Tool
from dfssm.targets.files import Files
from dfssm.targets.text import encode, end_tokens, load_tokenizer
from dfssm.targets.trust import VERIFIED, recorded, run_of

from .backend import Ahead, Backend, Pool, choose
from .generation import Completion, Generation, GenerationConfig
from .hidden import Taps
from .opening import open_backend
from .rows import Rows
from .sampler import Sampler
from .sampling import Sampling
from .slots import Slots
from .speculation import MOST, Draft, PromptLookup
from .state import State, require_model
from .text import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# Longer prompts leave enough memory behind to be worth the time of giving it back.
LONG = 16

_COMPARE = "its weights are too large or damaged, look for where with `dfssm compare`"

Tokens = Sequence[int] | np.ndarray


class Engine:
    """A compiled model, ready to run. Make one with `Engine.load`.

    The engine itself holds weights only; what a sequence remembers is in a `State`. Threads may run one
    engine at the same time on different states.

    Attributes:
        config: the model's config, by its JSON keys. manifest: what the bundle says about itself.
        model: identity of the model (sha256 of its weights). threads: threads a step runs on.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, threads: int, trust: bool = False):
        self.folder, self.manifest, self.backend, self.threads = folder, manifest, backend, threads
        self._trust = trust
        self.config = manifest.config
        self.model = manifest.files[manifest.weights]["sha256"]
        self.vocab_size = backend.vocab_size

    @classmethod
    def load(
        cls, path: str | Path, threads: int = 0, verify_hashes: bool = True, trust: bool = False, mmap: bool = True
    ) -> Engine:
        """Open the bundle in folder `path`.

        Args: `threads` = 0 is one a physical core; `verify_hashes` = False compares only the files' sizes; `trust`: run
            the code that the bundle holds, its own library or engine (`dfssm.targets.trust`); `mmap` = False reads the
            weights into memory: then no change of the files reaches this engine.
        Raises DfssmError when the folder is no bundle, is incomplete or altered, or cannot run here.
        """
        threads, start = threads or default_threads(), time.perf_counter()
        with loading(path, hashes=verify_hashes) as bundle:
            backend = open_backend(bundle, threads, trust, mmap)
            engine = cls(bundle.folder.absolute(), bundle.manifest, backend, threads, trust)
        target = get_target(engine.manifest.target)
        if target.IS_ENGINE and not recorded(run_of(engine.manifest, target.kernels()), VERIFIED):
            why = f"{path} holds an engine that was never verified on this machine"
            remedy = f"run `dfssm verify {quoted(path)}{' --trust' if trust else ''}` once"
            if GOLDEN not in engine.manifest.files:
                remedy = f"it has no {GOLDEN}, compile it again without --no-verify"
            warnings.warn(f"{why}: {remedy}", RuntimeWarning, stacklevel=2)
        of = engine.manifest.target, engine.manifest.state_dtype, threads, time.perf_counter() - start
        _log.info("opened %s: target %s, %s states, %d threads, %.2f s", path, *of)
        return engine

    def __repr__(self) -> str:
        manifest = self.manifest
        return f"<Engine {self.folder}: {manifest.target}, {manifest.state_dtype} states, threads={self.threads}>"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's `tokenizers.Tokenizer`, read at the first use; DfssmError when the bundle has none."""
        if TOKENIZER not in self.manifest.files:
            raise DfssmError(f"{self.folder} has no {TOKENIZER}: compile with --tokenizer to work with text")
        give = "the bundle as it was compiled, or load it again"
        read = partial(load_tokenizer, give=give, sha256=self.manifest.files[TOKENIZER]["sha256"])
        with Files(self.folder) as files:
            tokenizer = files.by_path(TOKENIZER, read)
        trim()
        return tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the tokens of the tokenizer mean."""
        return Vocabulary(self.tokenizer)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The bundle's chat template, read at the first use; DfssmError when the bundle has none."""
        sha256 = {name: entry["sha256"] for name, entry in self.manifest.files.items()}
        with Files(self.folder) as files:
            return ChatTemplate(self.folder, files, sha256)

    def chat_prompt(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Tool] | None = None
    ) -> list[int]:
        """The tokens of a chat, by the chat template: up to where the model is to answer or, without the prompt for
        that, to go on with the last message. A message is {"role": "user", "content": "Hello"}, say. `tools` that the
        model may call, in OpenAI's form: DfssmError where the template takes none.
        """
        return encode(self.chat_template(messages, add_generation_prompt, tools), self.tokenizer, begins=False)

    def new_state(self, batch: int = 1) -> State:
        """The state of `batch` sequences that have read nothing yet."""
        return State.zeros(self.model, self.backend.layout, self.vocab_size, batch)

    def slots(self, capacity: int) -> Slots:
        """Memory for up to `capacity` sequences that come and go, each in a slot, and run as batches."""
        return Slots(self, capacity)

    def load_state(self, path: str | Path) -> State:
        """Read a saved state; DfssmError when it is of another model or of another state dtype."""
        state = State.load(path)
        require_model(state, self.model, self.backend.layout, self.vocab_size)
        return state

    def prefill(self, ids: Tokens | Sequence[Tokens], state: State) -> np.ndarray:
        """Read a prompt into `state`, which may have read something before.

        Args: ids i64[T] or [1,T] for a state of one row, [B,T], or a list of B rows of unequal lengths; every row has
            at least one token. Each is read in the pieces that it would be read in alone; neighbours whose pieces are
            of one length run together: give rows in order of length.
        Returns: logits f32[B,V] after the last token of each row.
        """
        rows = self._rows(ids)
        if len(rows) != state.batch:
            raise DfssmError(f"the prompt has {len(rows)} rows, the state has {state.batch}: make them equal")
        state.require_sound()
        self._require_batch(len(rows))
        pool, most, longest = self._pool(state), self.backend.max_tokens, max(map(len, rows))
        for start in range(0, longest, most):
            first = 0
            for length, alike in groupby((row[start : start + most] for row in rows), len):
                ids = np.stack(list(alike))
                some = slice(first, first + len(ids))
                first = some.stop
                if length:
                    done = state.rows.begin_run(state.span[some], ids)
                    pool.run(ids, state.span[some].start, done, release_memory=start + most >= longest > LONG)
                    self.check(pool, state.rows, state.span[some], state.logits[some])
        return state.logits.copy()

    def step(self, ids: Tokens | int, state: State) -> np.ndarray:
        """Read one token a row: ids [B] (or one int for a state of one row) -> logits f32[B,V]."""
        ids = self.token_ids(ids).reshape(-1)
        if len(ids) != state.batch:
            raise DfssmError(f"step got {len(ids)} tokens for a state of {state.batch} rows: give one a row")
        self.advance(ids, state)
        self.require_finite(state)
        return state.logits.copy()

    def advance(self, ids: np.ndarray, state: State) -> None:
        """`step` without checks of tokens and logits, nor copies: ids i64[B]; the logits are left in `state.logits`."""
        self.run(self._pool(state), state.rows, state.span, ids.reshape(-1, 1))

    def logits(self, ids: Tokens | Sequence[Tokens], state: State | None = None) -> np.ndarray:
        """Logits of every token: ids [T] or [B,T], rows of one length -> f32[B,T,V]. Advances `state`."""
        rows = self._rows(ids)
        if len({len(row) for row in rows}) != 1:
            raise DfssmError("logits of rows of unequal lengths: call it row by row")
        state = self.new_state(len(rows)) if state is None else state
        if len(rows) != state.batch:
            raise DfssmError(f"got {len(rows)} rows of tokens, the state has {state.batch}: make them equal")
        self._require_batch(len(rows))
        pool, ids, most = self._pool(state), np.stack(rows), self.backend.max_logits
        out = np.empty((*ids.shape, self.vocab_size), np.float32)
        for start in range(0, ids.shape[1], most):
            part = np.ascontiguousarray(ids[:, start : start + most])
            done = state.rows.begin_run(state.span, part)
            out[:, start : start + most] = pool.run_all_logits(part, state.span.start, done)
            self.check(pool, state.rows, state.span, out[:, start : start + most])
        return out

    def hidden(
        self,
        ids: Tokens | Sequence[Tokens],
        layers: Sequence[int] | None = None,
        last: bool = True,
        patch: Patch | None = None,
    ) -> Hidden:
        """The residual stream of prompts, each read in one run from a zero state: a teacher's and a student's `hidden`.

        Args: ids [T], [B,T], or a list of B rows. `layers`: 0 is the embedding, i the i-th block; None: all. `last`: of
            the last token only. `patch`: layer -> f32[B,D], put in the place of the last token's residual there; the
            layers after it go on from that, and `patch={n_layer: x}` gives the head's logits of x.
        Raises DfssmError for a bundle that was compiled without --taps, and as `dfssm.opset.hidden.hidden_of_rows`.
        """
        sizes = self.config["n_layer"], self.config["d_model"]
        return hidden_of_rows(self._taps.run, self._rows(ids), *sizes, layers, last, patch)

    @cached_property
    def _taps(self) -> Taps:
        return Taps(self.folder, self.manifest, self.backend.layout, self.threads, self._trust)

    def generate(
        self,
        prompt: str | Tokens,
        config: GenerationConfig = GenerationConfig(),  # noqa: B008 (it is frozen)
        *,
        state: State | None = None,
        after: Generation | None = None,
        speculate: int = 0,
        draft: Draft | None = None,
        **options: Any,
    ) -> Generation:
        """Continue `prompt`: an iterator over pieces of text, made as they are asked for.

        Args: `options`: fields of `GenerationConfig` that are not as in `config`, max_tokens=64 say. `state` (batch 1)
            continues what it has read, with a `prompt` that may then be empty; it ends up having read everything
            generated. `after`: the generation that read and wrote what `state` has; its tokens count in penalties, and
            processors see them. `speculate`: up to so many tokens (at most 7), which `draft` guesses, are read
            together with the last one, and kept as far as they are those that are chosen: the text is the same, bit for
            bit, and sooner there where guesses are right. By default they come from the prompt and the text so far.
        Raises DfssmError for an empty prompt without a state, an id that the model does not know, or a setting out of
        range.
        """
        config = dataclasses.replace(config, **options)
        if not isinstance(prompt, str):
            prompt = self.token_ids(prompt)
            if prompt.ndim > 1 and len(prompt) > 1:
                raise DfssmError(f"the prompt has {len(prompt)} rows, generate continues one: call it for each")
            prompt = prompt.reshape(-1)
        require_whole("speculate", speculate, 0, MOST, "drafts of a run")
        return Generation(self, prompt, config, state, after, speculate, draft or PromptLookup())

    def generate_batch(
        self,
        prompts: Sequence[str | Tokens],
        config: GenerationConfig | Sequence[GenerationConfig] = GenerationConfig(),  # noqa: B008 (it is frozen)
        *,
        n: int = 1,
        rows: int = 8,
        **options: Any,
    ) -> list[Completion]:
        """Continue each of `prompts`, up to `rows` of them at a time: the texts that `generate` makes one by one.

        Args: `config`: of all, or of each; `options` as for `generate`. `n`: make so many texts of a prompt, which is
            read once; the one at index i has the seed of the config, if any, plus i.
        Returns: `n` texts of the first prompt, then those of the next. Raises what `generate` does.
        """
        from .scheduler import Scheduler

        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise DfssmError(f"the prompts are {prompts!r}: give a list of them")
        require_whole("n", n, 1)
        require_whole("rows", rows, 1)
        configs = [config] * len(prompts) if isinstance(config, GenerationConfig) else list(config)
        if len(configs) != len(prompts):
            raise DfssmError(f"{len(prompts)} prompts and {len(configs)} configs: give each prompt one")
        rows = min(rows, self.backend.max_batch)
        scheduler = Scheduler(self, rows, max(1, n * len(prompts)), prefix_cache=None if n > 1 else 0)
        requests = []
        for prompt, one in zip(prompts, configs, strict=True):
            one = dataclasses.replace(one, **options)
            requests += [scheduler.submit(prompt, one.of_text(index)) for index in range(n)]
        more = True
        while more:
            more = scheduler.step()
            for request in requests:
                if request.error:
                    raise request.error
        return [Completion.of(request) for request in requests]

    def ends(self, config: GenerationConfig) -> dict[int, str]:
        """The tokens that end a text, each with its `finish_reason`. DfssmError for one that the model does not have,
        also in `logit_bias`.
        """
        config.require_vocabulary(self.vocab_size)
        eos = config.eos
        if eos is None:
            eos = () if config.ignore_eos else end_tokens(self.config.get("eos_token_id"), self.tokenizer)
        stop_ids, eos_ids = (self.token_ids(ids).reshape(-1).tolist() for ids in (config.stop_ids, eos))
        return dict.fromkeys(stop_ids, "stop") | dict.fromkeys(eos_ids, "eos")

    def run(self, pool: Pool, rows: Rows, span: range, ids: np.ndarray) -> None:
        """Read ids i64[n,T] into the rows `span` of `pool`, of which `rows` keeps the books."""
        self._require_batch(len(ids))
        pool.run(ids, span.start, rows.begin_run(span, ids))

    def ahead(self, state: State) -> Ahead:
        """`state` (batch 1) as a row that reads ahead. DfssmError where this bundle cannot."""
        return self._pool(state).ahead(state.span.start)

    def choose(self, state: State, sampling: Sampling | Sampler) -> tuple[int, float]:
        """The token that `sampling` takes after what `state` (batch 1) has read, and its logit."""
        (found,) = choose(self._pool(state), [state.span.start], [Sampler.of(sampling)], [int(state.tokens[0])])
        if isinstance(found, Exception):
            raise found
        return found

    def require_finite(self, state: State) -> None:
        """DfssmError where a logit of the last token is NaN or infinite. The rows with such are broken from then on."""
        self.check(self._pool(state), state.rows, state.span, state.logits)

    def check(self, pool: Pool, rows: Rows, span: range, logits: np.ndarray) -> None:
        """`require_finite` of `logits` f32[n,...], of the rows `span`. The error names the layer where it began."""
        if math.isfinite(logits.max()):  # NaN, where there is one
            return
        largest = logits.reshape(len(span), -1).max(1)
        wrong = [row for row, most in zip(span, largest.tolist(), strict=True) if not math.isfinite(most)]
        rows.broken |= dict.fromkeys(wrong, "its numbers are not finite")
        state = self.new_state()
        pool.read(wrong[0], state.tensors)
        bad = [name.partition(".") for name, tensor in state.tensors.items() if not np.isfinite(tensor).all()]
        layer, kind = min(((int(layer), kind) for kind, _, layer in bad), default=(0, ""))
        kept = self.manifest.state_dtype
        overflowed = kept != "fp32" and kind == "ssm_state" and np.isinf(state.tensors[f"{kind}.{layer}"]).any()
        raise DfssmError(
            f"the model's numbers are not finite after {rows.tokens[wrong[0]]} tokens, first in "
            + (f"{kind} of layer {layer}: " if kind else "the logits: ")
            + (f"{kept} is too small for it, compile with --state-dtype fp32" if overflowed else _COMPARE)
        )

    def _require_batch(self, rows: int) -> None:
        if rows > self.backend.max_batch:
            raise DfssmError(
                f"the batch has {rows} rows, the engine was built for {self.backend.max_batch}: "
                f"compile with --max-batch {rows}"
            )

    def _pool(self, state: State) -> Pool:
        """The pool that `state` is rows of."""
        whole = state.whole
        if whole.engine is not self:
            require_model(whole, self.model, self.backend.layout, self.vocab_size)
            whole.pull()
            whole.pool, whole.engine = self.backend.bind(whole), self
        pool: Pool = whole.pool
        return pool

    def _rows(self, ids: Any) -> list[np.ndarray]:
        """Any accepted form of prompt as a list of checked i64 rows."""
        return token_rows(ids, self.vocab_size)

    def token_ids(self, ids: Any) -> np.ndarray:
        """Integers in range, as an array i64 of their shape; DfssmError for anything else."""
        return token_ids(ids, self.vocab_size)
