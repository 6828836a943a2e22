"""Scorers: rank the answers to a prompt and estimate how likely each one beats the others.

Reward models, pairwise rankers, judges, a user's Python function, scores in the dataset and controls share the
interface `Scorer`. A scorer sees the distinct answers, but not how often the model gave each of them.
"""

import importlib.util
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from preflab.data.prompts import Prompt
from preflab.judging.implicit_reward import ImplicitReward
from preflab.judging.judge_prompt import NOT_FINITE, Item
from preflab.judging.judges import judge_all, make_judge
from preflab.judging.pairrm import PairRanker
from preflab.judging.reward_model import RewardModel, ScoringJudge
from preflab.models.loading import default_dtype
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of, sha256_of_files

KINDS = "rm:MODEL, pair:MODEL, implicit:RUN, judge:JUDGE, FILE.py:FUNCTION, columns, longer, shorter or random"
# The controls' scores are log-odds as well: 100 characters more multiply the odds by e.
CHARACTERS_PER_LOG_ODDS = 100


@dataclass
class Candidates:
    """The distinct, non-empty answers to one prompt.

    Attributes:
        counts: how many samples gave each answer.
        given: the dataset's numbers per answer, as "scores" (log-odds) or "wins" (probabilities); may be empty.
    """

    prompt: Prompt
    answers: list[str]
    counts: list[int]
    given: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Scores:
    """A scorer's result for one prompt, one number per answer.

    Attributes:
        scores: rank the answers, higher is better.
        wins: estimated probability that the answer beats a sample of the policy.
    """

    scores: list[float]
    wins: list[float]


class Scorer(Protocol):
    """What every scorer offers.

    Attributes:
        name: its --scorer specification, used in artifacts and tables.
    """

    name: str

    def identity(self) -> dict:
        """Everything that its scores depend on, for artifacts and caches."""

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        """Score every prompt's answers, in order and on every process; a text says why a prompt has no scores.

        Args:
            eval_out: folder of the result cache.
            overwrite: ignore cached results.
        """


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    # exp is only called with an argument of at most 0; exp(-x) overflows from x = -710.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def win_probabilities(scores: list[float], counts: list[int]) -> list[float]:
    """P_i = mean over all samples j of sigmoid(s_i - s_j). The answer itself is among the samples and counts 1/2.

    Wu et al. 2024 (arXiv 2405.00675), section 4, as in their published code (scripts/compute_prob.py).

    Args:
        counts: how many samples gave each answer.
    """
    # Bradley-Terry: scores are log-odds, so sigmoid(s_i - s_j) is P(i beats j). The diagonal is 1/2.
    matrix = [[sigmoid(a - b) for b in scores] for a in scores]
    return mean_wins(matrix, counts)


def mean_wins(matrix: list[list[float]], counts: list[int]) -> list[float]:
    """P_i = mean over all samples j of P(i beats j).

    Args:
        matrix: P(i beats j), shape (n, n).
        counts: how many samples gave each answer, shape (n,).
    """
    # Weighted by counts: the opponent is a random sample of the policy, not a random distinct answer.
    total = sum(counts)
    return [sum(c * p for c, p in zip(counts, row, strict=True)) / total for row in matrix]


def scorer_options(args) -> dict:
    """The options of `make_scorer` out of a script's arguments, which have ModelArguments and the scorer's flags."""
    return {
        "dtype": args.scorer_dtype or default_dtype(),
        "judge_prompt": args.judge_prompt,
        "attempts": 4,
        "timeout": 120.0,
        "concurrency": 8,
        "batch_tokens": args.batch_tokens,
        "batch_size": args.batch_size,
        "attn_implementation": args.attn_implementation,
        "seed": args.seed,
        "trust_remote_code": args.trust_remote_code,
        "eval_out": args.eval_out,
        "vllm_args": args.vllm_args,
    }


def make_scorer(spec: str, options: dict) -> Scorer:
    """The scorer of a --scorer specification.

    Args:
        options: those of `preflab.judging.judges.make_judge`, and judge_prompt.

    Raises:
        UserError: an unknown kind, or a missing file, function or model.
    """
    kind, _, rest = spec.partition(":")
    # Controls before the kinds with a model, because they have no part after the colon.
    if spec in ("longer", "shorter", "random"):
        return ControlScorer(spec, options["seed"])
    if spec == "columns":
        return ColumnScorer()
    if kind == "rm" and rest:
        return RewardScorer(RewardModel(rest, options))
    if kind == "implicit" and rest:
        return RewardScorer(ImplicitReward(rest, options))
    if kind == "pair" and rest:
        return RankerScorer(rest, options)
    if kind == "judge" and rest:
        return JudgeScorer(rest, options)
    if kind.endswith(".py") and rest:
        return FunctionScorer(kind, rest)
    raise UserError(f"--scorer {spec}: unknown; use {KINDS}")


def _with_wins(item: Candidates, scores: list[float]) -> Scores:
    """Log-odds with the win probabilities that follow from them."""
    return Scores(scores, win_probabilities(scores, item.counts))


# ------------------------------------------------------------------------------------------------- without a model


class ControlScorer:
    """Control: length alone, or chance. A scorer that does not differ from it is not worth its time."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed = name, seed

    def identity(self) -> dict:
        # Only `random` depends on the seed; the identity of the others must not change with it.
        return {"scorer": self.name, **({"seed": self.seed} if self.name == "random" else {})}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        return [_with_wins(item, [self._log_odds(item.prompt, a) for a in item.answers]) for item in items]

    def _log_odds(self, prompt: Prompt, answer: str) -> float:
        if self.name == "random":
            # Seeded by the content, so that the score does not depend on order or number of processes.
            return random.Random(sha256_of(str(self.seed), prompt.key, answer)).gauss(0, 1)
        return len(answer) / CHARACTERS_PER_LOG_ODDS * (1 if self.name == "longer" else -1)


class ColumnScorer:
    """Scores that the dataset holds for its own answers."""

    name = "columns"

    def identity(self) -> dict:
        return {"scorer": self.name}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        missing = [item.prompt.source for item in items if not item.given]
        if missing:
            raise UserError(
                f"{missing[0]}: --scorer columns needs rows with answers and one number per answer, and --answers given"
            )
        return [self._scores_of(item, **item.given) for item in items]

    @staticmethod
    def _scores_of(item: Candidates, scores=None, wins=None) -> Scores:
        # Win probabilities are used as they are; as ranking scores they serve too.
        return Scores(wins, wins) if scores is None else _with_wins(item, scores)


class FunctionScorer:
    """`FUNCTION(prompt, answers)` of a Python file: takes a text and a list of texts, returns a list of log-odds."""

    def __init__(self, path: str, function: str):
        self.name, self.path = f"{path}:{function}", Path(path)
        if not self.path.is_file():
            raise UserError(f"--scorer {self.name}: no such file")
        # Loaded by path, not imported by name: the file may be outside sys.path.
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        module = importlib.util.module_from_spec(spec)
        # User code: any exception becomes a one-line error.
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
        return [_with_wins(item, self._log_odds(item)) for item in items]

    def _log_odds(self, item: Candidates) -> list[float]:
        source = f"--scorer {self.name}: {item.prompt.source}"
        try:
            # A copy of the answers, so that the function cannot reorder the candidates. float() accepts numpy and torch
            # scalars.
            log_odds = [float(x) for x in self.call(item.prompt.text, list(item.answers))]
        except Exception as error:
            raise UserError(f"{source}: {type(error).__name__}: {error}") from error
        if len(log_odds) != len(item.answers) or not all(map(math.isfinite, log_odds)):
            raise UserError(f"{source}: must return a finite number for each answer")
        return log_odds


# ---------------------------------------------------------------------------------------------------- with a model


class RewardScorer:
    """A reward model or a run's implicit reward: the reward of an answer is the score."""

    def __init__(self, model: ScoringJudge):
        self.model, self.name = model, model.name

    def identity(self) -> dict:
        return {"kind": "reward", **self.model.identity()}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        requested = {cache_key(i.prompt.messages, a): (i.prompt, a) for i in items for a in i.answers}

        def compute(keys):
            # The model yields results in the order of its batches (by length), so each comes with its index.
            for k, reward in self.model.score([requested[key] for key in keys]):
                yield keys[k], {"error": reward} if isinstance(reward, str) else {"score": reward}

        cached = _cached_results(self, list(requested), compute, eval_out, overwrite, "answer")
        results = []
        for item in items:
            rows = [cached[cache_key(item.prompt.messages, answer)] for answer in item.answers]
            # One failed answer leaves the prompt without scores: its rank among the others is unknown.
            errors = [row["error"] for row in rows if "error" in row]
            results.append(errors[0] if errors else _with_wins(item, [row["score"] for row in rows]))
        return results


class RankerScorer:
    """A pairwise ranker such as PairRM, applied to every ordered pair of answers (preflab.judging.pairrm)."""

    def __init__(self, model: str, options: dict):
        self.model = PairRanker(model, options)
        self.name = f"pair:{model}"

    def identity(self) -> dict:
        return {"kind": "pairwise", **self.model.identity()}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        # The key holds all answers of a prompt, because the result is their (n, n) matrix.
        requested = {cache_key(i.prompt.messages, i.answers): i for i in items}

        def compute(keys):
            for key in keys:
                logits = self.model.logits(requested[key].prompt.text, requested[key].answers)
                finite = all(math.isfinite(x) for row in logits for x in row)
                # Logits are cached, not scores: the counts that weigh them may change with further samples.
                yield key, {"logits": logits} if finite else {"error": NOT_FINITE}

        cached = _cached_results(self, list(requested), compute, eval_out, overwrite, "prompt")
        rows = [cached[cache_key(item.prompt.messages, item.answers)] for item in items]
        return [
            row["error"] if "error" in row else _with_wins(item, ranker_scores(row["logits"], item.counts))
            for item, row in zip(items, rows, strict=True)
        ]


def ranker_scores(logits: list[list[float]], counts: list[int]) -> list[float]:
    """s_i = mean over all samples j of logit(i, j) - logit(j, i), which is 0 for the answer itself.

    As in llm-blender's `max_logits`, the source of the scores in SPPO's published code.

    Args:
        logits: shape (n, n), above 0 where answer i, read first, beats answer j.
        counts: how many samples gave each answer, shape (n,).
    """
    total, n = sum(counts), len(logits)
    # Subtracting the reverse order cancels a preference for the first position.
    return [sum(counts[j] * (logits[i][j] - logits[j][i]) for j in range(n)) / total for i in range(n)]


class JudgeScorer:
    """A judge, applied to every ordered pair of answers: P(i beats j) is the mean of both orders."""

    def __init__(self, spec: str, options: dict):
        self.judge = make_judge(spec, options["judge_prompt"], options, "--scorer judge:")
        # Not the specification, which may hold a login.
        self.name = f"judge:{self.judge.name}"

    def identity(self) -> dict:
        return {"kind": "judge", **self.judge.identity()}

    def score(self, items: list[Candidates], eval_out: str, overwrite: bool) -> list[Scores | str]:
        # `positions` holds (item, i, j) of each question; n answers give n (n - 1) questions.
        questions, positions = [], []
        for k, item in enumerate(items):
            for i, first in enumerate(item.answers):
                for j, second in enumerate(item.answers):
                    if i != j:
                        questions.append(Item(item.prompt, first, second))
                        positions.append((k, i, j))
        verdicts = judge_all(self.judge, questions, eval_out, overwrite)
        # A vLLM judge holds the GPU's memory, which the next scorer needs.
        if hasattr(self.judge, "close"):
            self.judge.close()
        # P(i beats j) starts at 1/2; each of the two orders moves it by half of what its verdict says beyond 1/2.
        beats = [[[0.5] * len(item.answers) for _ in item.answers] for item in items]
        errors = {}
        for (k, i, j), verdict in zip(positions, verdicts, strict=True):
            # A probability where the judge gives one, else its decision as 1, 0 or 1/2.
            first_wins = verdict.first if verdict.probability is None else verdict.probability
            if first_wins is None:
                # The first error is kept; a prompt with a missing verdict gets no scores, since its matrix would be
                # incomplete.
                errors.setdefault(k, f"no verdict: {verdict.error}")
                continue
            beats[k][i][j] += (first_wins - 0.5) / 2
            # Keeps beats[i][j] + beats[j][i] = 1.
            beats[k][j][i] -= (first_wins - 0.5) / 2
        # Win probabilities are also the ranking scores: a judge has no other scale.
        wins = [mean_wins(matrix, item.counts) for matrix, item in zip(beats, items, strict=True)]
        return [errors[k] if k in errors else Scores(w, w) for k, w in enumerate(wins)]


def _cached_results(
    scorer: Scorer, keys: list[str], compute, eval_out: str, overwrite: bool, unit: str
) -> dict[str, dict]:
    """The result of every key, on every process. New results are sharded over the processes and cached one by one.

    Args:
        compute: a function of keys that yields (key, result).
        unit: what a key stands for, in the progress display.
    """
    cache = ResultCache(eval_out, "scores", scorer.identity(), overwrite)
    # `finished` is equal on every process, so the shares are disjoint and together complete.
    own_keys = cache.own_share([key for key in keys if key not in cache.finished])
    with progress(len(own_keys), scorer.name, unit) as bar:
        # Without own work, `compute` is not called, so that no weights are loaded.
        for key, result in compute(own_keys) if own_keys else ():
            cache.add(key, result)
            bar.update()
    # Waits for all processes, so every process returns the same complete results.
    return cache.gather()
