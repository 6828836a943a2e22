"""The one generation loop: prompts in, answers with token counts and finish reasons out."""

from collections.abc import Iterator

from utils.chat import ChatRenderer


def generate(
    model,
    tokenizer,
    prompts: list[list[dict]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_tokens: int = 8192,
    seed: int = 42,
) -> Iterator[dict]:
    """Answer conversations, longest first, in batches of at most `batch_tokens` prompt and answer tokens.

    Args:
        prompts: conversations that end with a user turn.
        temperature: 0 decodes greedily; above 0 samples, seeded per batch from `seed`.

    Yields:
        `{"index", "text", "tokens", "finish_reason"}` per prompt, batch by batch (`index` into `prompts`);
        `finish_reason` is "stop" where an end-of-turn token came, "length" where `max_new_tokens` cut it.
    """
    import torch
    from transformers import GenerationConfig

    chat = ChatRenderer(tokenizer)
    prompt_ids = chat.ids([chat.prompt_text(messages) for messages in prompts])
    # The end-of-turn token ends an answer also where the model's own settings name only the end of the text.
    stops = {tokenizer.eos_token_id, *chat.end_ids()}
    own = model.generation_config.eos_token_id
    stops |= set(own if isinstance(own, list) else [own]) - {None}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **(sampling or {"do_sample": False}),
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    start, was_training = 0, model.training
    model.eval()
    try:
        while start < len(order):
            width = len(prompt_ids[order[start]])
            batch = order[start : start + max(1, batch_tokens // (width + max_new_tokens))]
            ids = torch.full((len(batch), width), tokenizer.pad_token_id, device=model.device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompt_ids[i]) :] = torch.tensor(prompt_ids[i])
                mask[row, width - len(prompt_ids[i]) :] = 1
            with torch.no_grad(), torch.random.fork_rng(enabled=bool(sampling)):
                if sampling:
                    torch.manual_seed(seed + start)
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
                stop = next((k for k, token in enumerate(answer) if token in stops), None)
                kept = answer if stop is None else answer[:stop]
                yield {
                    "index": i,
                    "text": tokenizer.decode(kept, skip_special_tokens=True).strip(),
                    "tokens": len(kept),
                    "finish_reason": "length" if stop is None else "stop",
                }
            start += len(batch)
    finally:
        model.train(was_training)
