"""Judge prompt files, items and verdicts, and the interface of judges."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from preflab.data.prompts import Prompt
from preflab.judging.replies import read_label
from utils.artifacts import read_yaml
from utils.errors import UserError
from utils.provenance import sha256_of

# Version of the rules of `preflab.judging.replies`, part of the identity of cached verdicts.
PARSER = 2
PLACEHOLDERS = ("prompt", "answer_1", "answer_2")


@dataclass
class Item:
    """One question to a judge: a prompt and two answers to it, in the order in which the judge reads them."""

    prompt: Prompt
    first: str
    second: str


@dataclass
class Verdict:
    """A judge's verdict on an item.

    Attributes:
        first: 1 if the first answer wins, 0 if the second does, 0.5 for a tie, None without a verdict.
        probability: the judge's probability that the first answer is better, where it gives one.
        weight: how many votes the verdict counts.
        mass: total probability of the labels among all tokens.
        label: the label of the prompt file that decided.
        error: why there is no verdict.
        note: what was given up to get it, such as parameters that the endpoint refuses.
    """

    first: float | None
    probability: float | None = None
    weight: int = 1
    mass: float | None = None
    label: str | None = None
    error: str | None = None
    note: str | None = None


NOT_FINITE = "the model's output is not a finite number"


def unparsed(reason: str) -> Verdict:
    """No verdict. It is counted as unparsed, never as a win, and the next call asks again."""
    return Verdict(None, error=reason)


class Judge(Protocol):
    """What every judge offers. A judge never sees which model gave an answer; the caller decides the order.

    Attributes:
        name: its --judge specification, used in artifacts and tables.
        instant: whether verdicts cost nothing, so that they need no cache and no second process.
    """

    name: str
    instant: bool

    def identity(self) -> dict:
        """Everything that can change a verdict; it keys the cache."""

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield (index, verdict) once for every item, in any order, as verdicts come."""


@dataclass
class JudgePrompt:
    """A judge prompt file (see configs/judges).

    Attributes:
        path: the file.
        user: text of the user turn, with {prompt}, {answer_1} and {answer_2}.
        labels: {label: (score of the first answer, weight)}.
        verdict: "logprob" to compare the labels' probabilities as the next token, "text" to parse the judge's text.
        system: text of the system turn, or None.
        max_new_tokens: length limit of the judge's text, thoughts included.
        label_only: the prompt requests nothing but a label, so a text counts only if it is one.
    """

    path: str
    user: str
    labels: dict[str, tuple[float, int]]
    verdict: str
    system: str | None = None
    max_new_tokens: int = 1024
    label_only: bool = False

    @classmethod
    def read(cls, path: str) -> "JudgePrompt":
        """Read and check a file. Raises UserError naming file and key."""
        content, source = read_yaml(path, "--judge_prompt"), f"--judge_prompt {path}"
        required, optional = {"user", "labels", "verdict"}, {"system", "max_new_tokens"}
        if not required <= set(content) <= required | optional:
            raise UserError(f"{source}: needs user, labels and verdict; optional: system, max_new_tokens")
        if content["verdict"] not in ("logprob", "text"):
            raise UserError(f"{source}: verdict must be logprob or text, found {content['verdict']!r}")
        if not isinstance(content["user"], str) or not isinstance(content.get("system") or "", str):
            raise UserError(f"{source}: user and system must be text")
        limit = content.get("max_new_tokens", 1)
        if not _is_positive_int(limit):
            raise UserError(f"{source}: max_new_tokens must be an integer above 0, found {limit!r}")
        missing = [p for p in PLACEHOLDERS if f"{{{p}}}" not in content["user"]]
        if missing:
            raise UserError(f"{source}: user has no {{{missing[0]}}}")
        labels = _read_labels(content["labels"], source)
        return cls(path, **{**content, "labels": labels, "label_only": content["verdict"] == "logprob"})

    def with_room(self, max_new_tokens: int | None) -> "JudgePrompt":
        """This prompt with another length limit of the judge's text; None leaves it as it is.

        A prompt that compares label probabilities becomes one that reads the label from the text, after the thoughts.
        """
        if max_new_tokens is None:
            return self
        return replace(self, verdict="text", max_new_tokens=max_new_tokens)

    def messages(self, item: Item, clean: Callable[[str], str]) -> list[dict]:
        """The conversation that asks for a verdict on an item.

        Args:
            clean: makes the judge's special tokens in prompt and answers plain text.
        """
        values = {"prompt": clean(item.prompt.text), "answer_1": clean(item.first), "answer_2": clean(item.second)}
        # One pass, so that a placeholder spelled out in an answer is not filled.
        user = re.sub(r"\{(" + "|".join(PLACEHOLDERS) + r")\}", lambda m: values[m[1]], self.user)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    def parse(self, text: str, finish_reason: str | None = None) -> Verdict:
        """The verdict of a reply (`preflab.judging.replies.read_label`); one that was cut off has none."""
        label, problem = read_label(text, self.labels, self.label_only, finish_reason == "length")
        if label is None:
            return unparsed(problem)
        first, weight = self.labels[label]
        return Verdict(first, weight=weight, label=label)

    def weigh(self, logprobs: dict[str, float]) -> Verdict:
        """The verdict of the labels' log-probabilities: a win for the side with strictly more probability.

        A label that is missing has probability 0; without any label there is no verdict. The verdict's probability is
        P(first) among the labels, a tie label counting half to each side.
        """
        # Probabilities among all tokens of the vocabulary; they need not add up to 1.
        p = {label: math.exp(logprobs[label]) for label in self.labels if label in logprobs}
        mass = sum(p.values())
        # 0 without any label or after underflow; `not >` is also true for NaN.
        if not mass > 0:
            return unparsed("none of the labels among the judge's tokens")
        # Several labels of one side count together.
        sides = {side: sum(p[k] for k in p if self.labels[k][0] == side) for side in (1.0, 0.5, 0.0)}
        best = [side for side in sides if sides[side] == max(sides.values())]
        probability = (sides[1.0] + sides[0.5] / 2) / mass
        # Two sides are equally likely: a tie, which no single label decided.
        if len(best) > 1:
            return Verdict(0.5, probability, mass=mass)
        likeliest = max((k for k in p if self.labels[k][0] == best[0]), key=p.get)
        return Verdict(best[0], probability, self.labels[likeliest][1], mass, likeliest)

    @property
    def identity(self) -> dict:
        """What a cached verdict depends on."""
        # The contents and not the path: an edited file asks again, a moved one does not.
        identity = {"prompt_sha256": sha256_of(str(self.system), self.user, str(self.labels), self.verdict)}
        # Verdicts that earlier rules read from a text are not reused.
        return identity if self.verdict == "logprob" else {**identity, "parser": PARSER, "only": self.label_only}


def _read_labels(content, source: str) -> dict[str, tuple[float, int]]:
    """The labels of a prompt file as {label: (score of the first answer, weight)}."""
    labels = {}
    for label, meaning in content.items() if isinstance(content, dict) else ():
        # YAML reads unquoted Yes and No as booleans.
        if not isinstance(label, str) or not label.strip():
            raise UserError(f"{source}: label {label!r} must be text; quote it")
        if not isinstance(meaning, dict) or meaning.get("first") not in (0, 0.5, 1):
            raise UserError(f"{source}: label {label!r} needs first: 0, 0.5 or 1")
        weight = meaning.get("weight", 1)
        if not _is_positive_int(weight):
            raise UserError(f"{source}: label {label!r}: weight must be an integer above 0, found {weight!r}")
        labels[label] = (float(meaning["first"]), weight)
    # Otherwise one answer could never win.
    if not {0.0, 1.0} <= {first for first, _ in labels.values()}:
        raise UserError(f"{source}: labels must include one for each answer (first: 1 and first: 0)")
    return labels


def _is_positive_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
