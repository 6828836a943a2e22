"""Reward models as judges and scorers."""

import math
from collections.abc import Iterator

from preflab.data.chat_template import ChatRenderer, TemplateRefused, neutralise
from preflab.data.prompts import Prompt
from preflab.judging.judge_prompt import Item, Verdict, unparsed
from preflab.judging.local_judges import longest_text
from utils.errors import UserError

NOT_FINITE = "the model's output is not a finite number"


class RewardModel:
    """A sequence classifier with one output: the answer with the higher score wins; order cannot matter."""

    def __init__(self, model: str, options: dict):
        from preflab.models.loading import load_tokenizer, locate

        self.name, self.model_name, self.options = f"rm:{model}", model, options
        locate(model)
        self._refuse_unreadable_head()
        self.tokenizer, self.model = load_tokenizer(model), None
        self.chat = ChatRenderer(self.tokenizer)

    def identity(self) -> dict:
        from preflab.models.loading import identify

        return {"judge": self.name, **identify(self.model_name, self.tokenizer), "dtype": self.options["dtype"]}

    def _refuse_unreadable_head(self) -> None:
        """Raise UserError, before anything long, where the config has not exactly one output or code of its own."""
        from transformers import AutoConfig

        from preflab.models.loading import LOAD_ERRORS, load_error, locate

        self.own_code = False
        try:
            config = AutoConfig.from_pretrained(locate(self.model_name), trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise load_error(f"reward model {self.model_name}", error) from error
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

        from preflab.models.loading import LOAD_ERRORS, load_error, locate

        if self.model is not None:
            return
        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(
                locate(self.model_name), dtype=getattr(torch, self.options["dtype"]), trust_remote_code=self.own_code
            )
        except LOAD_ERRORS as error:
            raise load_error(f"reward model {self.model_name}", error) from error
        self.model.to(PartialState().device).eval()

    def score(self, asked: list[tuple[Prompt, str]]) -> Iterator[tuple[int, float | str]]:
        """(index, reward) of each answer, read at its last real token; a text in its place says why there is none."""
        import torch

        from preflab.models.batching import pad_right, token_batches

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
                yield i, value if math.isfinite(value) else NOT_FINITE

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
