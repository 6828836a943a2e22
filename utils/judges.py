"""Judges: which of two answers to a prompt is better. One interface for local models, endpoints and controls.

A judge sees a first and a second answer and never which model gave them; whoever asks decides the order.
"""

import math
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.chat import CONTROL_TOKENS, ChatRenderer, TemplateRefused, break_up, neutralise
from utils.errors import UserError, is_main_process
from utils.prompts import Prompt
from utils.provenance import sha256_of

KINDS = "hf:MODEL, vllm:MODEL, openai:MODEL@BASE_URL, rm:MODEL, longer or random"
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


# ----------------------------------------------------------------------------------------------------- judge prompts


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
        import yaml

        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--judge_prompt {path}: cannot be read ({error})") from None
        keys = {"user", "labels", "verdict", "system", "max_new_tokens"}
        if not isinstance(found, dict) or not {"user", "labels", "verdict"} <= set(found) <= keys:
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


# ----------------------------------------------------------------------------------------------------------- judges


def make_judge(spec: str, prompt: "str | JudgePrompt", options: dict):
    """The judge named `spec`.

    Args:
        prompt: a judge prompt, or the path of one.
        options: dtype, batch_tokens, batch_size, attn_implementation, seed, attempts, timeout, concurrency.

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
            raise UserError(f"--judge {spec}: expected openai:MODEL@BASE_URL, such as openai:gpt-4o@https://host/v1")
        return Endpoint(model, url, prompt, options)
    raise UserError(f"--judge {spec}: unknown; one of {KINDS}")


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


NO_NUMBER = "the model's output is no finite number"


def longest_text(model) -> int:
    """Tokens that a transformers model can read, as its config says; no bound where it says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


class LocalModel:
    """A causal LM on this machine: the log-probability of its verdict token, or the last label of what it writes."""

    kind = "hf"

    def __init__(self, model: str, prompt: JudgePrompt, options: dict):
        from utils.models import load_tokenizer

        self.name, self.model_name, self.prompt, self.options = f"{self.kind}:{model}", model, prompt, options
        self.tokenizer, self.model = load_tokenizer(model), None
        self.chat = ChatRenderer(self.tokenizer)

    def identity(self) -> dict:
        from utils.models import identify

        found = {"judge": self.name, **identify(self.model_name, self.tokenizer), **self.prompt.identity}
        return {**found, "dtype": self.options["dtype"], "max_new_tokens": self.prompt.max_new_tokens}

    def load(self) -> None:
        """Load the weights, once."""
        from accelerate import PartialState

        from utils.models import load_model

        if self.model is None:
            self.model = load_model(
                self.model_name, dtype=self.options["dtype"], attn_implementation=self.options["attn_implementation"]
            )
            self.model.to(PartialState().device).eval()

    def longest(self) -> int:
        """Tokens that the model can read."""
        return longest_text(self.model)

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        self.load()
        limit = self.longest()
        asked, texts = [], []
        for i, item in enumerate(items):
            messages = self.prompt.messages(item, lambda text: neutralise(text, self.tokenizer))
            try:
                texts.append(self.chat.prompt_text(messages))
                asked.append((i, messages))
            except TemplateRefused as error:
                yield i, unparsed(f"the judge's chat template refused: {error}")
        ids = self.chat.ids(texts) if texts else []
        room = limit - (1 if self.prompt.verdict == "logprob" else self.prompt.max_new_tokens)
        fits = [k for k, found in enumerate(ids) if len(found) <= room]
        for k in set(range(len(ids))) - set(fits):
            yield asked[k][0], unparsed(f"{len(ids[k])} tokens are more than the judge reads ({room})")
        if self.prompt.verdict == "text":
            yield from self._written([asked[k] for k in fits])
        elif fits:
            yield from self._weighed([(asked[k][0], texts[k], ids[k]) for k in fits])

    def _written(self, asked) -> Iterator[tuple[int, Verdict]]:
        from utils.generation import generate

        settings = {k: self.options[k] for k in ("batch_tokens", "batch_size")}
        settings["max_new_tokens"] = self.prompt.max_new_tokens
        for answer in generate(self.model, self.tokenizer, [messages for _, messages in asked], **settings):
            yield asked[answer["index"]][0], self.prompt.parse(answer["text"])

    def _label_ids(self, text: str) -> dict[str, int]:
        """The one token that each label is after the judge's own template. Raises UserError where one is not."""
        plain, *labelled = self.chat.ids([text, *(text + label for label in self.prompt.labels)])
        found = {}
        for label, ids in zip(self.prompt.labels, labelled, strict=True):
            if len(ids) != len(plain) + 1 or ids[:-1] != plain:
                raise UserError(
                    f"--judge_prompt {self.prompt.path}: label {label!r} is not one token of {self.model_name}; use"
                    " labels that are, or verdict: text"
                )
            found[label] = ids[-1]
        if len(set(found.values())) < len(found):
            raise UserError(f"--judge_prompt {self.prompt.path}: two labels are the same token of {self.model_name}")
        return found

    def _weighed(self, asked) -> Iterator[tuple[int, Verdict]]:
        import torch

        from utils.batching import pad_right, token_batches
        from utils.logps import captured_hidden, head_logits

        labels = self._label_ids(asked[0][1])
        budget = (self.options["batch_tokens"], self.options["batch_size"])
        for batch in token_batches([len(ids) for _, _, ids in asked], *budget):
            ids, mask = pad_right([asked[k][2] for k in batch], self.tokenizer.pad_token_id, self.model.device)
            with torch.inference_mode(), captured_hidden(self.model) as hidden:
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            with torch.inference_mode():
                last = hidden[0][torch.arange(len(batch), device=ids.device), mask.sum(1) - 1]
                logprobs = head_logits(self.model, last).log_softmax(-1)[:, list(labels.values())].tolist()
            for k, row in zip(batch, logprobs, strict=True):
                yield asked[k][0], self.prompt.weigh(dict(zip(labels, row, strict=True)))


class VllmModel(LocalModel):
    """The same through vLLM: its probabilities of the labels come from the 20 likeliest tokens."""

    kind = "vllm"

    def load(self) -> None:
        from utils.models import locate
        from utils.vllm_engine import choose_engine, load_engine

        choose_engine("vllm")
        if self.model is None:
            self.model, _ = load_engine(locate(self.model_name), self.options["dtype"])

    def longest(self) -> int:
        return self.model.llm_engine.model_config.max_model_len

    def _written(self, asked) -> Iterator[tuple[int, Verdict]]:
        from utils.vllm_engine import generate

        prompts, room = [messages for _, messages in asked], self.prompt.max_new_tokens
        for answer in generate(self.model, None, self.tokenizer, prompts, room):
            yield asked[answer["index"]][0], self.prompt.parse(answer["text"])

    def _weighed(self, asked) -> Iterator[tuple[int, Verdict]]:
        from utils.vllm_engine import label_logprobs

        labels = self._label_ids(asked[0][1])
        found = label_logprobs(self.model, [ids for _, _, ids in asked], labels)
        for (i, _, _), logprobs in zip(asked, found, strict=True):
            yield i, self.prompt.weigh(logprobs)

    def close(self) -> None:
        """Give the GPU back."""
        from utils.vllm_engine import close

        if self.model is not None:
            close(self.model)
            self.model = None


class RewardModel:
    """A sequence classifier with one output: the answer with the higher score wins; order cannot matter."""

    def __init__(self, model: str, options: dict):
        from utils.models import load_tokenizer, locate

        self.name, self.model_name, self.options = f"rm:{model}", model, options
        locate(model)
        self._refuse_unreadable_head()
        self.tokenizer, self.model = load_tokenizer(model), None
        self.chat = ChatRenderer(self.tokenizer)

    def identity(self) -> dict:
        from utils.models import identify

        return {"judge": self.name, **identify(self.model_name, self.tokenizer), "dtype": self.options["dtype"]}

    def _refuse_unreadable_head(self) -> None:
        """Raise UserError, before anything long, where the config has not exactly one output or code of its own."""
        from transformers import AutoConfig

        from utils.models import LOAD_ERRORS, _unreadable, locate

        self.own_code = False
        try:
            config = AutoConfig.from_pretrained(locate(self.model_name), trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise _unreadable(f"reward model {self.model_name}", error) from error
        if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
            if not self.options.get("trust_remote_code"):
                raise UserError(f"{self.name}: computes its score with code of its own; --trust_remote_code runs it")
            self.own_code = True
        elif config.num_labels != 1:
            raise UserError(f"{self.name}: has {config.num_labels} outputs; a reward model has one")

    def load(self) -> None:
        """Load the weights, once."""
        import torch
        from accelerate import PartialState
        from transformers import AutoModelForSequenceClassification

        from utils.models import LOAD_ERRORS, _unreadable, locate

        if self.model is not None:
            return
        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(
                locate(self.model_name), dtype=getattr(torch, self.options["dtype"]), trust_remote_code=self.own_code
            )
        except LOAD_ERRORS as error:
            raise _unreadable(f"reward model {self.model_name}", error) from error
        self.model.to(PartialState().device).eval()

    def score(self, asked: list[tuple[Prompt, str]]) -> Iterator[tuple[int, float | str]]:
        """(index, reward) of each answer, read at its last real token; a text in its place says why there is none."""
        import torch

        from utils.batching import pad_right, token_batches

        self.load()
        limit = longest_text(self.model)
        rows = {}
        for i, (prompt, answer) in enumerate(asked):
            messages = [{**m, "content": neutralise(m["content"], self.tokenizer)} for m in prompt.messages]
            try:
                (ids,) = self.chat.ids([self.chat.full_text(messages, neutralise(answer, self.tokenizer))])
            except TemplateRefused as error:
                yield i, f"the reward model's chat template refused: {error}"
                continue
            bos = self.tokenizer.bos_token_id
            if bos is not None and ids[:2] == [bos, bos]:
                raise UserError(f"--judge {self.name}: two BOS tokens open a text; template and tokenizer both add one")
            if len(ids) > limit:
                # Cut short, its score would be read in the middle of the answer.
                yield i, f"{len(ids)} tokens are more than the reward model reads ({limit})"
                continue
            rows[i] = ids
        keys = list(rows)
        budget = (self.options["batch_tokens"], self.options["batch_size"])
        for batch in token_batches([len(rows[i]) for i in keys], *budget):
            take = [keys[k] for k in batch]
            # transformers reads the score at the last token that is not the pad id: none may end a text by chance.
            ends = {rows[i][-1] for i in take}
            pad = next(t for t in range(len(ends) + 1) if t not in ends)
            self.model.config.get_text_config().pad_token_id = self.model.config.pad_token_id = pad
            ids, mask = pad_right([rows[i] for i in take], pad, self.model.device)
            with torch.inference_mode():
                output = self.model(input_ids=ids, attention_mask=mask)
                # ArmoRM's own code has many logits, one an attribute, and the score that it makes of them.
                reward = output.score if self.own_code and hasattr(output, "score") else output.logits
                found = reward.float().reshape(len(take)).tolist()
            for i, value in zip(take, found, strict=True):
                yield i, value if math.isfinite(value) else NO_NUMBER

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        asked, waiting, known = {}, {}, {}
        for i, item in enumerate(items):
            for answer in (item.first, item.second):
                asked.setdefault((item.prompt.key, answer), (item.prompt, answer))
                waiting.setdefault((item.prompt.key, answer), []).append(i)
        keys = list(asked)
        for k, reward in self.score([asked[key] for key in keys]):
            known[keys[k]] = reward
            for i in dict.fromkeys(waiting[keys[k]]):
                pair = [known.get((items[i].prompt.key, text)) for text in (items[i].first, items[i].second)]
                if None not in pair:
                    yield i, self._verdict(*pair)

    @staticmethod
    def _verdict(a: float | str, b: float | str) -> Verdict:
        if isinstance(a, str) or isinstance(b, str):
            return unparsed(a if isinstance(a, str) else b)
        return Verdict(0.5 + 0.5 * ((a > b) - (a < b)), 1 / (1 + math.exp(-max(-700.0, min(700.0, a - b)))))


class Endpoint:
    """A server that speaks OpenAI's chat completions. Timeouts, 429 and 5xx are retried with backoff by its client."""

    def __init__(self, model: str, url: str, prompt: JudgePrompt, options: dict):
        import openai

        self.name, self.model, self.prompt, self.options = f"openai:{model}@{url}", model, prompt, options
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=options["attempts"],
            timeout=options["timeout"],
        )
        self.down = 0

    def identity(self) -> dict:
        return {"judge": self.name, **self.prompt.identity, "max_new_tokens": self.prompt.max_new_tokens}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        from concurrent.futures import ThreadPoolExecutor, as_completed

        with ThreadPoolExecutor(self.options["concurrency"]) as pool:
            futures = {pool.submit(self._ask, item): i for i, item in enumerate(items)}
            try:
                for done in as_completed(futures):
                    yield futures[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, item: Item) -> Verdict:
        import openai

        verdict = unparsed("not asked")
        # Nonsense is asked again, as often as an error would be.
        for _ in range(1 + self.options["attempts"]):
            if self.down >= 3:
                return unparsed("the endpoint does not answer")
            try:
                verdict = self._once(item)
                self.down = 0
            except openai.APITimeoutError:
                return unparsed(f"no answer within {self.options['timeout']:g} s")
            except openai.APIConnectionError as error:
                self.down += 1
                return unparsed(f"no connection: {error.__cause__ or error}")
            except openai.OpenAIError as error:
                return unparsed(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
                verdict = unparsed(f"a reply that is no chat completion ({type(error).__name__})")
            if verdict.first is not None:
                break
        return verdict

    def _once(self, item: Item) -> Verdict:
        weighed = self.prompt.verdict == "logprob"
        extra = {"logprobs": True, "top_logprobs": 5, "max_tokens": 1, "temperature": 1.0}
        written = {"max_tokens": self.prompt.max_new_tokens, "temperature": 0.0}
        messages = self.prompt.messages(item, lambda text: break_up(CONTROL_TOKENS, text))
        answer = self.client.chat.completions.create(
            model=self.model, messages=messages, **(extra if weighed else written)
        )
        if not getattr(answer, "choices", None):
            return unparsed("the endpoint's reply holds no choice")
        choice = answer.choices[0]
        content = getattr(choice.logprobs, "content", None) if weighed and choice.logprobs else None
        if content:
            top = {}
            for token in content[0].top_logprobs or []:
                top.setdefault(token.token.strip(), token.logprob)
            verdict = self.prompt.weigh({label: top[label] for label in self.prompt.labels if label in top})
            if verdict.first is not None:
                return verdict
        return self.prompt.parse((choice.message.content if choice.message else None) or "")


# ---------------------------------------------------------------------------------------------------------- judging


def judge_all(judge, items: list[Item], eval_out: str, overwrite: bool = False) -> list[Verdict]:
    """Every item's verdict, in order, on every process: sharded, kept as they come, identical answers tied unasked.

    Unparsed verdicts are not kept, so that the next call asks again.

    Raises:
        UserError: where the judge gave not one verdict.
    """
    from tqdm import tqdm

    from utils.ledger import Ledger, key_of

    same = [item.first == item.second for item in items]
    if getattr(judge, "instant", False):
        verdicts = dict(judge.judge(items))
        return [Verdict(0.5, label="identical") if same[i] else verdicts[i] for i in range(len(items))]
    tie = Verdict(0.5, 0.5, label="identical")
    keys = [key_of(item.prompt.messages, item.first, item.second) for item in items]
    ledger = Ledger(eval_out, "judgements", judge.identity(), overwrite)
    done = ledger.before
    todo = list({keys[i]: i for i in range(len(items)) if not same[i] and keys[i] not in done}.values())
    mine = ledger.share(todo)
    failed = Ledger(eval_out, "unparsed", {**judge.identity(), "items": keys}, overwrite=True)
    silent = not (mine and is_main_process())
    with tqdm(total=len(mine), desc=judge.name, unit="verdict", disable=silent) as bar:
        for k, verdict in judge.judge([items[i] for i in mine]) if mine else ():
            kept = ledger if verdict.first is not None else failed
            kept.add(keys[mine[k]], verdict.__dict__)
            bar.update()
    found, errors = ledger.gather(), failed.gather()
    verdicts = [tie if same[i] else Verdict(**(found.get(keys[i]) or errors[keys[i]])) for i in range(len(items))]
    asked = [verdict for verdict, free in zip(verdicts, same, strict=True) if not free]
    if asked and all(verdict.first is None for verdict in asked):
        raise UserError(f"judge {judge.name} gave no verdict on {len(asked)} questions; the first: {asked[0].error}")
    return verdicts
