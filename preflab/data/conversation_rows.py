"""One SFT conversation out of one row.

Formats: chat (`messages`, or ShareGPT's `conversations`), Alpaca (instruction, input, output), a prompt with a
completion, KTO (rows labelled true), and preference rows, whose chosen answer is used. `system` and `history` become
turns.
"""

from collections import Counter
from dataclasses import dataclass

from preflab.data.chat_template import ChatRenderer
from preflab.data.messages import check_messages, check_unicode, from_json_text, role_of, transcript, up_to_last
from preflab.data.pair_rows import to_pair
from preflab.data.prompt_format import AS_CHAT, LEFT_AS_TEXT, NEEDS_TEMPLATE, TURNS, WRAPPED, PromptFormat
from preflab.data.row_fields import (
    PROMPTS,
    TRANSCRIPT,
    Fields,
    Parsed,
    complete_messages,
    ensure_no_pictures,
    is_true,
    prompt_turns,
    read_options,
    read_prompt,
)
from preflab.data.schemas import GIVEN, LISTS, PAIRS, Schema, parse_pair, read_answer, schema_of
from preflab.data.sources import folded
from utils.errors import UserError

# Columns that hold a complete conversation, and columns of an answer beside a prompt.
CONVERSATIONS = ("messages", "conversations")
ANSWERS = ("completion", "response", "output", "answer", "chosen")


@dataclass
class Conversation:
    """A conversation that ends with an answer.

    Attributes:
        messages: the turns; Alpaca's instruction is the user's.
        source: file and row, for error messages and artifacts.
        input: Alpaca's `input`, which its own template renders in a separate section.
        prompt_kind: TURNS, WRAPPED, or why a text prompt stays text (preflab.data.prompt_format).
    """

    messages: list[dict]
    source: str
    input: str = ""
    prompt_kind: str = TURNS

    @property
    def is_text(self) -> bool:
        """Whether prompt and answer, the only two messages, are trained as plain text without a chat template."""
        return self.prompt_kind in LEFT_AS_TEXT

    @property
    def turns(self) -> list[dict]:
        """All turns, with Alpaca's input appended to the instruction."""
        if not self.input:
            return self.messages
        return self._with_question({"content": f"{self.messages[-2]['content']}\n\n{self.input}"})

    def turns_for(self, chat: ChatRenderer) -> list[dict]:
        """All turns as the template expects them: Alpaca's own template takes the input as a separate key."""
        if not (self.input and chat.reads_input):
            return self.turns
        return self._with_question({"input": self.input})

    def _with_question(self, change: dict) -> list[dict]:
        """The turns with a changed last question; an Alpaca row ends with question and answer."""
        return [*self.messages[:-2], {**self.messages[-2], **change}, self.messages[-1]]

    @property
    def prompt_key(self) -> str:
        """The prompt's text without case and spacing: equal for prompts that count as duplicates."""
        # Earlier answers are part of the prompt: dialogues that differ in one are different prompts.
        return folded(transcript(self.turns[:-1]))


def to_conversation(
    row, source: str, unused: Counter | None = None, prompt_format: PromptFormat = AS_CHAT
) -> Conversation | str:
    """Normalise one row of any supported format.

    Args:
        unused: counts what the row holds and this function does not use, by column.
        prompt_format: which text prompts become user turns.

    Returns:
        A Conversation, or the reason to drop the row.

    Raises:
        UserError: the row fits no format; the message names row and key.
    """
    fields = Fields(row, source, "an instruction", unused)
    # KTO: an answer that people did not want is not an example to learn from.
    if "label" in row and "completion" in row and fields.take("label") is not None and not is_true(row["label"]):
        return "labelled_false"
    ensure_no_pictures(fields)
    parsed = Parsed(options=read_options(fields))
    conversation = _read(fields, parsed, prompt_format)
    if isinstance(conversation, str):
        return conversation
    fields.count_unused()
    if conversation.is_text and parsed.before:
        raise UserError(f"{source}: {NEEDS_TEMPLATE}")
    conversation.messages = complete_messages(conversation.messages, parsed, source)
    return conversation


def _read(fields: Fields, parsed: Parsed, prompt_format: PromptFormat) -> Conversation | str:
    """The row's conversation without what `parsed` collects beside it: earlier turns and template arguments."""
    row, source = fields.row, fields.source
    answer_key = next((k for k in ANSWERS if row.get(k) is not None), None)
    # Chat rows first: UltraFeedback's preference rows hold their chosen dialogue under `messages` too. An empty list
    # counts as missing.
    for key in CONVERSATIONS:
        turns = from_json_text(row[key]) if row.get(key) else None
        if turns and not (answer_key and _ends_with_question(turns)):
            fields.take(key)
            read_prompt(fields, parsed, ())
            return _usable(check_messages(turns, source, key, unused=fields.unused), source)
    if isinstance(row.get("instruction"), str) and row.get("output") is not None:
        return _alpaca(fields, parsed, prompt_format)
    schema = schema_of(row, PAIRS)
    if schema and _has_text_answers(row, schema):
        return _chosen_of_text_pair(fields, prompt_format)
    # Implicit-prompt preference data holds the complete dialogue under `chosen` and has no prompt.
    if answer_key and (answer_key == "chosen" or any(row.get(k) is not None for k in PROMPTS)):
        return _prompt_and_answer(fields, parsed, answer_key, prompt_format)
    if schema:
        return _chosen_of_pair(fields, parsed)
    listed = schema_of(row, LISTS)
    if listed:
        raise UserError(
            f"{source}: a row of {listed.name} holds several answers; {GIVEN}, whose chosen answers SFT uses"
        )
    raise UserError(
        f"{source}: no conversation found (keys: {', '.join(sorted(map(str, row)))}); a row has 'messages',"
        " 'instruction' and 'output' (optionally 'input'), 'prompt' and 'completion', or 'prompt' and 'chosen'; name"
        " other columns, e.g. --columns prompt=A completion=B"
    )


def _ends_with_question(turns) -> bool:
    return isinstance(turns, list) and role_of(turns[-1]) == "user"


def _alpaca(fields: Fields, parsed: Parsed, prompt_format: PromptFormat) -> Conversation | str:
    row, source = fields.row, fields.source
    context = fields.take("input") or ""
    for key, value in (("input", context), ("output", fields.take("output"))):
        if not isinstance(value, str):
            raise UserError(f"{source}: key {key!r} must be text, not {type(value).__name__}")
    fields.take("instruction")
    read_prompt(fields, parsed, ())
    turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    conversation = _usable(turns, source)
    # `input` is kept apart from the instruction, because Alpaca's own template renders it in a separate section.
    if isinstance(conversation, Conversation):
        conversation.input = context.strip()
        # An instruction is a user's turn by its name, so only the user can make it a text.
        conversation.prompt_kind = "requested" if prompt_format.choice == "text" else WRAPPED
    return conversation


def _prompt_and_answer(fields: Fields, parsed: Parsed, key: str, prompt_format: PromptFormat) -> Conversation | str:
    """A row with a prompt and an answer under `key`, each as text or as messages."""
    source, answer = fields.source, read_answer(fields.take(key))
    parsed.answers = [answer]
    read_prompt(fields, parsed, PROMPTS)
    prompt = parsed.prompt
    answer_turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    answer_turns = check_messages(answer_turns, source, key, unused=fields.unused)
    if isinstance(prompt, list):
        prompt_part = check_messages(prompt, source, "prompt", unused=fields.unused)
        repeated = answer_turns[: len(prompt_part)] == prompt_part
    else:
        # A message list with a user turn is the complete conversation; `prompt` only repeats its question.
        repeated = isinstance(answer, list) and any(m["role"] == "user" for m in answer_turns)
        prompt_part = [] if prompt is None or repeated else prompt_turns(prompt, source, "prompt")
    conversation = _usable(answer_turns if repeated else [*prompt_part, *answer_turns], source)
    if isinstance(conversation, Conversation) and isinstance(prompt, str) and isinstance(answer, str):
        # A transcript is turns already.
        if not prompt.startswith(TRANSCRIPT):
            conversation.prompt_kind = prompt_format.with_turns_before(parsed.before).kind(prompt, (answer,), "")
    return conversation


def _has_text_answers(row: dict, schema: Schema) -> bool:
    answers = [read_answer(row[name]) for name in schema.answers]
    return not schema.texts_by_turn and all(isinstance(answer, str) for answer in answers)


def _chosen_of_text_pair(fields: Fields, prompt_format: PromptFormat) -> Conversation | str:
    """The better answer of a row with two texts, whose prompt and its format are those of training on the pair."""
    pair = to_pair(fields.row, fields.source, prompt_format, fields.unused)
    if isinstance(pair, str):
        return pair
    # `to_pair` has counted the unused columns, and has put system text and earlier turns into the messages.
    fields.used.update(fields.row)
    prompt = [{"role": "user", "content": pair.text}] if pair.messages is None else pair.messages
    conversation = _usable([*prompt, {"role": "assistant", "content": pair.chosen}], fields.source)
    if isinstance(conversation, Conversation):
        conversation.prompt_kind = pair.prompt_kind
    return conversation


def _chosen_of_pair(fields: Fields, parsed: Parsed) -> Conversation | str:
    """The better answer of a row with two answers and an order."""
    pair = parse_pair(fields)
    if isinstance(pair, str):
        return pair
    parsed.before, parsed.options = pair.before, pair.options
    chosen = pair.answers[0]
    turns = [] if pair.prompt is None else prompt_turns(pair.prompt, fields.source, "prompt")
    answer = chosen if isinstance(chosen, list) else [{"role": "assistant", "content": chosen}]
    return _usable([*turns, *check_messages(answer, fields.source, "answer", unused=fields.unused)], fields.source)


def _usable(messages: list[dict], source: str) -> Conversation | str:
    """The conversation up to its last answer, or the reason to drop it."""
    # Turns after the last answer have no target to train on.
    messages = up_to_last(messages, "assistant")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        return "empty_prompt"
    # A last answer that only calls a tool has no text.
    if not messages[-1]["content"].strip() and len(messages[-1]) == 2:
        return "empty_response"
    check_unicode([m["content"] for m in messages], source)
    return Conversation(messages, source)
