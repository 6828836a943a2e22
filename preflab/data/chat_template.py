"""The one chat-template renderer: messages in, text and token ids out."""

import re
from dataclasses import dataclass, field
from functools import cached_property

from utils.errors import UserError


class TemplateRefused(Exception):
    """The chat template refused a conversation (two user turns in a row, say); the message is the template's own."""


@dataclass
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Special tokens come from the template alone, so the leading BOS is there exactly as often as the template puts
    it. A template without a system role (Gemma) gets the system text folded into the first user turn.
    """

    tokenizer: object
    folds_system: bool = field(init=False)

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.tokenizer.name_or_path} has no chat template but the data are messages: use an instruct model,"
                " or give one with --chat_template_path FILE"
            )
        probe = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "x"}]
        try:
            self.folds_system = "SYSTEM-PROBE" not in self._text(probe, True)
        except TemplateRefused:
            self.folds_system = True

    def _text(self, messages: list[dict], generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise TemplateRefused(str(error)) from error

    def fold(self, messages: list[dict]) -> list[dict]:
        """`messages` with a system turn joined to the first user turn, where the template knows no system role."""
        if not (self.folds_system and messages and messages[0]["role"] == "system"):
            return messages
        system, rest = messages[0]["content"], messages[1:]
        if not rest or rest[0]["role"] != "user":
            return [{"role": "user", "content": system}, *rest]
        return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]

    def prompt_text(self, messages: list[dict]) -> str:
        """The prompt, up to the point where the assistant's answer starts. Raises TemplateRefused."""
        return self._text(self.fold(messages), True)

    def full_text(self, messages: list[dict], response: str) -> str:
        """The prompt and the assistant's `response`, with its end-of-turn token. Raises TemplateRefused."""
        return self._text([*self.fold(messages), {"role": "assistant", "content": response}], False)

    def answers(self, turns: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """A rendered conversation, and the spans of it that are answers, each with the token that ends it.

        An answer that the template writes otherwise once turns follow it (without its thoughts, say) is left out.
        Raises TemplateRefused.
        """
        turns = self.fold(turns)
        whole, spans = self._text(turns, False), []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                opening, closed = self._text(turns[:i], True), self._text(turns[: i + 1], False)
                start = shared_prefix(opening, whole)
                if i + 1 == len(turns) or (start == len(opening) and whole.startswith(closed)):
                    spans.append((start, len(closed)))
        return whole, spans

    @cached_property
    def reads_input(self) -> bool:
        """Whether the template has a place of its own for Alpaca's `input`."""
        return "INPUT-PROBE" in self._text([{"role": "user", "content": "x", "input": "INPUT-PROBE"}], True)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts, with no special token beyond those in the text."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def end_ids(self) -> set[int]:
        """The ids that end an answer: the first special token that the template puts after it, else EOS."""
        try:
            whole = self.full_text([{"role": "user", "content": "x"}], "ANSWER-PROBE")
        except TemplateRefused:
            whole = ""
        tail = self.ids([whole.rpartition("ANSWER-PROBE")[2]])[0]
        special = set(self.tokenizer.all_special_ids)
        return set([i for i in tail if i in special][:1] or [self.tokenizer.eos_token_id]) - {None}


def neutralise(text: str, tokenizer) -> str:
    """`text` with a space put into every special token written out in it, so that it is read as text.

    A prompt or answer that spells `<|im_end|>` could otherwise end its turn and speak in another's name.
    """
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    found = [re.escape(token) for token in sorted(special, key=len, reverse=True) if len(token) > 1]
    return break_up(re.compile("|".join(found)), text) if found else text


# What ends or opens a turn in the templates of Llama, Gemma, Mistral, Qwen and Phi: a server's tokenizer is not known.
CONTROL_TOKENS = re.compile(r"<\|\w+\|>|</?(?:start_of_turn|end_of_turn|bos|eos|pad|s)>|\[/?INST\]|<</?SYS>>")


def break_up(pattern: re.Pattern, text: str) -> str:
    """`text` with a space after the first character of whatever matches."""
    return pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)


def shared_prefix(a: list | str, b: list | str) -> int:
    """Number of leading ids, messages or characters that `a` and `b` have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
