"""What may be asked for: the fields of OpenAI's requests, and a few more that other servers have too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, Json, NonNegativeInt, PositiveInt, model_validator

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


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: Json[Any]


class ToolCall(BaseModel):
    """What the model called in an earlier answer. The arguments are JSON in a string; templates take what it says."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message without tool_calls has content")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        found = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            found["content"] = "".join(part.text for part in self.content)
        return {"content": ""} | found


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(TextRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: NonNegativeInt | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None  # nothing makes a model call one

    @property
    def given(self) -> list[dict[str, Any]] | None:
        """The tools that the template gets."""
        return [tool.model_dump() for tool in self.tools] if self.tools and self.tool_choice != "none" else None

    @property
    def tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
