"""Preference data: read rows of any common format, filter them, tokenize them.

Formats: UltraFeedback-binarized (a prompt string next to message lists that repeat it), TRL's explicit and
implicit prompts as messages or plain text, and Anthropic's `\\n\\nHuman: ... \\n\\nAssistant: ...` transcripts.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from datasets import Dataset

from preflab.data.chat_template import ChatRenderer, TemplateRefused, shared_prefix
from preflab.data.messages import check_messages, check_unicode, read_transcript, transcript
from preflab.data.prompt_format import AS_TEXT, FORMATS, TURNS, WRAPPED, PromptFormat
from preflab.data.sources import SourceArguments, folded, read_sources
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of

# Pairs per call of the tokenizer.
BATCH = 256


@dataclass
class DataArguments(SourceArguments):
    """Flags that choose preference data and filters."""

    drop_ties: bool = field(default=False, metadata={"help": "Drop pairs with equal scores."})
    min_score_margin: float | None = field(default=None, metadata={"help": "Drop pairs with a smaller score margin."})
    keep_duplicate_prompts: bool = field(default=False, metadata={"help": "Keep pairs that share a prompt."})
    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "Text prompts as user turns: auto (plain ones, if the model has a chat template), chat, text.",
            "choices": list(FORMATS),
        },
    )
    chat_template_path: str | None = field(default=None, metadata={"help": "Jinja file that replaces the template."})


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

    @property
    def prompt_text(self) -> str:
        """The complete prompt as one text, roles included."""
        return self.text if self.messages is None else transcript(self.messages)

    @property
    def prompt_key(self) -> str:
        """The prompt's text without case and spacing: equal for prompts that count as duplicates."""
        return folded(self.prompt_text)


@dataclass
class PreferenceData:
    """The pairs of one split.

    Attributes:
        pairs: the pairs that passed the filters.
        sources: what identifies the data, per source (`read_rows`).
        rows: number of rows read.
        dropped: number of rows dropped, by filter.
    """

    pairs: list[Pair]
    sources: list[dict]
    rows: int
    dropped: Counter = field(default_factory=Counter)

    def summary(self) -> dict:
        """Counts and provenance for an artifact."""
        return {
            "rows": self.rows,
            "pairs": len(self.pairs),
            "dropped": dict(self.dropped),
            "prompts": dict(Counter(pair.prompt_kind for pair in self.pairs)),
            "sources": self.sources,
            "text_sha256": sha256_of(
                *[text for p in self.pairs for text in (p.prompt_text, p.chosen, p.rejected)],
                # Win probabilities are targets of SPPO's loss; data without them keeps the hash of its texts alone.
                *[str((p.win_chosen, p.win_rejected)) for p in self.pairs if p.win_chosen is not None],
            ),
        }


# ------------------------------------------------------------------------------------------------------ normalising

# Estimated win probabilities of the two answers (SPPO): this project's names, and those of UCLA-AGI's data.
WIN_KEYS = {"win_chosen": ("win_chosen", "chosen_probs_win"), "win_rejected": ("win_rejected", "chosen_probs_lose")}
TRANSCRIPT = "\n\nHuman:"


def to_pair(row: dict, source: str, prompt_format: PromptFormat = AS_TEXT) -> Pair | str:
    """Normalise one row of any supported format.

    Args:
        row: the parsed row.
        source: file and row, for error messages and `Pair.source`.
        prompt_format: which text prompts become user turns.

    Returns:
        A Pair, or the name of the filter that drops the row.

    Raises:
        UserError: the row fits no format; the message names row and key.
    """
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected an object with 'chosen' and 'rejected', not {type(row).__name__}")
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise UserError(
                f"{source}: key {key!r} is missing (keys: {', '.join(sorted(map(str, row)))}); a preference row"
                " has 'chosen' and 'rejected', as text or as message lists, and optionally 'prompt'"
            )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise UserError(f"{source}: 'chosen' and 'rejected' must both be text or both be message lists")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise UserError(f"{source}: key 'prompt' must be text or a message list, not {type(prompt).__name__}")
    # Scores of another type are an error, since the filters use them. Only SPPO's loss requires win probabilities.
    scores = {key: _number(row, key, source) for key in ("score_chosen", "score_rejected")} | _win_probabilities(row)

    # Four formats of plain text, from the most to the least specific; the first three become message lists.
    if isinstance(chosen, str):
        # Anthropic's hh-rlhf: both transcripts repeat the dialogue, whose common turns `_chat_pair` makes the prompt.
        if prompt is None and chosen.startswith(TRANSCRIPT) and rejected.startswith(TRANSCRIPT):
            chosen, rejected = (
                read_transcript(text, source, key) for text, key in ((chosen, "chosen"), (rejected, "rejected"))
            )
        elif isinstance(prompt, str) and prompt.startswith(TRANSCRIPT):
            answers = _without_prompt(prompt, chosen, rejected)
            # Without the open `Assistant:` turn: the chat template writes the start of the answer.
            prompt = read_transcript(re.sub(r"\n\nAssistant:\s*$", "", prompt), source, "prompt")
            chosen, rejected = ([{"role": "assistant", "content": text.strip()}] for text in answers)
        elif isinstance(prompt, list):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        else:
            return _plain_pair(prompt, chosen, rejected, source, scores, prompt_format)
    return _chat_pair(prompt, chosen, rejected, source, scores)


def _plain_pair(
    prompt: str | None, chosen: str, rejected: str, source: str, scores: dict, prompt_format: PromptFormat
) -> Pair | str:
    """A pair of plain texts; without a prompt, their common prefix is the prompt."""
    cut_from_answers = ""
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
    # Both or neither: an answer may begin with the prompt's words by chance.
    elif prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen, rejected = _without_prompt(prompt, chosen, rejected)
        cut_from_answers = "repeated"
    kind = prompt_format.kind(prompt, (chosen, rejected), cut_from_answers)
    content = {"messages": [{"role": "user", "content": prompt}]} if kind == WRAPPED else {"text": prompt}
    return Pair(chosen, rejected, **content, source=source, prompt_kind=kind, **scores)


def _chat_pair(prompt: str | list | None, chosen: list, rejected: list, source: str, scores: dict) -> Pair | str:
    """A pair of message lists: the turns before the last one are the prompt and must be equal on both sides."""
    chosen, rejected = check_messages(chosen, source, "chosen"), check_messages(rejected, source, "rejected")
    if isinstance(prompt, list):
        # Explicit prompt; some data sets repeat it at the start of both answers.
        prompt = check_messages(prompt, source, "prompt")
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
        return "diverges_before_last_turn"
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        return "last_turn_not_assistant"
    return Pair(chosen[0]["content"], rejected[0]["content"], messages=prompt, source=source, **scores)


def _without_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str]:
    """Both answers without the prompt, if both repeat it."""
    # Both or neither: an answer may begin with the prompt's words by chance.
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        return chosen[len(prompt) :], rejected[len(prompt) :]
    return chosen, rejected


def _number(row: dict, key: str, source: str) -> float | None:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{source}: key {key!r} must be a number, not {value!r}")
    return None if value is None else float(value)


def _win_probabilities(row: dict) -> dict:
    """win_chosen and win_rejected of a row, None where missing or not a number; only SPPO's loss requires them."""
    # Not an error: DPO and the evaluations read the same files and ignore these keys.
    values = {name: next((row[k] for k in keys if row.get(k) is not None), None) for name, keys in WIN_KEYS.items()}
    return {k: float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else None for k, v in values.items()}


# -------------------------------------------------------------------------------------------------------- filtering


def load_pairs(
    sources: list[dict],
    drop_ties: bool = False,
    min_score_margin: float | None = None,
    keep_duplicate_prompts: bool = False,
    prompt_format: PromptFormat = AS_TEXT,
    limit: int | None = None,
) -> PreferenceData:
    """Read, normalise and filter the rows of one or several sources, in order.

    Args:
        sources: as for `read_sources`.
        drop_ties: drop pairs with equal scores.
        min_score_margin: drop pairs whose chosen score is less than this above the rejected one.
        keep_duplicate_prompts: keep every pair of a prompt, not only the first.
        prompt_format: which text prompts become user turns.
        limit: number of pairs, spread evenly over the sources.
    """
    read = read_sources(sources)
    data = PreferenceData([], [about for _, about in read], sum(len(rows) for rows, _ in read))
    seen = set()
    taken = Counter()
    # Sources are read one after another, so of a prompt in two sources the first one's pair is kept.
    for index, source, row in ((i, *row) for i, (rows, _) in enumerate(read) for row in rows):
        # A trial run takes the same number of pairs from every dataset of the mix (rounded up).
        if limit is not None and taken[index] >= -(-limit // len(read)):
            continue
        pair = to_pair(row, source, prompt_format)
        # The filters run before the search for duplicates, so a dropped pair does not hide a later usable one of its
        # prompt.
        reason = pair if isinstance(pair, str) else _drop_reason(pair, drop_ties, min_score_margin)
        if reason is None and not keep_duplicate_prompts:
            reason = "duplicate_prompt" if pair.prompt_text in seen else None
            # Exact text, unlike `prompt_key`: only the comparison of train and test folds case and spacing.
            seen.add(pair.prompt_text)
        if reason is None:
            data.pairs.append(pair)
            taken[index] += 1
        else:
            data.dropped[reason] += 1
    return data


def _drop_reason(pair: Pair, drop_ties: bool, min_score_margin: float | None) -> str | None:
    """The name of the filter that drops `pair`, or None."""
    check_unicode([pair.prompt_text, pair.chosen, pair.rejected], pair.source)
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty_response"
    if pair.chosen == pair.rejected:
        return "identical_responses"
    if drop_ties or min_score_margin is not None:
        if pair.score_chosen is None or pair.score_rejected is None:
            raise UserError(
                f"{pair.source}: --drop_ties and --min_score_margin need 'score_chosen' and 'score_rejected'"
            )
        margin = pair.score_chosen - pair.score_rejected
        if drop_ties and margin == 0:
            return "tied_scores"
        if min_score_margin is not None and margin < min_score_margin:
            return "score_margin_below_threshold"
    return None


# ------------------------------------------------------------------------------------------------------- tokenising


def truncate(prompt: list[int], chosen: list[int], rejected: list[int], max_length, max_prompt_length, bos_id):
    """Truncate a pair that is longer than `max_length`: first the prompt to `max_prompt_length`, then the answers.

    The prompt keeps exactly one BOS (its first id, if that is `bos_id`) and its end; the answers keep their start.
    `max_prompt_length < max_length`, so every answer keeps at least one token.

    Returns:
        (prompt, chosen, rejected) ids.
    """
    # The longer answer decides for both, so that chosen and rejected always follow the same prompt tokens.
    if max_length is None or len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return prompt, chosen, rejected
    if len(prompt) > max_prompt_length:
        keeps_bos = bos_id is not None and prompt[0] == bos_id and max_prompt_length > 1
        # The end of a prompt holds its question. Models such as Gemma need BOS at the first position.
        end = prompt[-(max_prompt_length - keeps_bos) :]
        # Where BOS opens every turn (SmolLM2's <|im_start|>), the end may begin with one already.
        prompt = prompt[:1] + end if keeps_bos and end[0] != bos_id else end
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def tokenize(data: PreferenceData, tokenizer, max_length: int | None, max_prompt_length: int | None, desc: str = ""):
    """Tokenize every pair, in order, and count what was truncated.

    As in TRL, the answer starts where the tokens of the rendered prompt and of the rendered conversation diverge. That
    is the end of the prompt for all but a few templates. Conversations that the template rejects, prompts without
    tokens and answers that are equal once truncated are counted in `data.dropped` and removed from `data.pairs`.

    Args:
        desc: the split's name, for progress and errors.

    Returns:
        (dataset, counts): columns prompt_ids, chosen_ids, rejected_ids and `pair` (index into `data.pairs`), and
        win_chosen and win_rejected if every pair has them; counts of truncated parts for the preflight.

    Raises:
        UserError: no pair is left.
    """
    # Base models without a chat template can still train on plain text.
    chat = ChatRenderer(tokenizer) if any(p.messages is not None for p in data.pairs) else None
    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "pair": []}
    counts = Counter()
    pairs, refusal = [], None
    bar = progress(len(data.pairs), f"tokenizing {desc}", "pair", leave=False)
    # Invariant: row k of every column belongs to `pairs[k]`.
    for start in range(0, len(data.pairs), BATCH):
        batch, texts = [], []
        for pair in data.pairs[start : start + BATCH]:
            try:
                # First the texts, then the pair: a refusal leaves both lists as they were, with three texts per pair.
                texts += _texts(pair, chat, tokenizer)
                batch.append(pair)
            except TemplateRefused as error:
                refusal = refusal or f"{pair.source}: {error}"
                data.dropped["template_refused"] += 1
        ids = _ids(batch, texts, chat, tokenizer)
        for i, pair in enumerate(batch):
            # Ids of the prompt, of prompt and chosen answer, of prompt and rejected answer.
            prompt, full_chosen, full_rejected = ids[3 * i : 3 * i + 3]
            # Tokens at the boundary may merge with the answer, so the prompt's own ids cannot be assumed to match.
            answer = min(shared_prefix(prompt, full_chosen), shared_prefix(prompt, full_rejected))
            counts["prompt_end_rendered_differently"] += answer < len(prompt)
            # The prompt's ids are those of the conversations, so that prompt and answer together are exactly their
            # tokens.
            parts = (full_chosen[:answer], full_chosen[answer:], full_rejected[answer:])
            cut = truncate(*parts, max_length, max_prompt_length, tokenizer.bos_token_id)
            for name, before, after in zip(("prompt", "chosen", "rejected"), parts, cut, strict=True):
                counts[f"truncated_{name}"] += len(after) < len(before)
            # Equal answers have a loss without gradient; an empty prompt leaves the first answer token without a
            # context.
            if not cut[0] or cut[1] == cut[2]:
                data.dropped["empty_prompt" if not cut[0] else "identical_after_truncation"] += 1
                continue
            for name, value in zip(columns, (*cut, len(pairs)), strict=True):
                columns[name].append(value)
            pairs.append(pair)
        bar.update(min(BATCH, len(data.pairs) - start))
    bar.close()
    if not pairs:
        example = f"; the chat template rejected e.g. {refusal}" if refusal else ""
        raise UserError(f"0 {desc} pairs are left of {data.rows} rows; dropped: {dict(data.dropped)}{example}")
    # After the loop, so that indices in the column `pair` refer to the pairs that are left.
    data.pairs = pairs
    for name in WIN_KEYS:
        # A column needs a value in every row. Training with --loss_type sppo reports the first row without one.
        if all(getattr(pair, name) is not None for pair in pairs):
            columns[name] = [getattr(pair, name) for pair in pairs]
    return Dataset.from_dict(columns), dict(counts)


def _texts(pair: Pair, chat: ChatRenderer | None, tokenizer) -> list[str]:
    """The rendered prompt, prompt with chosen answer, prompt with rejected answer."""
    if pair.messages is not None:
        return [
            chat.prompt_text(pair.messages),
            chat.full_text(pair.messages, pair.chosen),
            chat.full_text(pair.messages, pair.rejected),
        ]
    # As TRL does for plain text: the tokenizer adds BOS (so one in the text is removed) and the answer ends with EOS.
    text, eos = pair.text, tokenizer.eos_token or ""
    while tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token) :]
    ended = [answer if answer.endswith(eos) else answer + eos for answer in (pair.chosen, pair.rejected)]
    return [text, text + ended[0], text + ended[1]]


def _ids(batch: list[Pair], texts: list[str], chat: ChatRenderer | None, tokenizer) -> list[list[int]]:
    """Token ids of three texts per pair; plain text gets the tokenizer's special tokens, a rendered chat none."""
    is_chat = [pair.messages is not None for pair in batch for _ in range(3)]
    # Two calls of the tokenizer, since add_special_tokens applies to a complete batch; the results are merged in order.
    rendered = iter(chat.ids([t for t, c in zip(texts, is_chat, strict=True) if c]) if any(is_chat) else [])
    plain = [t for t, c in zip(texts, is_chat, strict=True) if not c]
    plain = iter(tokenizer(plain)["input_ids"] if plain else [])
    return [next(rendered) if c else next(plain) for c in is_chat]
