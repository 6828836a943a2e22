"""Scorers: which of a model's own answers to a prompt are better, and how likely each beats the others.

One interface for reward models, pairwise rankers, judges, a Python function of the user's, what the data hold already,
and the controls. A scorer sees distinct answers, and never which of them the model was likeliest to give.
"""

import importlib.util
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

from preflab.data.prompts import Prompt
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of, sha256_of_files

KINDS = "rm:MODEL, pair:MODEL, judge:JUDGE, FILE.py:FUNCTION, columns, longer, shorter or random"
# The controls' scores are log-odds too: a hundred characters more are a factor e.
CHARACTERS = 100


@dataclass
class Candidates:
    """The distinct, non-empty answers to one prompt, how many samples gave each, and what the data say of them.

    `given` holds "scores" (log-odds) or "wins" (probabilities), one an answer, or nothing.
    """

    prompt: Prompt
    answers: list[str]
    counts: list[int]
    given: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Scores:
    """`scores` rank the answers, `wins` estimate how likely each beats the policy's own."""

    scores: list[float]
    wins: list[float]


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def win_probabilities(scores: list[float], counts: list[int]) -> list[float]:
    """P_i = mean over the samples j of sigma(s_i - s_j), the answer itself among them (which counts a half).

    Wu et al. 2024 (arXiv 2405.00675), section 4, as their published code has it (scripts/compute_prob.py).

    Args:
        counts: how many samples gave each answer.
    """
    matrix = [[sigmoid(a - b) for b in scores] for a in scores]
    return wins_of(matrix, counts)


def wins_of(matrix: list[list[float]], counts: list[int]) -> list[float]:
    """P_i = mean over the samples j of P(i beats j), a row of `matrix` each."""
    total = sum(counts)
    return [sum(c * p for c, p in zip(counts, row, strict=True)) / total for row in matrix]


def make_scorer(spec: str, options: dict):
    """The scorer named `spec`.

    Args:
        options: those of `preflab.judging.judges.make_judge`, and judge_prompt.

    Raises:
        UserError: an unknown kind, a file or function that is not there.
    """
    kind, _, rest = spec.partition(":")
    if spec in ("longer", "shorter", "random"):
        return Control(spec, options["seed"])
    if spec == "columns":
        return Columns()
    if kind == "rm" and rest:
        return Reward(rest, options)
    if kind == "pair" and rest:
        return Pairwise(rest, options)
    if kind == "judge" and rest:
        return Judged(rest, options)
    if kind.endswith(".py") and rest:
        return Function(kind, rest)
    raise UserError(f"--scorer {spec}: unknown; one of {KINDS}")


class Control:
    """Length alone, or chance: what a scorer has to beat to be worth its time."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed

    def identity(self) -> dict:
        return {"scorer": self.name, **({"seed": self.seed} if self.name == "random" else {})}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        return [_scores(item, [self._one(item.prompt, a) for a in item.answers]) for item in items]

    def _one(self, prompt: Prompt, answer: str) -> float:
        if self.name == "random":
            return random.Random(sha256_of(str(self.seed), prompt.key, answer)).gauss(0, 1)
        return len(answer) / CHARACTERS * (1 if self.name == "longer" else -1)


class Columns:
    """Scores that stand in the data beside the answers."""

    name = "columns"

    def identity(self) -> dict:
        return {"scorer": self.name}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        lacking = [item.prompt.source for item in items if not item.given]
        if lacking:
            raise UserError(
                f"{lacking[0]}: --scorer columns needs the answers and a number for each in the data (--answers given)"
            )
        return [self._one(item, **item.given) for item in items]

    @staticmethod
    def _one(item: Candidates, scores=None, wins=None) -> Scores:
        return Scores(wins, wins) if scores is None else _scores(item, scores)


class Function:
    """`FUNCTION(prompt, answers)` of a Python file: a text and a list of texts in, a list of log-odds out."""

    def __init__(self, path: str, function: str):
        self.name, self.path, self.function = f"{path}:{function}", Path(path), function
        if not self.path.is_file():
            raise UserError(f"--scorer {self.name}: no such file")
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"--scorer {self.name}: cannot be run ({type(error).__name__}: {error})") from error
        self.call = getattr(module, function, None)
        if not callable(self.call):
            raise UserError(f"--scorer {self.name}: the file has no function {function}")

    def identity(self) -> dict:
        return {"scorer": self.name, "sha256": sha256_of_files([self.path])}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        return [_scores(item, self._numbers(item)) for item in items]

    def _numbers(self, item: Candidates) -> list[float]:
        try:
            found = [float(x) for x in self.call(item.prompt.text, list(item.answers))]
        except Exception as error:
            raise UserError(f"--scorer {self.name}: {item.prompt.source}: {type(error).__name__}: {error}") from error
        if len(found) != len(item.answers) or not all(map(math.isfinite, found)):
            raise UserError(f"--scorer {self.name}: {item.prompt.source}: must give a finite number for each answer")
        return found


class Reward:
    """A sequence classifier with one output, or with a `score` of its own (ArmoRM): the answer's reward."""

    def __init__(self, model: str, options: dict):
        from preflab.judging.reward_model import RewardModel

        self.model = RewardModel(model, options)
        self.name = self.model.name

    def identity(self) -> dict:
        return {"kind": "reward", **self.model.identity()}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        asked = {cache_key(i.prompt.messages, a): (i.prompt, a) for i in items for a in i.answers}

        def work(keys):
            for k, reward in self.model.score([asked[key] for key in keys]):
                yield keys[k], {"error": reward} if isinstance(reward, str) else {"score": reward}

        found = _kept(self, list(asked), work, eval_out, overwrite, "answer")
        results = []
        for item in items:
            rows = [found[cache_key(item.prompt.messages, answer)] for answer in item.answers]
            errors = [row["error"] for row in rows if "error" in row]
            results.append(errors[0] if errors else _scores(item, [row["score"] for row in rows]))
        return results


class Pairwise:
    """A pairwise ranker such as PairRM, asked about every ordered pair (preflab.pairs.pairrm)."""

    def __init__(self, model: str, options: dict):
        from preflab.pairs.pairrm import PairRanker

        self.model = PairRanker(model, options)
        self.name = f"pair:{model}"

    def identity(self) -> dict:
        return {"kind": "pairwise", **self.model.identity()}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        asked = {cache_key(i.prompt.messages, i.answers): i for i in items}

        def work(keys):
            from preflab.judging.reward_model import NO_NUMBER

            for key in keys:
                logits = self.model.logits(asked[key].prompt.text, asked[key].answers)
                finite = all(math.isfinite(x) for row in logits for x in row)
                yield key, {"logits": logits} if finite else {"error": NO_NUMBER}

        found = _kept(self, list(asked), work, eval_out, overwrite, "prompt")
        rows = [found[cache_key(item.prompt.messages, item.answers)] for item in items]
        return [
            row["error"] if "error" in row else _scores(item, ranker_scores(row["logits"], item.counts))
            for item, row in zip(items, rows, strict=True)
        ]


def ranker_scores(logits: list[list[float]], counts: list[int]) -> list[float]:
    """s_i = mean over the samples j of logit(i, j) - logit(j, i), 0 for the answer itself.

    As llm-blender's `max_logits` has it, whose scores SPPO's published code takes.
    """
    total = sum(counts)
    places = range(len(logits))
    return [sum(counts[j] * (logits[i][j] - logits[j][i]) for j in places) / total for i in places]


class Judged:
    """A judge of preflab.judging.judges, asked about every ordered pair: P(i beats j) is the mean of both orders."""

    def __init__(self, spec: str, options: dict):
        from preflab.judging.judges import make_judge

        self.judge = make_judge(spec, options["judge_prompt"], options)
        self.name = f"judge:{spec}"

    def identity(self) -> dict:
        return {"kind": "judge", **self.judge.identity()}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        from preflab.judging.judge_prompt import Item
        from preflab.judging.judges import judge_all

        asked, places = [], []
        for k, item in enumerate(items):
            for i, first in enumerate(item.answers):
                for j, second in enumerate(item.answers):
                    if i != j:
                        asked.append(Item(item.prompt, first, second))
                        places.append((k, i, j))
        verdicts = judge_all(self.judge, asked, eval_out, overwrite)
        beats = [[[0.5] * len(item.answers) for _ in item.answers] for item in items]
        errors = {}
        for (k, i, j), verdict in zip(places, verdicts, strict=True):
            first = verdict.first if verdict.probability is None else verdict.probability
            if first is None:
                errors.setdefault(k, f"no verdict: {verdict.error}")
                continue
            beats[k][i][j] += (first - 0.5) / 2
            beats[k][j][i] -= (first - 0.5) / 2
        wins = [wins_of(matrix, item.counts) for matrix, item in zip(beats, items, strict=True)]
        return [errors[k] if k in errors else Scores(w, w) for k, w in enumerate(wins)]


def _scores(item: Candidates, scores: list[float]) -> Scores:
    return Scores(scores, win_probabilities(scores, item.counts))


def _kept(scorer, keys: list[str], work, eval_out: str, overwrite: bool, unit: str) -> dict[str, dict]:
    """What `work(keys)` yields for every key, on every process: sharded, and kept as it comes."""

    cache = ResultCache(eval_out, "scores", scorer.identity(), overwrite)
    mine = cache.own_share([key for key in keys if key not in cache.finished])
    with progress(len(mine), scorer.name, unit) as bar:
        for key, row in work(mine) if mine else ():
            cache.add(key, row)
            bar.update()
    return cache.gather()
