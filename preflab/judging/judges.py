"""Judges: which of two answers to a prompt is better. One interface for local models, endpoints and controls.

A judge sees a first and a second answer and never which model gave them; whoever asks decides the order.
"""

import random
from collections.abc import Iterator

from preflab.judging.endpoint import Endpoint
from preflab.judging.judge_prompt import Item, JudgePrompt, Verdict
from preflab.judging.local_judges import LocalModel, VllmModel
from preflab.judging.reward_model import RewardModel
from utils.errors import UserError
from utils.progress import progress
from utils.provenance import sha256_of

KINDS = "hf:MODEL, vllm:MODEL, openai:MODEL@BASE_URL, rm:MODEL, longer or random"


def make_judge(spec: str, prompt: "str | JudgePrompt", options: dict, flag: str = "--judge "):
    """The judge named `spec`.

    Args:
        prompt: a judge prompt, or the path of one.
        options: dtype, batch_tokens, batch_size, attn_implementation, seed, attempts, timeout, concurrency.
        flag: what precedes `spec` on the command line, for error messages.

    Raises:
        UserError: an unknown kind, a missing model or URL.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("hf", "vllm", "openai") and isinstance(prompt, str):
        prompt = JudgePrompt.read(prompt)
    if spec == "longer":
        return Longer()
    if spec == "random":
        return Random(options["seed"])
    if kind == "rm" and rest:
        return RewardModel(rest, options)
    if kind == "hf" and rest:
        return LocalModel(rest, prompt, options)
    if kind == "vllm" and rest:
        return VllmModel(rest, prompt, options)
    if kind == "openai" and rest:
        model, at, url = rest.partition("@")
        if not (model and at and url.startswith(("http://", "https://"))):
            raise UserError(f"{flag}{spec}: expected openai:MODEL@BASE_URL, such as openai:gpt-4o@https://host/v1")
        return Endpoint(model, url, prompt, options)
    raise UserError(f"{flag}{spec}: unknown; one of {KINDS}")


class Longer:
    """Control: the longer answer wins (characters, as AlpacaEval's `longest`)."""

    name, instant = "longer", True

    def identity(self) -> dict:
        return {"judge": self.name}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        for i, item in enumerate(items):
            a, b = len(item.first), len(item.second)
            yield i, Verdict(0.5 + 0.5 * ((a > b) - (a < b)))


class Random:
    """Control: a coin, tossed anew for every question; the same question gets the same toss."""

    name, instant = "random", True

    def __init__(self, seed: int):
        self.seed = seed

    def identity(self) -> dict:
        return {"judge": self.name, "seed": self.seed}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        for i, item in enumerate(items):
            toss = random.Random(sha256_of(str(self.seed), item.prompt.key, item.first, item.second))
            yield i, Verdict(float(toss.random() < 0.5))


# ---------------------------------------------------------------------------------------------------------- judging


def judge_all(judge, items: list[Item], eval_out: str, overwrite: bool = False) -> list[Verdict]:
    """Every item's verdict, in order, on every process: sharded, kept as they come, identical answers tied unasked.

    Unparsed verdicts are not kept, so that the next call asks again.

    Raises:
        UserError: where the judge gave not one verdict.
    """

    from utils.cache import ResultCache, cache_key

    same = [item.first == item.second for item in items]
    if getattr(judge, "instant", False):
        verdicts = dict(judge.judge(items))
        return [Verdict(0.5, label="identical") if same[i] else verdicts[i] for i in range(len(items))]
    tie = Verdict(0.5, 0.5, label="identical")
    keys = [cache_key(item.prompt.messages, item.first, item.second) for item in items]
    cache = ResultCache(eval_out, "judgements", judge.identity(), overwrite)
    done = cache.finished
    todo = list({keys[i]: i for i in range(len(items)) if not same[i] and keys[i] not in done}.values())
    mine = cache.own_share(todo)
    failed = ResultCache(eval_out, "unparsed", {**judge.identity(), "items": keys}, overwrite=True)
    with progress(len(mine), judge.name, "verdict") as bar:
        for k, verdict in judge.judge([items[i] for i in mine]) if mine else ():
            kept = cache if verdict.first is not None else failed
            kept.add(keys[mine[k]], verdict.__dict__)
            bar.update()
    found, errors = cache.gather(), failed.gather()
    verdicts = [tie if same[i] else Verdict(**(found.get(keys[i]) or errors[keys[i]])) for i in range(len(items))]
    asked = [verdict for verdict, free in zip(verdicts, same, strict=True) if not free]
    if asked and all(verdict.first is None for verdict in asked):
        raise UserError(f"judge {judge.name} gave no verdict on {len(asked)} questions; the first: {asked[0].error}")
    return verdicts
