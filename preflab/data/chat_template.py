"""Chat-template rendering for every stage: messages in, text and token ids out."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import jinja2

from preflab.data.messages import OPTIONS, THOUGHT_KEYS, WEIGHT
from preflab.data.template_date import template_date, with_fixed_date
from preflab.data.template_limits import template_limits
from utils.errors import UserError

# raise_exception in a template is a TemplateError. The others come from templates that index turns or keys which a
# conversation does not have, compute with them, recurse without an end, exceed the sandbox's limit of a range, or are
# no Python once Jinja has compiled them.
REFUSALS = (
    jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError,
    SyntaxError,
)  # fmt: skip


# Not a UserError: the callers count refused conversations as dropped rows and continue with the others.
class TemplateRefused(Exception):
    """The chat template rejected a conversation, e.g. two user turns in a row. The message is the template's own."""


@dataclass
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Special tokens come only from the template, so BOS is never doubled. For templates without a system role (Gemma),
    the system text is prepended to the first user turn.

    Attributes:
        tokenizer: a transformers tokenizer with a chat template.
        template: a template that replaces the tokenizer's own, or None. A template that prints today's date is
            replaced by one with a fixed date (preflab.data.template_date).
        folds_system: whether the template has no system role.
    """

    tokenizer: object
    template: str | None = None
    folds_system: bool = field(init=False)

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.tokenizer.name_or_path} has no chat template, which conversations need: use an instruct model"
                " or pass --chat_template_path FILE"
            )
        used = self.template if self.template is not None else self.tokenizer.chat_template
        if template_date(used):
            self.template = with_fixed_date(used)
        # Templates without a system role either raise or silently drop the text.
        probe = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "x"}]
        try:
            self.folds_system = "SYSTEM-PROBE" not in self._text(probe, True)
        except TemplateRefused:
            self.folds_system = True

    def _text(self, messages: list[dict], generation_prompt: bool) -> str:
        try:
            messages, arguments = _template_arguments(messages)
            if self.template is not None:
                arguments = {"chat_template": self.template, **arguments}
            # As text, not ids: one batched tokenizer call (`ids`) is faster, and a span of characters can be mapped to
            # tokens.
            with template_limits(self.tokenizer.name_or_path):
                return self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt, **arguments
                )
        except REFUSALS as error:
            raise TemplateRefused(str(error)) from error

    def fold(self, messages: list[dict]) -> list[dict]:
        """`messages` with the system text in the first user turn, if the template has no system role."""
        if not (self.folds_system and messages and messages[0]["role"] == "system"):
            return messages
        first, rest = messages[0], messages[1:]
        if not rest or rest[0]["role"] != "user":
            return [{**first, "role": "user"}, *rest]
        return [{**first, **rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]

    def prompt_text(self, messages: list[dict]) -> str:
        """Render a prompt up to where the assistant's answer starts. Raises TemplateRefused."""
        return self._text(self.fold(messages), True)

    def full_text(self, messages: list[dict], response: str, keys: dict | None = None) -> str:
        """Render a prompt and the assistant's `response` with its end-of-turn token. Raises TemplateRefused.

        Args:
            keys: further keys of the assistant's message (tool calls, thoughts).
        """
        return self._text([*self.fold(messages), {"role": "assistant", "content": response, **(keys or {})}], False)

    def answers(self, turns: list[dict], trained: bool = True) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation and find the character span of each answer, including its end-of-turn token.

        An answer that the template renders differently once turns follow it (e.g. without its reasoning) is omitted,
        because its tokens in the full conversation are not those that the model generated.

        Args:
            trained: find the answers to train on, or those that the data exclude ("weight": 0).

        Returns:
            (text, spans): spans as (first character, end) in `text`.

        Raises:
            TemplateRefused: the template rejects the conversation.
        """
        turns = self.fold(turns)
        full, spans = self._text(turns, False), []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant" and (turn.get(WEIGHT) != 0) == trained:
                # The prompt before the answer, and the conversation that ends with it.
                opening, closed = self._text(turns[:i], True), self._text(turns[: i + 1], False)
                # Some templates render the end of the prompt differently when an answer follows (an empty reasoning
                # block), so the answer starts where the two texts diverge, which may be before the end of `opening`.
                start = shared_prefix(opening, full)
                if full.startswith(closed):
                    spans.append((start, len(closed)))
        return full, spans

    @cached_property
    def reads_input(self) -> bool:
        """Whether the template renders Alpaca's `input` as a separate key."""
        return "INPUT-PROBE" in self._text([{"role": "user", "content": "x", "input": "INPUT-PROBE"}], True)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts; no special tokens are added."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def end_ids(self) -> set[int]:
        """The ids that end an answer: the first special token that the template puts after it, or EOS."""
        try:
            text = self.full_text([{"role": "user", "content": "x"}], "ANSWER-PROBE")
        except TemplateRefused:
            text = ""
        # The text behind the last occurrence: what the template appends to an answer, e.g. <|im_end|> and a newline.
        tail = self.ids([text.rpartition("ANSWER-PROBE")[2]])[0]
        special = set(self.tokenizer.all_special_ids)
        # Only the first special token: some templates append EOS or the next turn's header after the end of the turn.
        return set([i for i in tail if i in special][:1] or [self.tokenizer.eos_token_id]) - {None}


def plain_texts(prompt: str, answers: tuple[str, ...], tokenizer) -> list[str]:
    """A text prompt, and the prompt with each answer, as TRL has them: the tokenizer adds BOS, each ends with EOS."""
    eos = tokenizer.eos_token or ""
    while tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        prompt = prompt[len(tokenizer.bos_token) :]
    return [prompt, *(prompt + (answer if answer.endswith(eos) else answer + eos) for answer in answers)]


def encoded(texts: list[str], is_plain: list[bool], tokenizer, **options) -> dict[str, list]:
    """The tokenizer's columns for texts; plain text gets its special tokens, a rendered chat none.

    Args:
        is_plain: which texts are plain text.
        options: of the tokenizer.
    """
    # Two calls, since add_special_tokens applies to a complete batch; the results are merged in order.
    results = {}
    for plain in set(is_plain):
        part = [text for text, p in zip(texts, is_plain, strict=True) if p == plain]
        results[plain] = tokenizer(part, add_special_tokens=plain, **options)
    columns = {}
    for name in ("input_ids", "offset_mapping") if options.get("return_offsets_mapping") else ("input_ids",):
        rows = {plain: iter(result[name]) for plain, result in results.items()}
        columns[name] = [next(rows[plain]) for plain in is_plain]
    return columns


def training_template(tokenizer) -> str | None:
    """TRL's training version of the tokenizer's chat template, which renders every turn as it was generated.

    None where the template needs none, or is not one of those that TRL knows.
    """
    # Not at the top: it imports torch.
    from trl.chat_template_utils import get_training_chat_template

    try:
        with template_limits(tokenizer.name_or_path):
            return get_training_chat_template(tokenizer)
    # TRL raises ValueError for a template that it does not know, and the template's own errors in its probes.
    except REFUSALS:
        return None


def thoughts_of(message: dict) -> list[str]:
    """The thoughts of a message: inside <think> tags of its content, or under a separate key."""
    thoughts = [message[key] for key in THOUGHT_KEYS if isinstance(message.get(key), str)]
    if "</think>" in message["content"]:
        thoughts += re.findall(r"(?:<think>|^)(.*?)</think>", message["content"], re.DOTALL)
    return [thought.strip() for thought in thoughts if thought.strip()]


def lost_parts(message: dict, rendered: str) -> list[str]:
    """What of a message its chat template removes: "thoughts", "tool_calls", or the "text" beside tool calls."""
    lost = ["thoughts"] if any(thought not in rendered for thought in thoughts_of(message)) else []
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        if any(name not in rendered for name in _function_names(calls)):
            lost.append("tool_calls")
        # Some templates render either the text or the call.
        text = message["content"].rpartition("</think>")[2].strip()
        if text and text not in rendered:
            lost.append("text")
    return lost


def lost_options(messages: list[dict], rendered: str, template: str) -> list[str]:
    """What a row gives its template that the template does not use: "tools", "chat_template_kwargs"."""
    first = messages[0] if messages else {}
    tools, arguments = first.get("tools"), first.get("chat_template_kwargs")
    lost = ["tools"] if tools and any(name not in rendered for name in _function_names(tools)) else []
    return lost + (["chat_template_kwargs"] if arguments and any(key not in template for key in arguments) else [])


def _function_names(calls: list) -> list[str]:
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)]


def _template_arguments(messages: list[dict]) -> tuple[list[dict], dict]:
    """The messages as templates expect them, and the template's arguments that the first message carries."""
    if all(len(message) == 2 for message in messages):
        return messages, {}
    first = messages[0]
    # As TRL: the row's own arguments come last.
    arguments = {"tools": first.get("tools"), **first.get("chat_template_kwargs", {})}
    hidden = {*OPTIONS, WEIGHT}
    return [{k: v for k, v in message.items() if k not in hidden} for message in messages], arguments


def neutralise(text: str, tokenizer) -> str:
    """Insert a space into every special token that `text` spells out, so that it is tokenized as plain text.

    Otherwise a prompt or answer that spells `<|im_end|>` could end its turn and write another role's message.
    """
    pattern = special_token_pattern(tokenizer)
    return break_up(pattern, text) if pattern else text


def special_token_pattern(tokenizer) -> re.Pattern | None:
    """A pattern that matches the tokenizer's special tokens as text, None if it has none."""
    # Both sources: a model's turn markers may be added tokens that are not listed among its all_special_tokens.
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    # Longest first, so that no token hides a longer one; single characters are ordinary text.
    patterns = [re.escape(token) for token in sorted(special, key=len, reverse=True) if len(token) > 1]
    return re.compile("|".join(patterns)) if patterns else None


# Turn markers of Llama, Gemma, Mistral, Qwen and Phi, for endpoints whose tokenizer is unknown.
CONTROL_TOKENS = re.compile(r"<\|\w+\|>|</?(?:start_of_turn|end_of_turn|bos|eos|pad|s)>|\[/?INST\]|<</?SYS>>")


def spells_markers(texts: list[str]) -> bool:
    """Whether a text of a conversation spells turn markers out: a text that is already rendered, or one about them."""
    # The substring test is far faster than the pattern, and most texts have neither character.
    return any(("<" in text or "[" in text) and CONTROL_TOKENS.search(text) is not None for text in texts)


def break_up(pattern: re.Pattern, text: str) -> str:
    """Insert a space after the first character of every match of `pattern`."""
    return pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)


def shared_prefix(a: list | str, b: list | str) -> int:
    """Number of leading ids, messages or characters that `a` and `b` share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
