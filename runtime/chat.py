"""A conversation: a state that has read it, so that each turn reads only what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfssm.targets.text import encode

from .generation import Generation, GenerationConfig

if TYPE_CHECKING:
    from .engine import Engine


class Chat:
    """A conversation with the model of `engine`, by its chat template.

    Attributes:
        messages: what was said so far, as the template takes it; the answer that is being made is not yet in it.
        state: has read all of it, in the tokens that the model itself chose.
    Raises DfssmError where the bundle has no chat template.
    """

    def __init__(self, engine: Engine, config: GenerationConfig = GenerationConfig(), system: str | None = None):  # noqa: B008
        self.engine, self.config = engine, config
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.state = engine.new_state()
        self._template, self._tokenizer = engine.chat_template, engine.tokenizer
        self._prompt = self._read = ""  # the text before the last answer; that which the state has read, "" for none
        self._answer: Generation | None = None
        self._before: Generation | None = None  # the answer before it

    def say(self, text: str, speculate: int = 0, **options: Any) -> Generation:
        """The model's answer to `text`: pieces, as of `Engine.generate`. `options`: fields of `GenerationConfig` that
        are not as in the chat's. The answer to the message before is ended, where it has not.
        """
        self._end_answer()
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template(messages)
        read = self._read if prompt.startswith(self._read) else ""
        if not read:  # the first turn, or a template that writes old answers in another way
            self.state.reset()
        new = encode(prompt[len(read) :], self._tokenizer, begins=False)
        answer = self.engine.generate(
            new, self.config, state=self.state, after=self._before if read else None, speculate=speculate, **options
        )
        self.messages, self._prompt, self._answer = messages, prompt, answer
        return answer

    def _end_answer(self) -> None:
        """Add it to the messages."""
        if (answer := self._answer) is None:
            return
        answer.close()
        half_a_character = answer.flush()
        self.messages.append({"role": "assistant", "content": answer.text})
        # A stop string is read and not said; a prompt that was interrupted is read in part.
        same = answer.text == answer.whole_text and answer.prefill_seconds and not self.state.rows.broken
        self._read = self._prompt + answer.text if same and not half_a_character else ""
        self._before, self._answer = answer, None
