"""Judges that are causal language models on this machine, with transformers or vLLM."""

import math
from collections.abc import Iterator

import torch
from accelerate import PartialState

from preflab.data.chat_template import ChatRenderer, TemplateRefused, neutralise
from preflab.judging.judge_prompt import Item, JudgePrompt, Verdict, unparsed
from preflab.judging.replies import opening_of_thought
from preflab.models import vllm_engine
from preflab.models.batching import pad_right, token_batches
from preflab.models.checks import UNLIMITED, context_length
from preflab.models.generation import generate, not_a_number
from preflab.models.gguf_model import gguf_path
from preflab.models.loading import identify, load_model, load_tokenizer, locate
from preflab.models.logprobs import captured_hidden, head_logits
from preflab.models.vllm_environment import answer_settings, parse_args, require_python
from utils.errors import UserError


class LocalJudge:
    """A causal LM under transformers: compares the labels' log-probabilities, or writes text that ends in a label."""

    kind, instant = "hf", False

    def __init__(self, model: str, prompt: JudgePrompt, options: dict):
        self.name, self.model_name, self.prompt, self.options = f"{self.kind}:{model}", model, prompt, options
        self.tokenizer, self.model = load_tokenizer(model), None
        self.chat = ChatRenderer(self.tokenizer)

    def identity(self) -> dict:
        return {
            "judge": self.name,
            **identify(self.model_name, self.tokenizer),
            **self.prompt.identity,
            "dtype": self.options["dtype"],
            "max_new_tokens": self.prompt.max_new_tokens,
        }

    def load(self) -> None:
        """Load the weights on first use."""
        if self.model is None:
            self.model = load_model(
                self.model_name, dtype=self.options["dtype"], attn_implementation=self.options["attn_implementation"]
            )
            self.model.to(PartialState().device).eval()

    def context_length(self) -> int:
        """Maximum input length in tokens."""
        return context_length(self.model) or UNLIMITED

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        self.load()
        by_logprob = self.prompt.verdict == "logprob"
        # Leave room for the judge's own tokens.
        limit = self.context_length() - (1 if by_logprob else self.prompt.max_new_tokens)
        questions = []
        for i, item in enumerate(items):
            # An answer that spells out an end-of-turn token must not end the judge's own prompt.
            messages = self.prompt.messages(item, lambda text: neutralise(text, self.tokenizer))
            try:
                questions.append((i, messages, self.chat.prompt_text(messages)))
            except TemplateRefused as error:
                yield i, unparsed(f"the judge's chat template refused: {error}")
        # Tokenised once in a batch, for the length check and for scoring.
        ids = self.chat.ids([text for _, _, text in questions]) if questions else []
        fitting = []
        for (i, messages, text), row in zip(questions, ids, strict=True):
            if len(row) <= limit:
                fitting.append((i, messages, text, row))
            else:
                # Not truncated: a judge that sees half of an answer would give a misleading verdict.
                yield i, unparsed(f"{len(row)} tokens exceed the judge's limit of {limit}")
        if not fitting:
            return
        if by_logprob:
            yield from self._by_logprob([(i, text, row) for i, _, text, row in fitting])
        else:
            yield from self._by_text([(i, messages, text) for i, messages, text, _ in fitting])

    def _by_text(self, questions: list[tuple[int, list[dict], str]]) -> Iterator[tuple[int, Verdict]]:
        """Let the judge write, and parse what it wrote. Questions are (index, messages, rendered text)."""
        for answer in self._replies([messages for _, messages, _ in questions]):
            i, _, text = questions[answer["index"]]
            # A thought that the chat template opens belongs to the reply.
            yield i, self.prompt.parse(opening_of_thought(text) + answer["text"], answer.get("finish_reason"))

    def _replies(self, conversations: list[list[dict]]) -> Iterator[dict]:
        settings = {key: self.options[key] for key in ("batch_tokens", "batch_size")}
        return generate(
            self.model, self.tokenizer, conversations, max_new_tokens=self.prompt.max_new_tokens, **settings
        )

    def _label_ids(self, text: str) -> dict[str, int]:
        """The single token of each label right after `text`, a rendered question. Raises UserError if it has more."""
        # In context, because a tokenizer may merge a label with the text before it or add a space to it.
        plain, *labelled = self.chat.ids([text, *(text + label for label in self.prompt.labels)])
        label_ids = {}
        for label, ids in zip(self.prompt.labels, labelled, strict=True):
            if len(ids) != len(plain) + 1 or ids[:-1] != plain:
                raise UserError(
                    f"--judge_prompt {self.prompt.path}: label {label!r} is not a single token of {self.model_name};"
                    " choose labels that are, or verdict: text"
                )
            label_ids[label] = ids[-1]
        if len(set(label_ids.values())) < len(label_ids):
            raise UserError(f"--judge_prompt {self.prompt.path}: two labels are the same token of {self.model_name}")
        return label_ids

    def _by_logprob(self, questions: list[tuple[int, str, list[int]]]) -> Iterator[tuple[int, Verdict]]:
        """Compare the labels' log-probabilities as the next token. Questions are (index, text, token ids)."""
        # The first question represents all: each ends in the template's start of the assistant turn.
        labels = self._label_ids(questions[0][1])
        budget = (self.options["batch_tokens"], self.options["batch_size"])
        for batch in token_batches([len(ids) for _, _, ids in questions], *budget):
            rows = [questions[k][2] for k in batch]
            ids, mask = pad_right(rows, self.tokenizer.pad_token_id, self.model.device)
            # Only the last position's logits are needed: run the backbone, then the head on one hidden state per row.
            with torch.inference_mode(), captured_hidden(self.model) as hidden:
                # Right padding needs no position ids: causal attention never looks at the padding.
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            with torch.inference_mode():
                # Shape (batch, width).
                last = hidden[0][torch.arange(len(batch), device=ids.device), mask.sum(1) - 1]
                # Normalised over the complete vocabulary, so that the labels' mass is known too. Shape (batch, labels).
                logprobs = head_logits(self.model, last).log_softmax(-1)[:, list(labels.values())].tolist()
            if any(math.isnan(value) for row in logprobs for value in row):
                raise UserError(not_a_number(self.name))
            for k, row in zip(batch, logprobs, strict=True):
                yield questions[k][0], self.prompt.weigh(dict(zip(labels, row, strict=True)))


class VllmJudge(LocalJudge):
    """A causal LM under vLLM."""

    kind = "vllm"

    def __init__(self, model: str, prompt: JudgePrompt, options: dict):
        if gguf_path(model):
            raise UserError(f"judge vllm:{model}: a GGUF file runs with llama.cpp; use hf:{model}")
        # Before answers are generated for it.
        require_python(f"judge vllm:{model}", f"hf:{model}")
        parse_args(options.get("vllm_args"))
        super().__init__(model, prompt, options)

    def identity(self) -> dict:
        settings = answer_settings(self.options.get("vllm_args"))
        return {**super().identity(), **({"vllm_args": settings} if settings else {})}

    def load(self) -> None:
        if self.model is None:
            words = self.options.get("vllm_args")
            self.model = vllm_engine.Engine(locate(self.model_name), self.options["dtype"], words=words)

    def context_length(self) -> int:
        return self.model.max_model_len

    def _replies(self, conversations: list[list[dict]]) -> Iterator[dict]:
        return vllm_engine.generate(self.model, self.tokenizer, conversations, self.prompt.max_new_tokens)

    def _by_logprob(self, questions: list[tuple[int, str, list[int]]]) -> Iterator[tuple[int, Verdict]]:
        labels = self._label_ids(questions[0][1])
        rows = vllm_engine.label_logprobs(self.model, [ids for _, _, ids in questions], labels)
        for k, logprobs in rows:
            yield questions[k][0], self.prompt.weigh(logprobs)

    def close(self) -> None:
        """End the engine's process, which frees the GPU's memory."""
        if self.model is not None:
            self.model.close()
            self.model = None
