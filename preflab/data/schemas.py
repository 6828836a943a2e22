"""The layouts of rows that people have: one rule per schema, tried in order, and the same table in docs/data.md.

A rule recognises a row by its columns and reads it as `Parsed`: what decides the prompt, and the answers with their
order.
"""

from collections.abc import Callable
from dataclasses import dataclass

from preflab.data.messages import from_json_text, role_of
from preflab.data.row_fields import (
    PROMPTS,
    TRANSCRIPT,
    Fields,
    Parsed,
    ensure_no_pictures,
    is_metadata,
    is_true,
    json_text,
    read_options,
    read_prompt,
    read_scores,
    required_number,
)
from utils.errors import UserError


@dataclass(frozen=True)
class Schema:
    """One layout of rows.

    Attributes:
        name: for messages and the table in docs/data.md.
        columns: a row with all of these columns is of this schema.
        example: a data set that has it.
        how: how it is read, for the table.
        answers: columns of the two answers, the chosen one first unless `better` decides.
        better: 0 or 1 for the better of the two answers, None for neither.
        items: the column with a list of answers, and per item its text and its score (higher is better).
        prompts: columns of the prompt, in order of preference.
        texts_by_turn: whether prompt and answers are lists with the text of each turn, as lists or as JSON text.
    """

    name: str
    columns: tuple[str, ...]
    example: str
    how: str
    answers: tuple[str, str] | None = None
    better: Callable[[Fields], int | None] | None = None
    items: tuple[str, Callable, Callable] | None = None
    prompts: tuple[str, ...] = PROMPTS
    texts_by_turn: bool = False


# ------------------------------------------------------------------------------------------------------------ order


def _by_sign(name: str, first_is_negative: bool = True) -> Callable[[Fields], int | None]:
    """The order of a signed strength of preference."""

    def better(fields: Fields) -> int | None:
        value = required_number(fields, name)
        return None if value == 0 else int((value > 0) == first_is_negative)

    return better


def _by_value(name: str, values: dict) -> Callable[[Fields], int | None]:
    """The order where a column names the better answer; other values are ties."""
    return lambda fields: values.get(str(fields.required(name)).strip().lower())


def _by_flags(first: str, second: str, tie: str | None = None) -> Callable[[Fields], int | None]:
    """The order of one column per answer: a flag, or a score. `tie` only says that these two are equal."""

    def better(fields: Fields) -> int | None:
        if tie is not None:
            fields.take(tie)
        a, b = (required_number(fields, name, flags=True) for name in (first, second))
        return None if a == b else int(b > a)

    return better


# Two answers and an order.
PAIRS = (
    Schema("HelpSteer 3", ("context", "response1", "response2", "overall_preference"), "nvidia/HelpSteer3",
           "a negative `overall_preference` chooses `response1`; 0 is dropped as a tie",
           ("response1", "response2"), _by_sign("overall_preference"), prompts=("context",)),
    Schema("HelpSteer 2 preference", ("prompt", "response_1", "response_2", "preference_strength"),
           "nvidia/HelpSteer2 (preference)", "a negative `preference_strength` chooses `response_1`; 0 is a tie",
           ("response_1", "response_2"), _by_sign("preference_strength")),
    Schema("PKU-SafeRLHF", ("response_0", "response_1", "better_response_id"), "PKU-Alignment/PKU-SafeRLHF",
           "`better_response_id` chooses; the safety columns are not used",
           ("response_0", "response_1"), _by_value("better_response_id", {"0": 0, "1": 1})),
    Schema("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), "stanfordnlp/SHP",
           "`labels` 1 chooses A, 0 chooses B; `history` is the post",
           ("human_ref_A", "human_ref_B"), _by_value("labels", {"1": 0, "0": 1}), prompts=("history",)),
    Schema("WebGPT", ("question", "answer_0", "answer_1", "score_0", "score_1"), "openai/webgpt_comparisons",
           "the higher score chooses", ("answer_0", "answer_1"), _by_flags("score_0", "score_1")),
    Schema("Summaries", ("info", "summaries", "choice"), "openai/summarize_from_feedback",
           "`choice` chooses; the prompt is the post (or article)",
           ("summaries", "summaries"), _by_value("choice", {"0": 0, "1": 1}), prompts=("info",)),
    Schema("OpenAI preference", ("input", "preferred_output", "non_preferred_output"), "OpenAI's fine-tuning API",
           "`input.messages` is the prompt, `input.tools` reach the template",
           ("preferred_output", "non_preferred_output"), prompts=("input",)),
    Schema("Chatbot Arena", ("conversation_a", "conversation_b", "winner"), "lmsys/chatbot_arena_conversations",
           "`winner` chooses; ties are dropped", ("conversation_a", "conversation_b"),
           _by_value("winner", {"model_a": 0, "model_b": 1})),
    Schema("Chatbot Arena, texts by turn", ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
           "lmarena-ai/arena-human-preference-55k",
           "the winner's flag chooses; ties are dropped, and rows of several turns whose earlier answers differ",
           ("response_a", "response_b"), _by_flags("winner_model_a", "winner_model_b", "winner_tie"), prompts=(),
           texts_by_turn=True),
    Schema("AlpacaFarm", ("instruction", "output_1", "output_2", "preference"), "tatsu-lab/alpaca_farm",
           "`preference` 1 or 2 chooses", ("output_1", "output_2"), _by_value("preference", {"1": 0, "2": 1})),
    Schema("argilla", ("chosen_response", "rejected_response"), "argilla/ultrafeedback-binarized-preferences",
           "`chosen_avg_rating` and `rejected_avg_rating` are the scores", ("chosen_response", "rejected_response")),
    Schema("chosen and rejected", ("chosen", "rejected"), "HuggingFaceH4/ultrafeedback_binarized, Intel/orca_dpo_pairs",
           "text or turns; the prompt is one of the prompt columns, or what both dialogues share",
           ("chosen", "rejected")),
)  # fmt: skip
# A ranked or scored list of answers: generate_preference_pairs.py --answers given makes the pairs.
LISTS = (
    Schema("Nectar", ("prompt", "answers"), "berkeley-nest/Nectar", "rank 1 is best",
           items=("answers", lambda item: item["answer"], lambda item: -float(item["rank"]))),
    Schema("UltraFeedback, raw", ("instruction", "completions"), "openbmb/UltraFeedback", "by `overall_score`",
           items=("completions", lambda item: item["response"], lambda item: float(item["overall_score"]))),
)  # fmt: skip
# One answer per row with a score or label; rows of one prompt form a list.
SCORED = (
    Schema("HelpSteer 1 and 2", ("prompt", "response", "helpfulness"), "nvidia/HelpSteer2",
           "rows of one prompt form a list, by `helpfulness`; SFT trains on every row",
           items=("response", str, lambda row: float(row["helpfulness"]))),
    Schema("KTO", ("prompt", "completion", "label"), "trl-lib/kto-mix-14k",
           "rows of one prompt form a list, true above false; SFT trains on true rows only",
           items=("completion", str, lambda row: float(is_true(row["label"])))),
)  # fmt: skip

GIVEN = (
    "`python generate_preference_pairs.py --answers given --scorer columns --dataset_name NAME` makes the pairs (best"
    " against worst; --pairs all: every two answers)"
)


def schema_of(row: dict, schemas: tuple[Schema, ...]) -> Schema | None:
    """The first schema whose columns the row has."""
    for schema in schemas:
        if all(name in row for name in schema.columns):
            # Lists of plain texts have their scores in another column (preflab.data.prompts).
            if schema in LISTS and not (isinstance(row[schema.items[0]], list) and _holds_dicts(row[schema.items[0]])):
                continue
            return schema
    return None


def _holds_dicts(items: list) -> bool:
    return bool(items) and isinstance(items[0], dict)


# ------------------------------------------------------------------------------------------------------ reading rows


def parse_pair(fields: Fields) -> Parsed | str:
    """Read a row with two answers and an order; a text is the reason to drop it.

    Raises:
        UserError: the row fits no schema of pairs; the message names its columns and the fix.
    """
    row, source = fields.row, fields.source
    schema = schema_of(row, PAIRS)
    if schema is None:
        raise UserError(f"{source}: {_no_pair(row)}")
    answers = [fields.required(name) for name in schema.answers]
    if schema.columns[0] == "info":
        answers = _summaries(answers[0], source)
    if schema.texts_by_turn:
        answers = [_dialogue(fields, name) for name in schema.answers]
        if None in answers:
            return "empty_response"
    better = schema.better(fields) if schema.better else 0
    if better is None:
        return "no_preference"
    answers = [read_answer(answer) for answer in (answers if better == 0 else answers[::-1])]
    ensure_no_pictures(fields)
    parsed = Parsed(answers=answers, options=read_options(fields), scores=read_scores(fields))
    # Complete dialogues hold their prompt; only a column named `prompt` may repeat it.
    complete = isinstance(answers[0], list) and answers[0] and not _starts_with_answer(answers[0])
    read_prompt(fields, parsed, ("prompt",) if complete and schema.prompts else schema.prompts)
    if parsed.prompt is None and all(isinstance(answer, str) for answer in answers):
        _ensure_no_other_text(fields, parsed)
    return parsed


def _no_pair(row: dict) -> str:
    """Why a row holds no pair, and what to do."""
    columns = ", ".join(sorted(map(str, row)))
    listed = schema_of(row, (*LISTS, *SCORED))
    if listed:
        return f"a row of {listed.name} holds no pair; {GIVEN}"
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if len(missing) == 1:
        return (
            f"key {missing[0]!r} is missing (keys: {columns}); a preference row has 'chosen' and 'rejected', as text or"
            " as message lists, and optionally 'prompt'"
        )
    return (
        f"no known layout of pairs (keys: {columns}); name the columns, e.g. --columns prompt=A chosen=B rejected=C"
        " (docs/data.md lists the known layouts)"
    )


def _summaries(items, source: str) -> list[str]:
    """The texts of the two summaries of a row."""
    texts = [item.get("text") if isinstance(item, dict) else None for item in items] if isinstance(items, list) else []
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{source}: key 'summaries' must hold two summaries, each with 'text'")
    return texts


def _dialogue(fields: Fields, name: str) -> list[dict] | None:
    """The dialogue of a row whose `prompt` and answers are lists with one text per turn; None where an answer is null.

    Raises:
        UserError: not a list of texts (as a list or as JSON text), or other numbers of questions and answers.
    """
    source, columns = fields.source, {}
    for key in ("prompt", name):
        texts = fields.required(key)
        if isinstance(texts, str):
            texts = json_text(texts, key, source)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts if t is not None):
            raise UserError(f"{source}: key {key!r} must be a list with the text of each turn")
        columns[key] = texts
    questions, answers = columns.values()
    if len(questions) != len(answers):
        raise UserError(f"{source}: 'prompt' has {len(questions)} turns and {name!r} {len(answers)}; fix the row")
    # A model that failed to answer is a null in the list.
    if None in questions or None in answers:
        return None
    turns = zip(questions, answers, strict=True)
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def read_answer(value):
    """An answer as text or turns: JSON text is parsed, a single turn becomes a list."""
    value = from_json_text(value)
    return [value] if isinstance(value, dict) else value


def _starts_with_answer(turns: list) -> bool:
    first = turns[0]
    # LlamaFactory's function_call is an assistant's turn, but no role.
    return role_of(first) == "assistant" or (isinstance(first, dict) and first.get("from") == "function_call")


def _ensure_no_other_text(fields: Fields, parsed: Parsed) -> None:
    """Raise UserError where two texts have no prompt and another column holds text that may be it."""
    # --columns prompt=none: the user says that both texts begin with the prompt.
    if "prompt (none)" in fields.row or all(answer.startswith(TRANSCRIPT) for answer in parsed.answers):
        return
    if parsed.before:
        raise UserError(
            f"{fields.source}: has a system text or a history, but no known column holds the prompt; name it"
            " with --columns prompt=NAME"
        )
    texts = [
        str(name)
        for name, value in fields.row.items()
        if name not in fields.used and isinstance(value, str) and value.strip() and not is_metadata(str(name))
    ]
    if texts:
        raise UserError(
            f"{fields.source}: 'chosen' and 'rejected' are texts and no known column holds the prompt (further columns"
            f" with text: {', '.join(texts)}); name it, e.g. --columns prompt={texts[0]}, or prompt=none if both texts"
            " begin with it"
        )


def docs_table() -> str:
    """The table of schemas in docs/data.md."""
    rows = [("pairs", schema) for schema in PAIRS] + [("lists", schema) for schema in (*LISTS, *SCORED)]
    lines = [
        f"| {schema.name} ({kind}) | {', '.join(f'`{c}`' for c in schema.columns)} | {schema.example} | {schema.how} |"
        for kind, schema in rows
    ]
    return "\n".join(["| schema | columns | example | how it is read |", "| --- | --- | --- | --- |", *lines])
