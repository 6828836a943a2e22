"""Which plain-text prompts become user turns of the model's chat template, and which stay text.

`auto` never guesses silently: every text prompt that is not wrapped has a reason, which is counted and printed.
"""

import re
from collections import Counter
from dataclasses import dataclass

from preflab.data.chat_template import CONTROL_TOKENS, special_token_pattern

FORMATS = ("auto", "chat", "text")
NEEDS_TEMPLATE = (
    "the row has a system text or earlier turns, which need a chat template; pass --prompt_format chat, or --columns"
    " system=none history=none to train without them"
)
# Pair.prompt_kind of rows that are conversations already, and of text prompts that became user turns.
TURNS, WRAPPED = "turns", "wrapped"
# Why a text prompt stays text, as the preflight says it.
LEFT_AS_TEXT = {
    "no_template": "the model has no chat template",
    "requested": "--prompt_format text",
    "no_prompt_column": "the prompt is the common start of both answers",
    "special_tokens": "the prompt contains special tokens of a chat template",
    "dialogue": "the prompt is a dialogue written as text (Human:, Assistant:, ### Instruction:)",
    "continuation": "the answers continue the prompt's text (they repeat it, or begin with a space)",
}
DIALOGUE = re.compile(r"^\s*(?:Human|Assistant|### ?(?:Instruction|Response|Human|Assistant)) ?:", re.MULTILINE)


@dataclass(frozen=True)
class PromptFormat:
    """A choice of --prompt_format, and what it needs to know about the model.

    Attributes:
        choice: "auto", "chat" (every text prompt becomes a user turn) or "text" (none does).
        markers: matches the special tokens of the model and of common chat templates; None without a chat template.
    """

    choice: str
    markers: re.Pattern | None = None

    @classmethod
    def of(cls, choice: str, tokenizer) -> "PromptFormat":
        """The choice for a tokenizer: `auto` is `text` for a model without a chat template."""
        if not tokenizer.chat_template:
            return cls(choice)
        special = special_token_pattern(tokenizer)
        return cls(choice, re.compile(f"{CONTROL_TOKENS.pattern}|{special.pattern}") if special else CONTROL_TOKENS)

    def with_turns_before(self, before: list[dict]) -> "PromptFormat":
        """The format of a row's text prompt that follows a system text or earlier turns: these need a chat template."""
        return AS_CHAT if before and self.choice == "auto" else self

    def kind(self, prompt: str, answers: tuple[str, ...], cut_from_answers: str) -> str:
        """WRAPPED, or the key of LEFT_AS_TEXT that says why the prompt stays text.

        Args:
            answers: both answers of a pair, or the only one, without the prompt.
            cut_from_answers: "prompt" if the row has no prompt, "repeated" if both answers repeat it, else "".
        """
        if self.choice != "auto":
            return WRAPPED if self.choice == "chat" else "requested"
        if self.markers is None:
            return "no_template"
        if cut_from_answers == "prompt":
            return "no_prompt_column"
        if self.markers.search(prompt):
            return "special_tokens"
        if DIALOGUE.search(prompt):
            return "dialogue"
        # TRL's standard format: {"prompt": "The sky is", "chosen": " blue."}
        if cut_from_answers == "repeated" or all(answer[:1].isspace() for answer in answers):
            return "continuation"
        return WRAPPED


AS_CHAT, AS_TEXT = PromptFormat("chat"), PromptFormat("text")


def sentence(kinds: Counter) -> str:
    """What was done with the prompts of a split, in words. `kinds`: number of pairs per Pair.prompt_kind."""
    left = [f"{kinds[k]} left as text: {reason}" for k, reason in LEFT_AS_TEXT.items() if kinds[k]]
    # One reason for all rows needs no count.
    if len(left) == 1 and not (kinds[WRAPPED] or kinds[TURNS]):
        return "plain text, no chat template: " + next(reason for k, reason in LEFT_AS_TEXT.items() if kinds[k])
    parts = []
    if kinds[WRAPPED]:
        count = f"{kinds[WRAPPED]} of {kinds.total()} " if kinds[WRAPPED] < kinds.total() else ""
        parts.append(f"{count}text wrapped as user turns of the model's chat template (off: --prompt_format text)")
    if kinds[TURNS]:
        count = f"{kinds[TURNS]} " if len(parts + left) else ""
        parts.append(f"{count}conversations, under the model's chat template")
    return "; ".join(parts + left)
