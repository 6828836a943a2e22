"""One preference pair out of one row: prompts and answers as messages or as plain text.

TRL's explicit and implicit prompts, UltraFeedback's message lists that repeat the prompt, Anthropic's
`\\n\\nHuman: ... \\n\\nAssistant: ...` transcripts, and what preflab.data.schemas reads.
"""

from collections import Counter
from dataclasses import dataclass

from preflab.data.answer_lists import is_list_row, parse_list
from preflab.data.chat_template import shared_prefix
from preflab.data.messages import check_messages, extras, read_transcript, transcript
from preflab.data.prompt_format import AS_TEXT, NEEDS_TEMPLATE, TURNS, WRAPPED, PromptFormat
from preflab.data.row_fields import TRANSCRIPT, Fields, Parsed, complete_messages, prompt_turns
from preflab.data.schemas import LISTS, PAIRS, parse_pair, schema_of
from preflab.data.sources import folded
from utils.errors import UserError

UNREAD_LIST = (
    "train on all answers with --loss_type plackett_luce, on the best and the worst with --lists, or make pairs with"
    " `python generate_preference_pairs.py --answers given --scorer columns --dataset_name NAME`"
)


@dataclass
class Pair:
    """One preference pair as text.

    Attributes:
        chosen, rejected: the two answers.
        messages, text: the prompt, as a conversation or as plain text; the other one is None.
        score_chosen, score_rejected: the annotators' scores, if the data has them.
        win_chosen, win_rejected: estimated win probabilities (SPPO), if the data has them.
        source: file and row, for error messages and artifacts.
        prompt_kind: TURNS, WRAPPED, or why a text prompt stays text (preflab.data.prompt_format).
        keys: what the chosen and the rejected message have beside their text (tool calls, thoughts).
        others: of a row with several answers, those between the best (chosen) and the worst (rejected), best first.
        scores: the score of every answer of such a row, from the best to the worst; empty for a pair.
    """

    chosen: str
    rejected: str
    messages: list[dict] | None = None
    text: str | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    win_chosen: float | None = None
    win_rejected: float | None = None
    source: str = ""
    prompt_kind: str = TURNS
    keys: tuple[dict, dict] = ({}, {})
    others: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def prompt_text(self) -> str:
        """The complete prompt as one text, roles included."""
        return self.text if self.messages is None else transcript(self.messages)

    @property
    def prompt_key(self) -> str:
        """The prompt's text without case and spacing: equal for prompts that count as duplicates."""
        return folded(self.prompt_text)


def to_pair(
    row: dict,
    source: str,
    prompt_format: PromptFormat = AS_TEXT,
    unused: Counter | None = None,
    lists: bool = False,
) -> Pair | str:
    """Normalise one row of any supported format.

    Args:
        row: the parsed row.
        source: file and row, for error messages and `Pair.source`.
        prompt_format: which text prompts become user turns.
        unused: counts what the row holds and this function does not use, by column.
        lists: read a row with several scored answers as its best and its worst, with the others between them.

    Returns:
        A Pair, or the name of the filter that drops the row.

    Raises:
        UserError: the row fits no format; the message names row and key.
    """
    fields = Fields(row, source, "'chosen' and 'rejected'", unused)
    answers, ranks = [], []
    is_list = is_list_row(row)
    if is_list and not lists and schema_of(row, PAIRS) is None:
        schema = schema_of(row, LISTS)
        raise UserError(
            f"{source}: a row of {schema.name if schema else 'several answers'} holds no pair; {UNREAD_LIST}"
        )
    if is_list and lists:
        parsed = parse_list(fields)
        if not isinstance(parsed, str):
            parsed, answers, ranks = parsed
    else:
        parsed = parse_pair(fields)
    if isinstance(parsed, str):
        return parsed
    fields.count_unused()
    (chosen, rejected), prompt = parsed.answers, parsed.prompt
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise UserError(f"{source}: 'chosen' and 'rejected' must both be text or both be message lists")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise UserError(f"{source}: key 'prompt' must be text or a message list, not {type(prompt).__name__}")
    # Four formats of plain text, from the most to the least specific; the first three become message lists.
    pair = None
    if isinstance(chosen, str):
        # Anthropic's hh-rlhf: both transcripts repeat the dialogue, whose common turns `_chat_pair` makes the prompt.
        if prompt is None and chosen.startswith(TRANSCRIPT) and rejected.startswith(TRANSCRIPT):
            chosen, rejected = (
                read_transcript(text, source, key) for text, key in ((chosen, "chosen"), (rejected, "rejected"))
            )
        elif isinstance(prompt, str) and prompt.startswith(TRANSCRIPT):
            answers = _without_prompt(prompt, chosen, rejected)
            # Without the open `Assistant:` turn: the chat template writes the start of the answer.
            prompt = prompt_turns(prompt, source, "prompt")
            chosen, rejected = ([{"role": "assistant", "content": text.strip()}] for text in answers)
        elif isinstance(prompt, list):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        else:
            pair = _plain_pair(prompt, chosen, rejected, source, prompt_format.with_turns_before(parsed.before))
    if pair is None:
        pair = _chat_pair(prompt, chosen, rejected, source, fields.unused)
    if isinstance(pair, str):
        return pair
    # What is cut from the best and the worst answer (a repeated prompt) is cut from all.
    cut = len(answers[0]) - len(pair.chosen) if answers else 0
    pair.others = tuple(text[cut:] if text.startswith(answers[0][:cut]) else text for text in answers[1:-1])
    pair.scores = tuple(ranks)
    return _complete(pair, parsed)


def _complete(pair: Pair, parsed: Parsed) -> Pair:
    """The pair with what its row holds beside prompt and answers: earlier turns, template arguments, scores."""
    for name, value in parsed.scores.items():
        setattr(pair, name, value)
    if pair.messages is not None:
        pair.messages = complete_messages(pair.messages, parsed, pair.source)
    elif parsed.before:
        raise UserError(f"{pair.source}: {NEEDS_TEMPLATE}")
    return pair


def _plain_pair(prompt: str | None, chosen: str, rejected: str, source: str, prompt_format: PromptFormat) -> Pair | str:
    """A pair of plain texts; without a prompt, their common prefix is the prompt."""
    # Without a prompt, equal texts have no point at which prompt and answer separate.
    if prompt is None:
        if chosen == rejected:
            return "identical_responses"
        # As TRL's extract_prompt: the common prefix, less a space that belongs to the answer's first token.
        # An answer keeps at least one character, also where one text is a prefix of the other.
        cut = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        cut -= cut > 0 and chosen[cut - 1] == " "
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        cut_from_answers = "prompt"
    else:
        answers = _without_prompt(prompt, chosen, rejected)
        cut_from_answers = "repeated" if answers != (chosen, rejected) else ""
        chosen, rejected = answers
    kind = prompt_format.kind(prompt, (chosen, rejected), cut_from_answers)
    content = {"messages": [{"role": "user", "content": prompt}]} if kind == WRAPPED else {"text": prompt}
    return Pair(chosen, rejected, **content, source=source, prompt_kind=kind)


def _chat_pair(prompt: str | list | None, chosen: list, rejected: list, source: str, unused: Counter) -> Pair | str:
    """A pair of message lists: the turns before the last one are the prompt and must be equal on both sides."""
    chosen, rejected = (
        check_messages(turns, source, key, unused=unused) for turns, key in ((chosen, "chosen"), (rejected, "rejected"))
    )
    if isinstance(prompt, list):
        # Explicit prompt; some data sets repeat it at the start of both answers.
        prompt = check_messages(prompt, source, "prompt", unused=unused)
        n = len(prompt)
        chosen = chosen[n:] if chosen[:n] == prompt else chosen
        rejected = rejected[n:] if rejected[:n] == prompt else rejected
    else:
        # Implicit prompt: the common turns, but never the last turn of either side.
        n = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        # Only the answers are message lists: the prompt string is the complete prompt.
        if n <= 0 and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        else:
            # n is -1 where a side is an empty list; as a slice it would count from the end.
            text, n = prompt, max(n, 0)
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
            # Common turns without a user turn (a system message): the prompt string is the user's turn.
            if isinstance(text, str) and not any(m["role"] == "user" for m in prompt):
                prompt = [*prompt, {"role": "user", "content": text}]
    if not prompt:
        raise UserError(f"{source}: 'chosen' and 'rejected' have no common first message and there is no 'prompt'")
    if not chosen or not rejected:
        return "empty_response"
    # Dialogues with different user turns do not compare two answers to the same prompt, as DPO assumes.
    if len(chosen) > 1 or len(rejected) > 1:
        ends = {chosen[-1]["role"], rejected[-1]["role"]}
        return "ends_with_user_turn" if "user" in ends else "diverges_before_last_turn"
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        return "last_turn_not_assistant"
    (good,), (bad,) = chosen, rejected
    return Pair(good["content"], bad["content"], prompt, source=source, keys=(extras(good), extras(bad)))


def _without_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str]:
    """Both answers without the prompt, if both repeat it."""
    # Both or neither: an answer may begin with the prompt's words by chance.
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        return chosen[len(prompt) :], rejected[len(prompt) :]
    return chosen, rejected
