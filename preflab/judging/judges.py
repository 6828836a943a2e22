"""Make the judge of a --judge specification, the controls, and cached judging of many items."""

import random
from collections import Counter
from collections.abc import Iterator

from preflab.evaluation.servers import model_and_url
from preflab.judging.endpoint import EndpointJudge
from preflab.judging.implicit_reward import ImplicitReward
from preflab.judging.judge_prompt import Item, Judge, JudgePrompt, Verdict
from preflab.judging.local_judges import LocalJudge, VllmJudge
from preflab.judging.pairrm import RankerJudge
from preflab.judging.reward_model import RewardModel
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of

KINDS = "hf:MODEL, vllm:MODEL, openai:MODEL@BASE_URL, rm:MODEL, pair:MODEL, implicit:RUN, longer or random"


def make_judge(spec: str, prompt: str | JudgePrompt, options: dict, flag: str = "--judge ") -> Judge:
    """The judge of a specification; no weights are loaded yet.

    Args:
        prompt: a judge prompt, or the path of one.
        options: dtype, batch_tokens, batch_size, attn_implementation, seed, attempts, timeout, concurrency,
            checkpoints and eval_out (of implicit:RUN), and max_new_tokens in place of the prompt's.
        flag: what precedes `spec` on the command line, for error messages.

    Raises:
        UserError: an unknown kind, a missing model or URL.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("hf", "vllm", "openai"):
        # Only for judges that read one, so that a missing file does not stop the others.
        prompt = JudgePrompt.read(prompt) if isinstance(prompt, str) else prompt
        prompt = prompt.with_room(options.get("max_new_tokens"))
    if spec == "longer":
        return LongerJudge()
    if spec == "random":
        return RandomJudge(options["seed"])
    if kind == "rm" and rest:
        return RewardModel(rest, options)
    if kind == "pair" and rest:
        return RankerJudge(rest, options)
    if kind == "implicit" and rest:
        return ImplicitReward(rest, options)
    if kind == "hf" and rest:
        return LocalJudge(rest, prompt, options)
    if kind == "vllm" and rest:
        return VllmJudge(rest, prompt, options)
    if kind == "openai" and rest:
        return EndpointJudge(*model_and_url(spec, f"{flag}{spec}"), prompt, options)
    raise UserError(f"{flag}{spec}: unknown; use {KINDS}")


class LongerJudge:
    """Control: the answer with more characters wins, as in AlpacaEval's `longest`."""

    name, instant = "longer", True

    def identity(self) -> dict:
        return {"judge": self.name}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        for i, item in enumerate(items):
            a, b = len(item.first), len(item.second)
            yield i, Verdict(0.5 + 0.5 * ((a > b) - (a < b)))


class RandomJudge:
    """Control: a fair coin per item. The toss depends on seed and item only, and is new for the swapped order."""

    name, instant = "random", True

    def __init__(self, seed: int):
        self.seed = seed

    def identity(self) -> dict:
        return {"judge": self.name, "seed": self.seed}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        for i, item in enumerate(items):
            # A hash of the item instead of one generator for all: the toss does not depend on order, sharding or
            # resuming.
            toss = random.Random(sha256_of(str(self.seed), item.prompt.key, item.first, item.second))
            yield i, Verdict(float(toss.random() < 0.5))


def judge_all(judge: Judge, items: list[Item], eval_out: str, overwrite: bool = False) -> list[Verdict]:
    """The verdict on every item, in order and on every process.

    Items are sharded over the processes and their verdicts cached one by one. Identical answers are a tie and are not
    sent to the judge. Unparsed verdicts are not cached, so the next call asks again.

    Raises:
        UserError: the judge gave no verdict on any item.
    """
    identical = [item.first == item.second for item in items]
    # No cache and no sharding: every process computes the same verdicts.
    if judge.instant:
        verdicts = dict(judge.judge(items))
        return [Verdict(0.5, label="identical") if identical[i] else verdicts[i] for i in range(len(items))]
    keys = [cache_key(item.prompt.messages, item.first, item.second) for item in items]
    cache = ResultCache(eval_out, "judgements", judge.identity(), overwrite)
    # One index per distinct question that is not cached.
    todo = {keys[i]: i for i in range(len(items)) if not identical[i] and keys[i] not in cache.finished}
    own = cache.own_share(list(todo.values()))
    # Reasons of this call's unparsed verdicts: a file, since every process must know those of the others.
    # Opened by every process, because opening synchronises them.
    failures = ResultCache(eval_out, "unparsed", {**judge.identity(), "items": keys}, overwrite=True)
    with progress(len(own), judge.name, "verdict") as bar:
        for k, verdict in judge.judge([items[i] for i in own]) if own else ():
            (failures if verdict.first is None else cache).add(keys[own[k]], verdict.__dict__)
            bar.update()
    # On a key in both, the verdict (right operand) wins.
    rows = failures.gather() | cache.gather()
    tie = Verdict(0.5, 0.5, label="identical")
    verdicts = [tie if same else Verdict(**rows[key]) for same, key in zip(identical, keys, strict=True)]
    judged = [verdict for verdict, same in zip(verdicts, identical, strict=True) if not same]
    if judged and all(verdict.first is None for verdict in judged):
        raise UserError(f"judge {judge.name} gave no verdict on {len(judged)} questions; the first: {judged[0].error}")
    return verdicts


def notes_of(items: list[dict], unit: str = "verdicts") -> list[str]:
    """What was given up to get verdicts or answers, with their number, for reports.

    Args:
        items: verdicts or answers as in artifacts, whose `note` says what was given up. unit: which of the two.
    """
    counts = Counter(item["note"] for item in items if item and item.get("note"))
    return [f"{note} ({count} of {len(items)} {unit})" for note, count in counts.most_common()]
