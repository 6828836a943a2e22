"""Instruction data: any of the field's formats to conversations, and to token ids with what is trained on marked.

Formats: Alpaca's (instruction, input, output), chat (`messages`, or ShareGPT's `conversations`), prompt and completion,
and preference rows, of which the chosen answer is taken.
"""

from collections import Counter
from dataclasses import dataclass, field

from preflab.data.chat_template import ChatRenderer, TemplateRefused
from preflab.data.sources import SourceArguments, by_hash, folded, read_sources
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass
class SFTArguments(SourceArguments):
    """Where instructions come from, and what of them is trained on."""

    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on; none for none (default: --test_rows of the train split)."},
    )
    test_rows: int = field(
        default=200, metadata={"help": "Conversations held out of the train split, where no test split is named."}
    )
    loss_on: str = field(
        default="responses",
        metadata={"help": "Tokens that are trained on.", "choices": ["responses", "everything"]},
    )

    def check(self) -> None:
        super().check()
        if self.test_rows < 0:
            raise UserError(f"--test_rows {self.test_rows}: must be at least 0")


@dataclass
class Conversation:
    """Turns that end with an answer. `input` is Alpaca's, apart from the instruction that is the user's turn."""

    messages: list[dict]
    source: str
    input: str = ""

    @property
    def turns(self) -> list[dict]:
        """All turns, Alpaca's input joined to its instruction."""
        if not self.input:
            return self.messages
        return [{"role": "user", "content": f"{self.messages[0]['content']}\n\n{self.input}"}, *self.messages[1:]]

    def turns_for(self, chat: ChatRenderer) -> list[dict]:
        """All turns as the template wants them: Alpaca's own has a place for the input."""
        if not (self.input and chat.reads_input):
            return self.turns
        return [{**self.messages[0], "input": self.input}, *self.messages[1:]]

    @property
    def prompt_key(self) -> str:
        """A key that prompts share where they differ in nothing but case and spacing."""
        return folded("\n".join(f"{m['role']}: {m['content']}" for m in self.turns[:-1]))


@dataclass
class ConversationData:
    """The conversations of one split, with where they came from and what was left out."""

    conversations: list[Conversation]
    sources: list[dict]
    rows: int
    dropped: Counter = field(default_factory=Counter)

    def summary(self) -> dict:
        """Counts and provenance for an artifact."""
        texts = [f"{m['role']}: {m['content']}" for c in self.conversations for m in c.turns]
        return {
            "rows": self.rows,
            "conversations": len(self.conversations),
            "dropped": dict(self.dropped),
            "sources": self.sources,
            "text_sha256": sha256_of(*texts),
        }


# ------------------------------------------------------------------------------------------------------ normalising


def to_conversation(row, where: str) -> Conversation | str:
    """One row of any known format, or why it is left out. Raises UserError, naming row and key, where it fits none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with an instruction, found {type(row).__name__}")
    turns = row.get("messages") or row.get("conversations")
    if turns is not None:
        return _chat(turns, where)
    if isinstance(row.get("instruction"), str) and row.get("output") is not None:
        return _alpaca(row, where)
    for answer in ("completion", "response", "chosen"):
        if row.get(answer) is not None and (row.get("prompt") is not None or answer == "chosen"):
            return _prompted(row.get("prompt"), row[answer], where)
    raise UserError(
        f"{where}: no instruction there (keys: {', '.join(sorted(map(str, row)))}); a row has 'messages', 'instruction'"
        " and 'output' (perhaps 'input'), 'prompt' and 'completion', or 'prompt' and 'chosen'"
    )


def _alpaca(row: dict, where: str) -> Conversation | str:
    context = row.get("input") or ""
    for key, value in (("input", context), ("output", row["output"])):
        if not isinstance(value, str):
            raise UserError(f"{where}: key {key!r} must be text, found {type(value).__name__}")
    turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    found = _chat(turns, where)
    if isinstance(found, Conversation):
        found.input = context.strip()
    return found


def _prompted(prompt, answer, where: str) -> Conversation | str:
    answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    if isinstance(prompt, list):
        asked = prompt
    else:
        # A list of messages may hold the whole conversation, its prompt beside it once more.
        whole = isinstance(answer, list) and any(_role(m) == "user" for m in answer)
        asked = [] if whole or prompt is None else [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and answers[: len(prompt)] == prompt:
        asked = []
    return _chat([*asked, *answers], where)


def _role(message) -> str | None:
    return ROLES.get(message.get("role", message.get("from"))) if isinstance(message, dict) else None


def _chat(turns, where: str) -> Conversation | str:
    """A checked conversation up to its last answer, or the reason to leave it out."""
    if not isinstance(turns, list):
        raise UserError(f"{where}: turns must be a list, found {type(turns).__name__}")
    messages = []
    for i, turn in enumerate(turns):
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if _role(turn) is None or not isinstance(content, str):
            raise UserError(f"{where}: turn {i} needs a role (system, user or assistant) and content as text")
        messages.append({"role": _role(turn), "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        return "empty_prompt"
    if not messages[-1]["content"].strip():
        return "empty_response"
    try:
        "".join(m["content"] for m in messages).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: text that is no valid Unicode ({error.reason}); mend or delete the row") from None
    return Conversation(messages, where)


# ---------------------------------------------------------------------------------------------------------- reading


def load_conversations(sources: list[dict], limit: int | None = None) -> ConversationData:
    """Read and normalise the rows of one or several sources (`read_sources`), in order, up to `limit` of each."""
    read = read_sources(sources)
    data = ConversationData([], [source for _, source in read], sum(len(rows) for rows, _ in read))
    for rows, _ in read:
        taken = 0
        for where, row in rows:
            if limit is not None and taken >= -(-limit // len(read)):
                break
            found = to_conversation(row, where)
            if isinstance(found, str):
                data.dropped[found] += 1
            else:
                data.conversations.append(found)
                taken += 1
    return data


def hold_out(data: ConversationData, count: int) -> ConversationData | None:
    """Take about `count` conversations out of `data`, all of a prompt together; None for none.

    Which prompts those are depends on a hash of their text alone: neither on their order nor on the other rows.

    Raises UserError where nothing would be left to train on.
    """
    if not count:
        return None
    prompts = Counter(c.prompt_key for c in data.conversations)
    chosen = by_hash(prompts, count)
    if len(chosen) == len(prompts):
        raise UserError(
            f"--test_rows {count}: would hold out all {len(data.conversations)} conversations; lower it, name a"
            " --dataset_test_split, or pass --test_rows 0"
        )
    held_out = [c for c in data.conversations if c.prompt_key in chosen]
    data.conversations = [c for c in data.conversations if c.prompt_key not in chosen]
    sources = [{**source, "held_out": f"{len(held_out)} conversations, by hash"} for source in data.sources]
    return ConversationData(held_out, sources, len(held_out))


# ------------------------------------------------------------------------------------------------------- tokenising


def tokenize(data: ConversationData, tokenizer, loss_on: str, max_length: int | None, desc: str = ""):
    """Token ids of every conversation, in order, as a Dataset, and the counts that the preflight shows.

    Args:
        loss_on: "responses" marks the answers' tokens, the one that ends them included; "everything" all but the first.
        max_length: longer conversations keep their start; one whose answers are cut away altogether is left out.

    Returns:
        (dataset, counts): columns input_ids, labels (-100 where nothing is trained on) and `bytes` of what is.
    """
    from datasets import Dataset

    chat = ChatRenderer(tokenizer)
    columns = {"input_ids": [], "labels": [], "bytes": []}
    counts, kept, refusal = Counter(), [], None
    bar = progress(len(data.conversations), f"tokenizing {desc}", leave=False)
    for start in range(0, len(data.conversations), 256):
        batch, texts, spans = [], [], []
        for conversation in data.conversations[start : start + 256]:
            try:
                text, found = chat.answers(conversation.turns_for(chat))
            except TemplateRefused as error:
                refusal = refusal or f"{conversation.source}: {error}"
                data.dropped["template_refused"] += 1
                continue
            batch.append(conversation)
            texts.append(text)
            spans.append(found)
        if batch:
            read = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for k, conversation in enumerate(batch):
                ids, offsets = read["input_ids"][k][:max_length], read["offset_mapping"][k][:max_length]
                parts = [slice(1, None)] if loss_on == "everything" else _answers(offsets, spans[k])
                row = _row(ids, parts, loss_on, tokenizer)
                counts["truncated"] += len(row["input_ids"]) < len(read["input_ids"][k])
                if not any(label != -100 for label in row["labels"][1:]):
                    data.dropped["nothing_left_to_train_on"] += 1
                    continue
                for name, values in columns.items():
                    values.append(row[name])
                kept.append(conversation)
        bar.update(min(256, len(data.conversations) - start))
    bar.close()
    if not kept:
        why = f"; the template refused e.g. {refusal}" if refusal else ""
        raise UserError(f"0 {desc} conversations are left of {data.rows} rows; dropped: {dict(data.dropped)}{why}")
    data.conversations = kept
    return Dataset.from_dict(columns), dict(counts)


def _answers(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[slice]:
    """The tokens of each answer: those from the first to the last that lie in its characters `start` to `end`.

    A token between them may have no characters of its own, as a lone space under tokenizers that trim offsets.
    """
    inside = [[k for k, (a, b) in enumerate(offsets) if start <= a < b <= end] for start, end in spans]
    return [slice(found[0], found[-1] + 1) for found in inside if found]


def _row(ids: list[int], parts: list[slice], loss_on: str, tokenizer) -> dict:
    """input_ids, labels, and the bytes of the text that is trained on; tokens that frame it are no text."""
    # On everything, transformers' shift leaves the first token out.
    labels = list(ids) if loss_on == "everything" else [-100] * len(ids)
    for part in parts:
        labels[part] = ids[part]
    size = sum(len(tokenizer.decode(ids[part], skip_special_tokens=True).encode()) for part in parts)
    return {"input_ids": ids, "labels": labels, "bytes": size}
