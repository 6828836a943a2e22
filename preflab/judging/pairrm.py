"""PairRM (Jiang et al. 2023, "LLM-Blender", arXiv 2306.02561): a DeBERTa that reads a prompt with two answers at once.

transformers has no class for the published weights (llm-blender/PairRM-hf), and the llm-blender package does not run
under transformers 5, so the architecture is defined here. It takes the hidden states at three marker tokens (source,
first and second candidate) and applies a two-layer head to (source, candidate); the logit is the first candidate's
value minus the second's.
"""

import math
import re
from collections.abc import Iterator

import torch
from accelerate import PartialState
from scipy.special import expit
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel

from preflab.data.chat_template import break_up, neutralise
from preflab.judging.judge_prompt import NOT_FINITE, Item, Verdict, unparsed
from preflab.models.batching import pad_right, token_batches
from preflab.models.loading import LOAD_ERRORS, identify, load_error, load_tokenizer, locate
from utils.errors import UserError

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"
MARKERS = re.compile(r"<\|(?:source|candidate[12]?)\|>")
# The lengths that the published ranker was trained on: tokens of the source and of each candidate.
SOURCE_TOKENS, CANDIDATE_TOKENS = 1224, 412


class PairRM(DebertaV2PreTrainedModel):
    """DeBERTa-v2 with a head on the hidden states at the markers. Attribute names match the published weights."""

    def __init__(self, config):
        super().__init__(config)
        dropout, width = getattr(config, "drop_out", 0.0), config.hidden_size
        # The names `pretrained_model` and `head_layer` are keys of the published state dict.
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(width, getattr(config, "n_tasks", 1)),
        )
        self.post_init()

    def forward(self, input_ids, attention_mask, source_id: int, first_id: int, second_id: int):
        """Logits, shape (batch,), above 0 where the first candidate is better.

        Args:
            input_ids, attention_mask: shape (batch, length); every row contains each marker once.
            source_id, first_id, second_id: token ids of the markers.
        """
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # One marker per row, so each selection has shape (batch, width).
        # torch.where lists them row by row, in the batch's order.
        source, *candidates = (hidden[torch.where(input_ids == i)] for i in (source_id, first_id, second_id))
        first, second = (self.head_layer(torch.cat([source, candidate], -1)) for candidate in candidates)
        # Shape (batch, tasks) to (batch,): the mean over the tasks of the head, one in the published ranker.
        return (first - second).mean(-1)


class PairRanker:
    """Logits of ordered pairs of answers: above 0 where the first is better."""

    def __init__(self, name: str, options: dict):
        self.name, self.options, self.model = name, options, None
        # Reads config.json only, so that an unknown model fails before the sampling; `load` reads the weights.
        locate(name)
        self.tokenizer = load_tokenizer(name)
        self.markers = {marker: self.tokenizer.convert_tokens_to_ids(marker) for marker in (SOURCE, FIRST, SECOND)}
        vocabulary = self.tokenizer.get_vocab()
        # convert_tokens_to_ids gives an unknown marker the id of the unknown token, which would select arbitrary
        # positions.
        missing = [marker for marker in self.markers if marker not in vocabulary]
        if missing:
            raise UserError(f"pair:{name}: its tokenizer has no {missing[0]}; give a ranker such as PairRM-hf")

    def identity(self) -> dict:
        """Everything that the logits depend on."""
        return {"ranker": self.name, **identify(self.name, self.tokenizer), "dtype": self.options["dtype"]}

    def load(self) -> None:
        """Load the weights on first use."""
        if self.model is None:
            try:
                self.model = PairRM.from_pretrained(locate(self.name), dtype=getattr(torch, self.options["dtype"]))
            except LOAD_ERRORS as error:
                raise load_error(f"pairwise ranker {self.name}", error) from error
            # eval() switches the dropout of encoder and head off.
            self.model.to(PartialState().device).eval()

    def ids(self, source: str, first: str, second: str) -> list[int]:
        """Token ids of source and both candidates, each behind its marker and truncated.

        Tokens that the source leaves unused are available to the candidates.
        """

        def truncated(marker: str, text: str, limit: int) -> list[int]:
            # A marker spelled out in the text would be read as one.
            text = break_up(MARKERS, neutralise(text, self.tokenizer))
            # Each part keeps its own [CLS] and [SEP], as in the published tokenize_pair.
            return self.tokenizer(marker + text, truncation=True, max_length=limit)["input_ids"]

        source_ids = truncated(SOURCE, source, SOURCE_TOKENS)
        # Half of the unused tokens for each candidate, so that both are truncated at the same length.
        limit = CANDIDATE_TOKENS + (SOURCE_TOKENS - len(source_ids)) // 2
        return [*source_ids, *truncated(FIRST, first, limit), *truncated(SECOND, second, limit)]

    def ordered_logits(self, rows: list[tuple[str, str, str]]) -> Iterator[tuple[int, float]]:
        """Yield (index, logit) of each (source, first answer, second answer), batch by batch, in any order."""
        self.load()
        ids_of = [self.ids(*row) for row in rows]
        budget = (self.options["batch_tokens"], self.options["batch_size"])
        for batch in token_batches([len(ids) for ids in ids_of], *budget):
            ids, mask = pad_right([ids_of[k] for k in batch], self.tokenizer.pad_token_id, self.model.device)
            with torch.inference_mode():
                values = self.model(ids, mask, *self.markers.values()).float().tolist()
            yield from zip(batch, values, strict=True)

    def logits(self, source: str, answers: list[str]) -> list[list[float]]:
        """logit(i, j) of every ordered pair of answers, 0 on the diagonal; shape (n, n)."""
        # Both orders: the encoder reads the candidates together, so logit(i, j) is not exactly -logit(j, i).
        pairs = [(i, j) for i in range(len(answers)) for j in range(len(answers)) if i != j]
        logits = [[0.0] * len(answers) for _ in answers]
        for k, value in self.ordered_logits([(source, answers[i], answers[j]) for i, j in pairs]):
            i, j = pairs[k]
            logits[i][j] = value
        return logits


class RankerJudge:
    """A pairwise ranker as a judge: the sigmoid of its logit is the probability that the first answer is better."""

    instant = False

    def __init__(self, model: str, options: dict):
        self.name, self.ranker = f"pair:{model}", PairRanker(model, options)

    def identity(self) -> dict:
        return {"judge": self.name, **self.ranker.identity()}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        rows = [(item.prompt.text, item.first, item.second) for item in items]
        for k, logit in self.ranker.ordered_logits(rows):
            if math.isfinite(logit):
                yield k, Verdict(0.5 + 0.5 * ((logit > 0) - (logit < 0)), float(expit(logit)))
            else:
                yield k, unparsed(NOT_FINITE)
