"""Preference data: any of the field's formats to pairs of texts, filters, and token ids.

Formats: UltraFeedback-binarized (a prompt string beside message lists that repeat the prompt), TRL's explicit and
implicit prompts as messages or plain text, and Anthropic's `\\n\\nHuman: ... \\n\\nAssistant: ...` transcripts.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from preflab.data.chat_template import ChatRenderer, TemplateRefused, shared_prefix
from preflab.data.sources import SourceArguments, folded, read_sources
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of

ROLES = ("system", "user", "assistant")


@dataclass
class DataArguments(SourceArguments):
    """Where preference pairs come from and which are left out."""

    drop_ties: bool = field(default=False, metadata={"help": "Drop pairs with equal scores."})
    min_score_margin: float | None = field(default=None, metadata={"help": "Drop pairs with a smaller score margin."})
    keep_duplicate_prompts: bool = field(default=False, metadata={"help": "Keep pairs that share a prompt."})
    prompt_format: str = field(
        default="auto",
        metadata={"help": "Plain-text pairs: auto keeps them text, chat makes turns.", "choices": ["auto", "chat"]},
    )
    chat_template_path: str | None = field(default=None, metadata={"help": "Jinja file that replaces the template."})


@dataclass
class Pair:
    """One preference pair as text. `messages` is the prompt of a conversation, `text` that of plain text."""

    chosen: str
    rejected: str
    messages: list[dict] | None = None
    text: str | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    win_chosen: float | None = None
    win_rejected: float | None = None
    source: str = ""

    @property
    def prompt_text(self) -> str:
        """The whole prompt as one text, roles included."""
        return self.text if self.messages is None else "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)

    @property
    def prompt_key(self) -> str:
        """A key that prompts share where they differ in nothing but case and spacing."""
        return folded(self.prompt_text)


@dataclass
class PreferenceData:
    """The pairs of one split, with where they came from and what the filters dropped."""

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
            "sources": self.sources,
            "text_sha256": sha256_of(
                *[text for p in self.pairs for text in (p.prompt_text, p.chosen, p.rejected)],
                *[str((p.win_chosen, p.win_rejected)) for p in self.pairs if p.win_chosen is not None],
            ),
        }


# ------------------------------------------------------------------------------------------------------ normalising


def _transcript(text: str, where: str, key: str) -> list[dict]:
    """Messages of an Anthropic transcript."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip():
        raise UserError(f"{where}: key {key!r}: text stands before the first '\\n\\nHuman:' of the transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]


def _messages(value, where: str, key: str) -> list[dict]:
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f"{where}: key {key!r}, message {i}: expected {{'role': ..., 'content': ...}}")
        if message["role"] not in ROLES:
            raise UserError(f"{where}: key {key!r}, message {i}: role {message['role']!r} is not one of {ROLES}")
        if not isinstance(message["content"], str):
            raise UserError(f"{where}: key {key!r}, message {i}: content must be text")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _without_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str]:
    """Both answers without the prompt, where both repeat it."""
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        return chosen[len(prompt) :], rejected[len(prompt) :]
    return chosen, rejected


def _number(row: dict, key: str, where: str) -> float | None:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{where}: key {key!r} must be a number, found {value!r}")
    return None if value is None else float(value)


# Estimated win probabilities of the two answers (SPPO): this project's names, and those of UCLA-AGI's data.
WIN_KEYS = {"win_chosen": ("win_chosen", "chosen_probs_win"), "win_rejected": ("win_rejected", "chosen_probs_lose")}


def _wins(row: dict) -> dict:
    """What the row says of its answers' win probabilities; whether they are any, only the loss that needs them asks."""
    values = {name: next((row[k] for k in keys if row.get(k) is not None), None) for name, keys in WIN_KEYS.items()}
    return {k: float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else None for k, v in values.items()}


def to_pair(row: dict, where: str, plain_as_chat: bool = False) -> Pair | str:
    """One row of any known format as a Pair, or the name of the filter that drops it.

    Raises UserError, naming row and key, where the row fits no format.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'chosen' and 'rejected', found {type(row).__name__}")
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise UserError(
                f"{where}: key {key!r} is missing (keys there: {', '.join(sorted(map(str, row)))}); a preference row"
                " has 'chosen' and 'rejected', as text or as message lists, and perhaps 'prompt'"
            )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be text or both be message lists")
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise UserError(f"{where}: key 'prompt' must be text or a message list, found {type(prompt).__name__}")
    scores = {k: _number(row, k, where) for k in ("score_chosen", "score_rejected")} | _wins(row)

    if isinstance(chosen, str):
        if prompt is None and chosen.startswith("\n\nHuman:") and rejected.startswith("\n\nHuman:"):
            chosen, rejected = _transcript(chosen, where, "chosen"), _transcript(rejected, where, "rejected")
        elif isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
            chosen, rejected = _without_prompt(prompt, chosen, rejected)
            prompt = re.sub(r"\n\nAssistant:\s*$", "", prompt)
            prompt = _transcript(prompt, where, "prompt")
            chosen, rejected = ([{"role": "assistant", "content": t.strip()}] for t in (chosen, rejected))
        elif isinstance(prompt, list):
            chosen, rejected = ([{"role": "assistant", "content": t}] for t in (chosen, rejected))
        else:
            if prompt is None:
                if chosen == rejected:
                    return "identical_responses"
                # As TRL's extract_prompt: the common prefix, less a space that belongs to the answer's first token.
                cut = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
                cut -= cut > 0 and chosen[cut - 1] == " "
                prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
            chosen, rejected = _without_prompt(prompt, chosen, rejected)
            if plain_as_chat:
                return Pair(chosen, rejected, messages=[{"role": "user", "content": prompt}], source=where, **scores)
            return Pair(chosen, rejected, text=prompt, source=where, **scores)

    chosen, rejected = _messages(chosen, where, "chosen"), _messages(rejected, where, "rejected")
    if isinstance(prompt, list):
        prompt = _messages(prompt, where, "prompt")
        n = len(prompt)
        chosen = chosen[n:] if chosen[:n] == prompt else chosen
        rejected = rejected[n:] if rejected[:n] == prompt else rejected
    else:
        n = min(shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if n <= 0 and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        else:
            asked = prompt
            prompt, chosen, rejected = chosen[: max(n, 0)], chosen[max(n, 0) :], rejected[max(n, 0) :]
            if isinstance(asked, str) and not any(m["role"] == "user" for m in prompt):
                prompt = [*prompt, {"role": "user", "content": asked}]
    if not prompt:
        raise UserError(f"{where}: 'chosen' and 'rejected' share no opening turn and there is no 'prompt'")
    if not chosen or not rejected:
        return "empty_response"
    if len(chosen) > 1 or len(rejected) > 1:
        return "diverges_before_last_turn"
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        return "last_turn_not_assistant"
    return Pair(chosen[0]["content"], rejected[0]["content"], messages=prompt, source=where, **scores)


# -------------------------------------------------------------------------------------------------------- filtering


def load_pairs(
    sources: list[dict],
    drop_ties: bool = False,
    min_score_margin: float | None = None,
    keep_duplicate_prompts: bool = False,
    plain_as_chat: bool = False,
    limit: int | None = None,
) -> PreferenceData:
    """Read, normalise and filter the rows of one or several sources, in order, up to `limit` pairs.

    Args:
        sources: as `read_sources` takes them.
    """
    read = read_sources(sources)
    data = PreferenceData([], [source for _, source in read], sum(len(rows) for rows, _ in read))
    seen = set()
    taken = Counter()
    for index, where, row in ((i, *row) for i, (rows, _) in enumerate(read) for row in rows):
        # A trial run sees a little of every dataset of the mix.
        if limit is not None and taken[index] >= -(-limit // len(read)):
            continue
        pair = to_pair(row, where, plain_as_chat)
        reason = pair if isinstance(pair, str) else _drop_reason(pair, drop_ties, min_score_margin)
        if reason is None and not keep_duplicate_prompts:
            reason = "duplicate_prompt" if pair.prompt_text in seen else None
            seen.add(pair.prompt_text)
        if reason is None:
            data.pairs.append(pair)
            taken[index] += 1
        else:
            data.dropped[reason] += 1
    return data


def _drop_reason(pair: Pair, drop_ties: bool, min_score_margin: float | None) -> str | None:
    try:
        "".join((pair.prompt_text, pair.chosen, pair.rejected)).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{pair.source}: text that is no valid Unicode ({error.reason}); mend or delete the row"
        ) from None
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
    """Cut a pair to `max_length`, only where it is longer: first the prompt to `max_prompt_length`, then the answers.

    The prompt keeps its BOS (its first id, where that is `bos_id`) and its end; the answers keep their start.
    `max_prompt_length < max_length`, so that no answer is ever cut to nothing.

    Returns:
        (prompt, chosen, rejected) ids.
    """
    if max_length is None or len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return prompt, chosen, rejected
    if len(prompt) > max_prompt_length:
        keeps_bos = bos_id is not None and prompt[0] == bos_id and max_prompt_length > 1
        prompt = prompt[:1] + prompt[-(max_prompt_length - 1) :] if keeps_bos else prompt[-max_prompt_length:]
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def tokenize(data: PreferenceData, tokenizer, max_length: int | None, max_prompt_length: int | None, desc: str = ""):
    """Token ids of every pair, in order, as a Dataset, and the counts that the preflight shows.

    The answer starts where the rendered prompt and the rendered conversation diverge, as in TRL, which is the
    prompt's end in all templates but a few. A conversation that the template refuses is dropped and counted.

    Returns:
        (dataset, counts): columns prompt_ids, chosen_ids, rejected_ids and `pair` (index into `data.pairs`), and
        win_chosen and win_rejected where every pair has them.
    """
    from datasets import Dataset

    chat = ChatRenderer(tokenizer) if any(p.messages is not None for p in data.pairs) else None
    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "pair": []}
    counts = Counter()
    kept, refusal = [], None
    bar = progress(len(data.pairs), f"tokenizing {desc}", "pair", leave=False)
    for start in range(0, len(data.pairs), 256):
        batch, texts = [], []
        for pair in data.pairs[start : start + 256]:
            try:
                texts += _texts(pair, chat, tokenizer)
                batch.append(pair)
            except TemplateRefused as error:
                refusal = refusal or f"{pair.source}: {error}"
                data.dropped["template_refused"] += 1
        ids = _ids(batch, texts, chat, tokenizer)
        for i, pair in enumerate(batch):
            prompt, full_chosen, full_rejected = ids[3 * i : 3 * i + 3]
            start_of_answer = min(shared_prefix(prompt, full_chosen), shared_prefix(prompt, full_rejected))
            counts["prompt_end_rendered_differently"] += start_of_answer < len(prompt)
            prompt, chosen, rejected = (
                full_chosen[:start_of_answer],
                full_chosen[start_of_answer:],
                full_rejected[start_of_answer:],
            )
            cut = truncate(prompt, chosen, rejected, max_length, max_prompt_length, tokenizer.bos_token_id)
            counts["truncated_prompt"] += len(cut[0]) < len(prompt)
            counts["truncated_chosen"] += len(cut[1]) < len(chosen)
            counts["truncated_rejected"] += len(cut[2]) < len(rejected)
            if not cut[0] or cut[1] == cut[2]:
                data.dropped["empty_prompt" if not cut[0] else "identical_after_truncation"] += 1
                continue
            for name, value in zip(columns, (*cut, len(kept)), strict=True):
                columns[name].append(value)
            kept.append(pair)
        bar.update(min(256, len(data.pairs) - start))
    bar.close()
    if not kept:
        why = f"; the chat template refused e.g. {refusal}" if refusal else ""
        raise UserError(f"0 {desc} pairs are left of {data.rows} rows; dropped: {dict(data.dropped)}{why}")
    data.pairs = kept
    for name in WIN_KEYS:
        if all(getattr(pair, name) is not None for pair in kept):
            columns[name] = [getattr(pair, name) for pair in kept]
    return Dataset.from_dict(columns), dict(counts)


def _texts(pair: Pair, chat: ChatRenderer | None, tokenizer) -> list[str]:
    if pair.messages is not None:
        return [
            chat.prompt_text(pair.messages),
            chat.full_text(pair.messages, pair.chosen),
            chat.full_text(pair.messages, pair.rejected),
        ]
    # Plain text, as TRL: the tokenizer puts its own BOS, the answer ends with EOS; a BOS in the text is not doubled.
    text, eos = pair.text, tokenizer.eos_token or ""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text[len(tokenizer.bos_token) :]
    ended = [answer if answer.endswith(eos) else answer + eos for answer in (pair.chosen, pair.rejected)]
    return [text, text + ended[0], text + ended[1]]


def _ids(batch: list[Pair], texts: list[str], chat: ChatRenderer | None, tokenizer) -> list[list[int]]:
    """Token ids of three texts a pair: rendered conversations get no further special tokens, plain texts the usual."""
    is_chat = [pair.messages is not None for pair in batch for _ in range(3)]
    rendered = iter(chat.ids([t for t, c in zip(texts, is_chat, strict=True) if c]) if any(is_chat) else [])
    plain = [t for t, c in zip(texts, is_chat, strict=True) if not c]
    plain = iter(tokenizer(plain)["input_ids"] if plain else [])
    return [next(rendered) if c else next(plain) for c in is_chat]
