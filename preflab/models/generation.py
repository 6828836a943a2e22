"""Generation with transformers, for every stage: prompts in, answers with token counts and finish reasons out."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from preflab.data.chat_template import ChatRenderer, neutralise
from preflab.models.batching import token_batches
from preflab.models.checks import answer_room, check_ids, fit_pad_token
from preflab.models.logprobs import without_adapter_shell
from utils.errors import UserError
from utils.provenance import sha256_of


def generate(
    model,
    tokenizer,
    prompts: list[list[dict]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_tokens: int = 8192,
    seed: int = 42,
    batch_size: int | None = None,
    top_k: int = 0,
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[dict]:
    """Answer conversations in batches, longest first.

    An answer does not depend on the other prompts of its batch: padding is masked, and every sampled answer has its own
    random generator, seeded from `seed` and the prompt. Special tokens that a prompt spells out are treated as text.

    Args:
        prompts: conversations that end with a user turn.
        temperature: 0 decodes greedily; above 0 samples.
        batch_tokens: maximum of prompt and answer tokens per batch, padding included.
        batch_size: maximum of prompts per batch.
        top_k: sample among this many most likely tokens; 0 for all.
        on_text: called after every token with a prompt's index and its answer so far, for display. Does not change
            the answers.

    Yields:
        `{"index", "text", "tokens", "finish_reason"}` per prompt, batch by batch (`index` into `prompts`);
        `finish_reason` is "stop" after an end-of-turn token, "length" if truncated at `max_new_tokens` or at the
        model's longest context.

    Raises:
        UserError: a prompt fills the model's longest context or has a token id without an embedding, or the model's
            outputs are NaN.
    """
    chat = ChatRenderer(tokenizer)
    prompt_ids = chat.ids([chat.prompt_text(as_plain_text(messages, tokenizer)) for messages in prompts])
    fit_pad_token(model, tokenizer)
    check_ids(model, tokenizer, max((max(ids) for ids in prompt_ids), default=0))
    room = answer_room(model, prompt_ids, max_new_tokens)
    # Some instruct models name only the end of the text in their generation config, not the template's end of turn.
    stops = {tokenizer.eos_token_id, *chat.end_ids()}
    eos = model.generation_config.eos_token_id
    stops |= set(eos if isinstance(eos, list) else [eos]) - {None}
    settings = GenerationConfig(
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        # Sampling is left to the logits processor below, so that each row has its own generator.
        do_sample=False,
    )
    was_training = model.training
    model.eval()
    try:
        for batch in batches_with_room(prompt_ids, room, max_new_tokens, batch_tokens, batch_size):
            settings.max_new_tokens = room[batch[0]]
            # Left padding, so that all answers start in the same column: shape (rows, longest prompt).
            # Batches are sorted by length, so the first prompt is the longest.
            width = len(prompt_ids[batch[0]])
            ids = torch.full((len(batch), width), tokenizer.pad_token_id, device=model.device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompt_ids[i]) :] = torch.tensor(prompt_ids[i])
                mask[row, width - len(prompt_ids[i]) :] = 1
            # First, so that it sees the model's own scores.
            checked = NotANumber()
            sampling = LogitsProcessorList([checked])
            if temperature:
                seeds = [prompt_seed(seed, prompts[i]) for i in batch]
                sampling.append(seeded_sampling(seeds, temperature, top_p, model.device, top_k))
            watch = StoppingCriteriaList([AnswersSoFar(batch, width, stops, tokenizer, on_text)] if on_text else [])
            with torch.no_grad(), only_settings(settings, model):
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=settings,
                    logits_processor=sampling,
                    stopping_criteria=watch,
                )
            checked.ensure_none(getattr(model.config, "_name_or_path", "") or "the model")
            for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
                # Rows that end earlier are filled with pad tokens up to the longest answer.
                stop = next((k for k, token in enumerate(answer) if token in stops), None)
                # The end token is not counted as part of the answer.
                tokens = answer if stop is None else answer[:stop]
                yield {
                    "index": i,
                    "text": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                    "tokens": len(tokens),
                    "finish_reason": "length" if stop is None else "stop",
                }
    finally:
        model.train(was_training)


class AnswersSoFar(StoppingCriteria):
    """Reports each answer of a batch after every token, and stops none.

    Args:
        batch: the prompts' indices. width: tokens of the padded prompts. stops: ids that end an answer.
        on_text: called with (index, text of the answer so far); once more where an end token came.
    """

    def __init__(self, batch: list[int], width: int, stops: set[int], tokenizer, on_text: Callable[[int, str], None]):
        self.batch, self.width, self.stops, self.tokenizer, self.on_text = batch, width, stops, tokenizer, on_text
        self.ended = set()

    def __call__(self, input_ids, scores, **_):
        for index, answer in zip(self.batch, input_ids[:, self.width :].tolist(), strict=True):
            if index in self.ended:
                continue
            if answer[-1] in self.stops:
                self.ended.add(index)
                answer.pop()
            # Bytes of a character that is not complete yet decode to replacement characters.
            text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
            self.on_text(index, text if index in self.ended else text.rstrip("\ufffd"))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def batches_with_room(
    prompt_ids: list[list[int]], room: list[int], max_new_tokens: int, batch_tokens: int, batch_size: int | None
) -> list[list[int]]:
    """`token_batches` of the prompts with room for complete answers; each of the others is batched alone."""
    # With a shared batch, a short answer limit of one prompt would cut the others' answers.
    full = [i for i, tokens in enumerate(room) if tokens == max_new_tokens]
    batches = token_batches([len(prompt_ids[i]) + max_new_tokens for i in full], batch_tokens, batch_size)
    return [[i] for i, tokens in enumerate(room) if tokens < max_new_tokens] + [[full[k] for k in b] for b in batches]


@contextmanager
def only_settings(settings, model):
    """Replace the model's generation config, so that none of its defaults (e.g. a repetition penalty) apply.

    `generate` fills fields that `settings` leaves unset from the model's own config.
    """
    # PEFT's generate copies its wrapper's config to the model, so both are replaced.
    holders = [m for m in (model, without_adapter_shell(model)) if hasattr(m, "generation_config")]
    originals = [m.generation_config for m in holders]
    for m in holders:
        m.generation_config = settings
    try:
        yield
    finally:
        for m, config in zip(holders, originals, strict=True):
            m.generation_config = config


def not_a_number(name: str) -> str:
    """The message for a model whose outputs are NaN."""
    return (
        f"{name}: the model's outputs are not numbers (NaN), so its weights are damaged or overflow in this precision;"
        " try --dtype float32 or bfloat16, or another checkpoint"
    )


class NotANumber(LogitsProcessor):
    """Remembers whether any score was NaN, on the device: a check per step would wait for the GPU."""

    def __init__(self):
        self.seen = None

    def __call__(self, input_ids, scores):
        seen = scores.isnan().any()
        self.seen = seen if self.seen is None else self.seen | seen
        return scores

    def ensure_none(self, name: str) -> None:
        """Raise UserError if a score was NaN: argmax and sampling would still give tokens."""
        if self.seen is not None and bool(self.seen):
            raise UserError(not_a_number(name))


def prompt_seed(seed: int, messages: list[dict]) -> int:
    """The seed of one prompt's sampled answer."""
    # 15 hexadecimal digits are 60 bits, within the seed range of torch.Generator.
    return int(sha256_of(str(seed), json.dumps(messages))[:15], 16)


def as_plain_text(messages: list[dict], tokenizer) -> list[dict]:
    """`messages` in which spelled-out special tokens are plain text (`neutralise`)."""
    return [{**m, "content": neutralise(m["content"], tokenizer)} for m in messages]


# Number of most likely tokens to search for the nucleus first: sorting a complete vocabulary can take longer than a
# small model's forward pass.
TOP_TOKENS = 256


def seeded_sampling(seeds: list[int], temperature: float, top_p: float, device, top_k: int = 0) -> LogitsProcessor:
    """A logits processor that makes greedy decoding sample, with one random generator per row.

    Gumbel-max trick: argmax_i (z_i - log E_i) with E_i ~ Exp(1) is distributed as softmax(z). Top-p keeps the most
    likely tokens up to the one at which their probabilities reach `top_p` (Holtzman et al. 2019, arXiv 1904.09751).

    Args:
        seeds: one per row of the batch.
        top_k: sample among this many most likely tokens, before `top_p` (as transformers orders them); 0 for all.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def sample(scores, generator):
        """The index of a sample from softmax(scores), scores of shape (tokens,)."""
        return (scores - torch.empty_like(scores).exponential_(generator=generator).log()).argmax()

    def sample_nucleus(scores, mass_before, generator):
        """As `sample`, among the tokens whose more likely tokens have less than `top_p` probability together."""
        return sample(scores.masked_fill(mass_before >= top_p, float("-inf")), generator)

    class SeededSampling(LogitsProcessor):
        """Sets the sampled token's score to 0 and all others to -inf."""

        def __call__(self, input_ids, scores):
            scores = scores.float() / temperature  # (rows, vocab)
            if 0 < top_k < scores.shape[1]:
                scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
            if top_p < 1:
                sampled = self.nucleus(scores)
            else:
                sampled = torch.stack([sample(row, g) for row, g in zip(scores, generators, strict=True)])
            # With one finite score per row, greedy decoding picks the sampled token.
            return torch.full_like(scores, float("-inf")).scatter_(1, sampled[:, None], 0.0)

        def nucleus(self, scores):
            """One token per row, sampled from its nucleus: shape (rows,)."""
            # Normalised over the complete vocabulary, so that probabilities of the top tokens are exact.
            log_z = scores.logsumexp(-1, keepdim=True)
            top_scores, top_ids = scores.topk(min(TOP_TOKENS, scores.shape[1]))  # (rows, TOP_TOKENS), descending
            p = (top_scores - log_z).exp()
            mass = p.cumsum(-1)
            complete = (mass[:, -1] >= top_p).tolist()
            tokens = []
            for row, generator in enumerate(generators):
                if complete[row]:
                    # mass - p is the probability of all more likely tokens.
                    k = sample_nucleus(top_scores[row], mass[row] - p[row], generator)
                    tokens.append(top_ids[row, k])
                else:
                    # A flat distribution: its nucleus has more than TOP_TOKENS tokens.
                    all_scores, order = scores[row].sort(descending=True)
                    all_p = (all_scores - log_z[row]).exp()
                    tokens.append(order[sample_nucleus(all_scores, all_p.cumsum(-1) - all_p, generator)])
            return torch.stack(tokens)

    return SeededSampling()
