"""Judges that are causal language models on this machine: transformers and vLLM."""

from collections.abc import Iterator

from preflab.data.chat_template import ChatRenderer, TemplateRefused, neutralise
from preflab.judging.judge_prompt import Item, JudgePrompt, Verdict, unparsed
from utils.errors import UserError


def longest_text(model) -> int:
    """Tokens that a transformers model can read, as its config says; no bound where it says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


class LocalModel:
    """A causal LM on this machine: the log-probability of its verdict token, or the last label of what it writes."""

    kind = "hf"

    def __init__(self, model: str, prompt: JudgePrompt, options: dict):
        from preflab.models.loading import load_tokenizer

        self.name, self.model_name, self.prompt, self.options = f"{self.kind}:{model}", model, prompt, options
        self.tokenizer, self.model = load_tokenizer(model), None
        self.chat = ChatRenderer(self.tokenizer)

    def identity(self) -> dict:
        from preflab.models.loading import identify

        found = {"judge": self.name, **identify(self.model_name, self.tokenizer), **self.prompt.identity}
        return {**found, "dtype": self.options["dtype"], "max_new_tokens": self.prompt.max_new_tokens}

    def load(self) -> None:
        """Load the weights, once."""
        from accelerate import PartialState

        from preflab.models.loading import load_model

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
        from preflab.models.generation import generate

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

        from preflab.models.batching import pad_right, token_batches
        from preflab.models.logprobs import captured_hidden, head_logits

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
        from preflab.models.loading import locate
        from preflab.models.vllm_engine import choose_engine, load_engine

        choose_engine("vllm")
        if self.model is None:
            self.model, _ = load_engine(locate(self.model_name), self.options["dtype"])

    def longest(self) -> int:
        return self.model.llm_engine.model_config.max_model_len

    def _written(self, asked) -> Iterator[tuple[int, Verdict]]:
        from preflab.models.vllm_engine import generate

        prompts, room = [messages for _, messages in asked], self.prompt.max_new_tokens
        for answer in generate(self.model, None, self.tokenizer, prompts, room):
            yield asked[answer["index"]][0], self.prompt.parse(answer["text"])

    def _weighed(self, asked) -> Iterator[tuple[int, Verdict]]:
        from preflab.models.vllm_engine import label_logprobs

        labels = self._label_ids(asked[0][1])
        found = label_logprobs(self.model, [ids for _, _, ids in asked], labels)
        for (i, _, _), logprobs in zip(asked, found, strict=True):
            yield i, self.prompt.weigh(logprobs)

    def close(self) -> None:
        """Give the GPU back."""
        from preflab.models.vllm_engine import close

        if self.model is not None:
            close(self.model)
            self.model = None
