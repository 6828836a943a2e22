"""What a judge is asked and what it returns: prompt files, items, verdicts."""

import math
import re
from dataclasses import dataclass

from preflab.data.prompts import Prompt
from utils.artifacts import read_yaml
from utils.errors import UserError
from utils.provenance import sha256_of

PLACEHOLDERS = ("prompt", "answer_1", "answer_2")


@dataclass
class Item:
    """One question to a judge."""

    prompt: Prompt
    first: str
    second: str


@dataclass
class Verdict:
    """A judge's answer: `first` is 1 where the first answer wins, 0 where the second does, 0.5 for a tie.

    `probability` is that of the first answer where the judge gives one, `mass` the probability of all labels together,
    `weight` how many votes the verdict counts. `error` says why there is no verdict; then `first` is None.
    """

    first: float | None
    probability: float | None = None
    weight: int = 1
    mass: float | None = None
    label: str | None = None
    error: str | None = None


def unparsed(why: str) -> Verdict:
    """No verdict: counted as such, never as a win, and asked again on the next call."""
    return Verdict(None, error=why)


@dataclass
class JudgePrompt:
    """A judge prompt file: see configs/judges."""

    path: str
    user: str
    labels: dict
    verdict: str
    system: str | None = None
    max_new_tokens: int = 1024

    @classmethod
    def read(cls, path: str) -> "JudgePrompt":
        """Read and check a file. Raises UserError naming file and key."""
        found = read_yaml(path, "--judge_prompt")
        keys = {"user", "labels", "verdict", "system", "max_new_tokens"}
        if not {"user", "labels", "verdict"} <= set(found) <= keys:
            raise UserError(f"--judge_prompt {path}: needs user, labels and verdict; may have system, max_new_tokens")
        if found["verdict"] not in ("logprob", "text"):
            raise UserError(f"--judge_prompt {path}: verdict must be logprob or text, found {found['verdict']!r}")
        if not isinstance(found["user"], str) or not isinstance(found.get("system") or "", str):
            raise UserError(f"--judge_prompt {path}: user and system must be text")
        room = found.get("max_new_tokens", 1)
        if isinstance(room, bool) or not isinstance(room, int) or room < 1:
            raise UserError(f"--judge_prompt {path}: max_new_tokens must be a whole number above 0, found {room!r}")
        missing = [p for p in PLACEHOLDERS if f"{{{p}}}" not in found["user"]]
        if missing:
            raise UserError(f"--judge_prompt {path}: user lacks {{{missing[0]}}}")
        labels = {}
        for label, meaning in found["labels"].items() if isinstance(found["labels"], dict) else ():
            if not isinstance(label, str) or not label.strip():
                raise UserError(f"--judge_prompt {path}: label {label!r} must be text; quote it")
            if not isinstance(meaning, dict) or meaning.get("first") not in (0, 0.5, 1):
                raise UserError(f"--judge_prompt {path}: label {label!r} needs first: 0, 0.5 or 1")
            weight = meaning.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
                raise UserError(f"--judge_prompt {path}: label {label!r}: weight must be a whole number above 0")
            labels[label] = (float(meaning["first"]), weight)
        if not {0.0, 1.0} <= {first for first, _ in labels.values()}:
            raise UserError(f"--judge_prompt {path}: labels need one for either answer")
        return cls(path, **{**found, "labels": labels})

    def messages(self, item: Item, clean) -> list[dict]:
        """The conversation that puts the question, its placeholders filled in one pass.

        Args:
            clean: takes the judge's special tokens out of what is judged.
        """
        values = {"prompt": clean(item.prompt.text), "answer_1": clean(item.first), "answer_2": clean(item.second)}
        user = re.sub(r"\{(" + "|".join(PLACEHOLDERS) + r")\}", lambda m: values[m[1]], self.user)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    def parse(self, text: str) -> Verdict:
        """The verdict of a text: the last label in it, out of the whole set."""
        edges = []
        for label in sorted(self.labels, key=len, reverse=True):
            # A label that is a word must stand alone: the A of "Answer" is none.
            before, after = (r"(?<!\w)" * label[0].isalnum(), r"(?!\w)" * label[-1].isalnum())
            edges.append(before + re.escape(label) + after)
        found = list(re.finditer("|".join(edges), text))
        if not found:
            return unparsed(f"no verdict in {text[-80:]!r}")
        first, weight = self.labels[found[-1][0]]
        return Verdict(first, weight=weight, label=found[-1][0])

    def weigh(self, logprobs: dict[str, float]) -> Verdict:
        """The verdict of label log-probabilities: P(first) among the labels; a win only where a side is strictly ahead.

        A missing label has probability 0; none at all is no verdict.
        """
        p = {label: math.exp(logprobs[label]) for label in self.labels if label in logprobs}
        mass = sum(p.values())
        if not mass > 0:
            return unparsed("none of the labels among the judge's tokens")
        sides = {side: sum(p[k] for k in p if self.labels[k][0] == side) for side in (1.0, 0.5, 0.0)}
        ahead = [side for side in sides if sides[side] == max(sides.values())]
        likeliest = max((k for k in p if self.labels[k][0] == ahead[0]), key=p.get)
        preference = (sides[1.0] + sides[0.5] / 2) / mass
        if len(ahead) > 1:
            return Verdict(0.5, preference, mass=mass)
        return Verdict(ahead[0], preference, self.labels[likeliest][1], mass, likeliest)

    @property
    def identity(self) -> dict:
        """What a cached verdict depends on."""
        return {"prompt_sha256": sha256_of(str(self.system), self.user, str(self.labels), self.verdict)}
