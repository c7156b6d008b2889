"""What may be asked for: the fields of OpenAI's requests, and a few more that other servers have too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt

from dfssm.runtime import GenerationConfig


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class TextRequest(BaseModel):
    """The fields of both endpoints. What is not among them is refused: an option without effect would mislead.

    `GenerationConfig` says what the options of sampling mean, and checks their ranges.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: NonNegativeInt | None = None
    n: PositiveInt = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    seed: int | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    logit_bias: dict[int, FiniteFloat] | None = None
    # Not OpenAI's.
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    # Without effect on the answer.
    user: str | None = None
    metadata: Any = None
    store: Any = None

    @property
    def tokens(self) -> int | None:
        return self.max_tokens

    def config(self, max_tokens: int, logprobs: int | None) -> GenerationConfig:
        """How each of the texts is made, but for its seed. DfssmError for a value out of range."""
        names = ("top_p", "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in (*names, "ignore_eos") if (value := getattr(self, name)) is not None}
        return GenerationConfig(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=self.seed,
            stop=self.stop,
            stop_ids=self.stop_token_ids or (),
            logprobs=logprobs,
            **given,
        )


class CompletionRequest(TextRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str | list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[Part]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content} | name


class ChatRequest(TextRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: NonNegativeInt | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
