"""PairRM (Jiang et al. 2023, "LLM-Blender", arXiv 2306.02561): a DeBERTa that reads a prompt with two answers at once.

The published weights (llm-blender/PairRM-hf) come without code that transformers knows, and the package that holds it
does not run under transformers 5. The architecture is small: the hidden states at the marks of source, first and second
candidate, and a head of two layers on (source, candidate); the logit is the first one's value less the second one's.
"""

import re

from preflab.data.chat_template import break_up, neutralise
from preflab.models.loading import LOAD_ERRORS, load_error, load_tokenizer, locate
from utils.errors import UserError

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"
MARKS = re.compile(r"<\|(?:source|candidate[12]?)\|>")
# What the published ranker was trained to read: tokens of the source and of each candidate.
SOURCE_TOKENS, CANDIDATE_TOKENS = 1224, 412


class PairRanker:
    """Logits of ordered pairs of answers: above 0 where the first is the better one."""

    def __init__(self, name: str, options: dict):
        self.name, self.options, self.model = name, options, None
        locate(name)
        self.tokenizer = load_tokenizer(name)
        self.marks = {mark: self.tokenizer.convert_tokens_to_ids(mark) for mark in (SOURCE, FIRST, SECOND)}
        known = self.tokenizer.get_vocab()
        missing = [mark for mark in self.marks if mark not in known]
        if missing:
            raise UserError(f"--scorer pair:{name}: its tokenizer has no {missing[0]}; give a ranker such as PairRM-hf")

    def identity(self) -> dict:
        from preflab.models.loading import identify

        return {"ranker": self.name, **identify(self.name, self.tokenizer), "dtype": self.options["dtype"]}

    def load(self) -> None:
        """Load the weights, once."""
        import torch
        from accelerate import PartialState

        if self.model is None:
            try:
                self.model = pair_rm().from_pretrained(locate(self.name), dtype=getattr(torch, self.options["dtype"]))
            except LOAD_ERRORS as error:
                raise load_error(f"pairwise ranker {self.name}", error) from error
            self.model.to(PartialState().device).eval()

    def ids(self, source: str, first: str, second: str) -> list[int]:
        """Source and both candidates behind their marks, each cut to its share; what one leaves the others may use."""

        def cut(mark: str, text: str, room: int) -> list[int]:
            # A mark that a text spells out would be read as one.
            text = break_up(MARKS, neutralise(text, self.tokenizer))
            return self.tokenizer(mark + text, truncation=True, max_length=room)["input_ids"]

        head = cut(SOURCE, source, SOURCE_TOKENS)
        room = CANDIDATE_TOKENS + (SOURCE_TOKENS - len(head)) // 2
        return [*head, *cut(FIRST, first, room), *cut(SECOND, second, room)]

    def logits(self, source: str, answers: list[str]) -> list[list[float]]:
        """logit(i, j) of every ordered pair of answers, 0 on the diagonal; shape (n, n)."""
        import torch

        from preflab.models.batching import pad_right, token_batches

        self.load()
        places = [(i, j) for i in range(len(answers)) for j in range(len(answers)) if i != j]
        rows = [self.ids(source, answers[i], answers[j]) for i, j in places]
        found = [[0.0] * len(answers) for _ in answers]
        budget = (self.options["batch_tokens"], self.options["batch_size"])
        for batch in token_batches([len(row) for row in rows], *budget):
            ids, mask = pad_right([rows[k] for k in batch], self.tokenizer.pad_token_id, self.model.device)
            with torch.inference_mode():
                values = self.model(ids, mask, *self.marks.values()).float().tolist()
            for k, value in zip(batch, values, strict=True):
                i, j = places[k]
                found[i][j] = value
        return found


def pair_rm():
    """The model class; its names are those of the published weights."""
    from torch import nn, where
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel

    class PairRM(DebertaV2PreTrainedModel):
        """DeBERTa-v2 with a head on the hidden states at the marks."""

        def __init__(self, config):
            super().__init__(config)
            dropout, width = getattr(config, "drop_out", 0.0), config.hidden_size
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
            """Logits, shape (batch,), of rows that hold each mark once; ids and mask (batch, length)."""
            import torch

            hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            at = [hidden[where(input_ids == mark)] for mark in (source_id, first_id, second_id)]
            first, second = (self.head_layer(torch.cat([at[0], candidate], -1)) for candidate in at[1:])
            return (first - second).mean(-1)

    return PairRM
