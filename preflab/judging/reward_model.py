"""Reward models, as judges (preflab.judging.judges) and as scorers (preflab.pairs.scorers)."""

import math
from collections.abc import Iterator

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForSequenceClassification

from preflab.data.chat_template import ChatRenderer, TemplateRefused, neutralise
from preflab.data.prompts import Prompt
from preflab.evaluation.comparison import base_of
from preflab.judging.armorm import ARCHITECTURE, END_OF_PROMPT, ArmoRM
from preflab.judging.judge_prompt import NOT_FINITE, Item, Verdict, unparsed
from preflab.models.adapter_files import adapter_sha256
from preflab.models.batching import pad_right, token_batches
from preflab.models.checks import UNLIMITED, context_length
from preflab.models.loading import (
    LOAD_ERRORS,
    identify,
    load_adapter,
    load_error,
    load_model,
    load_tokenizer,
    locate,
)
from preflab.models.logprobs import without_adapter_shell
from preflab.models.reward_head import reward_adapter
from utils.errors import UserError


class ScoringJudge:
    """A judge that scores each answer on its own: the answer with the higher reward wins, whatever the order.

    Subclasses have `score`: (prompt, answer) pairs to (index, reward); a text in place of a reward gives the reason.
    """

    instant = False

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        # Each distinct answer is scored once; a verdict is given as soon as both of its answers have a reward.
        # Keyed by (prompt, answer text). items_of lists the items that wait for an answer's reward.
        answers, items_of, rewards = {}, {}, {}
        for i, item in enumerate(items):
            for answer in (item.first, item.second):
                answers.setdefault((item.prompt.key, answer), (item.prompt, answer))
                items_of.setdefault((item.prompt.key, answer), []).append(i)
        keys = list(answers)
        for k, reward in self.score(list(answers.values())):
            rewards[keys[k]] = reward
            # Each item once, also if both of its answers are the same text.
            for i in dict.fromkeys(items_of[keys[k]]):
                pair = [rewards.get((items[i].prompt.key, text)) for text in (items[i].first, items[i].second)]
                if None not in pair:
                    yield i, self._verdict(*pair)

    @staticmethod
    def _verdict(a: float | str, b: float | str) -> Verdict:
        """The higher reward wins with probability sigmoid(a - b); a text instead of a reward gives no verdict."""
        if isinstance(a, str) or isinstance(b, str):
            return unparsed(a if isinstance(a, str) else b)
        # Clipped, because exp overflows beyond 709.
        # Bradley-Terry: rewards are log-odds.
        return Verdict(0.5 + 0.5 * ((a > b) - (a < b)), 1 / (1 + math.exp(-max(-700.0, min(700.0, a - b)))))


class RewardModel(ScoringJudge):
    """A sequence classifier with one output, ArmoRM, or a model that brings code which computes one score."""

    def __init__(self, model: str, options: dict):
        self.name, self.model_name, self.options = f"rm:{model}", model, options
        # A run of train_reward_model.py with LoRA is an adapter on its base.
        self.adapter = reward_adapter(model)
        self.base = base_of(self.adapter) if self.adapter else model
        locate(self.base)
        self.gated, self.custom_code = self._check_head()
        self.tokenizer, self.model = load_tokenizer(model, trust_remote_code=self.custom_code), None
        self.chat = ChatRenderer(self.tokenizer)

    def identity(self) -> dict:
        adapter = {"adapter_sha256": adapter_sha256(self.adapter)} if self.adapter else {}
        return {"judge": self.name, **identify(self.base, self.tokenizer), **adapter, "dtype": self.options["dtype"]}

    def _check_head(self) -> tuple[bool, bool]:
        """(whether the model is an ArmoRM, whether it runs its own code).

        Raises UserError, before any work, if it has no single score.
        """
        if self.adapter:
            return False, False
        try:
            # Reading the config must not run the model's own code before --trust_remote_code allows it.
            config = AutoConfig.from_pretrained(locate(self.model_name), trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise load_error(f"reward model {self.model_name}", error) from error
        if ARCHITECTURE in (config.architectures or ()):
            # Its own code is not needed (preflab.judging.armorm).
            return True, False
        if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
            if not self.options.get("trust_remote_code"):
                raise UserError(f"{self.name}: computes its score with its own code; allow it by --trust_remote_code")
            return False, True
        if config.num_labels != 1:
            raise UserError(f"{self.name}: has {config.num_labels} outputs; a reward model has one")
        return False, False

    def load(self) -> None:
        """Load the weights on first use."""
        if self.model is not None:
            return
        if self.adapter:
            model = load_model(self.base, dtype=self.options["dtype"], reward=True)
            self.model = load_adapter(model, self.adapter).to(PartialState().device).eval()
            return
        try:
            load = (ArmoRM if self.gated else AutoModelForSequenceClassification).from_pretrained
            code = {} if self.gated else {"trust_remote_code": self.custom_code}
            self.model = load(locate(self.model_name), dtype=getattr(torch, self.options["dtype"]), **code)
        except LOAD_ERRORS as error:
            raise load_error(f"reward model {self.model_name}", error) from error
        self.model.to(PartialState().device).eval()

    def score(self, answers: list[tuple[Prompt, str]]) -> Iterator[tuple[int, float | str]]:
        """Yield (index, reward) of each answer, in any order; a text in place of a reward says why there is none.

        The reward is read at the last real token of the rendered conversation.
        """
        self.load()
        limit = context_length(self.model) or UNLIMITED
        rows = {}
        for i, (prompt, answer) in enumerate(answers):
            # Spelled-out special tokens stay text, as in generation.
            messages = [{**m, "content": neutralise(m["content"], self.tokenizer)} for m in prompt.messages]
            try:
                (ids,) = self.chat.ids([self.chat.full_text(messages, neutralise(answer, self.tokenizer))])
            except TemplateRefused as error:
                yield i, f"the reward model's chat template refused: {error}"
                continue
            bos = self.tokenizer.bos_token_id
            if bos is not None and ids[:2] == [bos, bos]:
                raise UserError(f"--judge {self.name}: texts start with two BOS tokens, from template and tokenizer")
            if len(ids) > limit:
                # Not truncated: the score would be read in the middle of the answer.
                yield i, f"{len(ids)} tokens exceed the reward model's limit of {limit}"
                continue
            rows[i] = ids
        indices = list(rows)
        budget = (self.options["batch_tokens"], self.options["batch_size"])
        for batch in token_batches([len(rows[i]) for i in indices], *budget):
            batch_indices = [indices[k] for k in batch]
            # transformers reads the score at the last token that is not the pad id, so choose a pad id that no text of
            # the batch ends in: with pad = eos it would read one token too early.
            last_tokens = {rows[i][-1] for i in batch_indices}
            # One of n + 1 ids is not among n last tokens.
            pad = next(t for t in range(len(last_tokens) + 1) if t not in last_tokens)
            config = without_adapter_shell(self.model).config
            config.get_text_config().pad_token_id = config.pad_token_id = pad
            ids, mask = pad_right([rows[i] for i in batch_indices], pad, self.model.device)
            with torch.inference_mode():
                output = self.model(input_ids=ids, attention_mask=mask, **self._further_inputs())
                # Models with several outputs combine them into `score`.
                combined = self.gated or (self.custom_code and hasattr(output, "score"))
                reward = output.score if combined else output.logits
                rewards = reward.float().reshape(len(batch)).tolist()
            for i, value in zip(batch_indices, rewards, strict=True):
                yield i, value if math.isfinite(value) else NOT_FINITE

    def _further_inputs(self) -> dict:
        if not self.gated:
            return {}
        (end,) = self.chat.ids([END_OF_PROMPT])
        return {"end_of_prompt": end}
