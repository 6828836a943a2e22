"""The one generation loop: prompts in, answers with token counts and finish reasons out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from preflab.data.chat_template import ChatRenderer, neutralise
from preflab.models.batching import token_batches
from preflab.models.logprobs import without_adapter_shell
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
) -> Iterator[dict]:
    """Answer conversations, longest first, in batches of at most `batch_tokens` prompt and answer tokens.

    A prompt's answer does not depend on the prompts beside it: rows are masked from each other, and a sampled answer
    draws from a generator of its own, seeded from `seed` and the prompt. Special tokens spelt out in a prompt are text.

    Args:
        prompts: conversations that end with a user turn.
        temperature: 0 decodes greedily; above 0 samples.

    Yields:
        `{"index", "text", "tokens", "finish_reason"}` per prompt, batch by batch (`index` into `prompts`);
        `finish_reason` is "stop" where an end-of-turn token came, "length" where `max_new_tokens` cut it.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    chat = ChatRenderer(tokenizer)
    prompt_ids = chat.ids([chat.prompt_text(as_text(messages, tokenizer)) for messages in prompts])
    # The end-of-turn token ends an answer also where the model's own settings name only the end of the text.
    stops = {tokenizer.eos_token_id, *chat.end_ids()}
    own = model.generation_config.eos_token_id
    stops |= set(own if isinstance(own, list) else [own]) - {None}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        do_sample=False,
    )
    was_training = model.training
    model.eval()
    try:
        for batch in token_batches([len(ids) + max_new_tokens for ids in prompt_ids], batch_tokens, batch_size):
            width = len(prompt_ids[batch[0]])
            ids = torch.full((len(batch), width), tokenizer.pad_token_id, device=model.device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompt_ids[i]) :] = torch.tensor(prompt_ids[i])
                mask[row, width - len(prompt_ids[i]) :] = 1
            sampling = LogitsProcessorList()
            if temperature:
                seeds = [prompt_seed(seed, prompts[i]) for i in batch]
                sampling.append(seeded_sampling(seeds, temperature, top_p, model.device))
            with torch.no_grad(), only_these(settings, model):
                out = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=sampling
                )
            for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
                stop = next((k for k, token in enumerate(answer) if token in stops), None)
                kept = answer if stop is None else answer[:stop]
                yield {
                    "index": i,
                    "text": tokenizer.decode(kept, skip_special_tokens=True).strip(),
                    "tokens": len(kept),
                    "finish_reason": "length" if stop is None else "stop",
                }
    finally:
        model.train(was_training)


@contextmanager
def only_these(settings, model):
    """Let no default of the model's own generation config, such as a repetition penalty, fill gaps in `settings`."""
    holders = [m for m in (model, without_adapter_shell(model)) if hasattr(m, "generation_config")]
    own = [m.generation_config for m in holders]
    for m in holders:
        m.generation_config = settings
    try:
        yield
    finally:
        for m, config in zip(holders, own, strict=True):
            m.generation_config = config


def prompt_seed(seed: int, messages: list[dict]) -> int:
    """The seed of one prompt's sampled answer."""
    return int(sha256_of(str(seed), json.dumps(messages))[:15], 16)


def as_text(messages: list[dict], tokenizer) -> list[dict]:
    """`messages` with special tokens spelt out in them made plain text."""
    return [{**m, "content": neutralise(m["content"], tokenizer)} for m in messages]


# Tokens among which the nucleus is looked for first: sorting a whole vocabulary costs more than a small model's step.
LIKELIEST = 256


def seeded_sampling(seeds: list[int], temperature: float, top_p: float, device):
    """A logits processor under which the argmax is a sample: one generator a row, so that no row depends on another.

    Gumbel-max: argmax_i (z_i - log E_i) with E_i ~ Exp(1) is distributed as softmax(z). The nucleus is the likeliest
    tokens up to the one with which their probabilities reach `top_p` (Holtzman et al. 2019, arXiv 1904.09751).

    Args:
        seeds: one a row of the batch.
    """
    import torch
    from transformers import LogitsProcessor

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def drawn(scores, generator):
        """The place of a sample of softmax(scores), scores of shape (tokens,)."""
        return (scores - torch.empty_like(scores).exponential_(generator=generator).log()).argmax()

    def in_nucleus(scores, before, generator):
        """The same among the tokens before which less than top_p of the probability lies."""
        return drawn(scores.masked_fill(before >= top_p, float("-inf")), generator)

    class SeededSampling(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.float() / temperature
            if top_p < 1:
                chosen = self.nucleus(scores)
            else:
                chosen = torch.stack([drawn(row, g) for row, g in zip(scores, generators, strict=True)])
            return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)

        def nucleus(self, scores):
            log_z = scores.logsumexp(-1, keepdim=True)
            few, places = scores.topk(min(LIKELIEST, scores.shape[1]))
            p = (few - log_z).exp()
            mass = p.cumsum(-1)
            found = []
            for row, (reached, generator) in enumerate(zip((mass[:, -1] >= top_p).tolist(), generators, strict=True)):
                if reached:
                    found.append(places[row, in_nucleus(few[row], mass[row] - p[row], generator)])
                    continue
                # A flat distribution: its nucleus is larger.
                every, order = scores[row].sort(descending=True)
                all_p = (every - log_z[row]).exp()
                found.append(order[in_nucleus(every, all_p.cumsum(-1) - all_p, generator)])
            return torch.stack(found)

    return SeededSampling()
