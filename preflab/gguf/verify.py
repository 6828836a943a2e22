"""What must be equal before a GGUF file gets its name, token ids and chat template, and what is measured of it."""

import gc
import time

import numpy as np

from preflab.data.chat_template import ChatRenderer, TemplateRefused
from preflab.data.preferences import load_pairs
from preflab.evaluation.held_out import SHIPPED_PAIRS
from preflab.evaluation.merge_check import response_logps
from preflab.models.generation import generate
from preflab.models.llama_cpp import GgufFile
from utils.cache import ResultCache
from utils.errors import UserError
from utils.provenance import ROOT

# Prompts whose token ids are compared.
PROMPTS = 200
SPEED_PROMPT = "Explain in a few sentences why the sky is blue."
SPEED_TOKENS = 64


def texts_to_compare(pairs: list, tokenizer, limit: int = PROMPTS) -> list[str]:
    """Up to `limit` different prompts as the model reads them, rendered with its chat template.

    The held-out prompts come first; those shipped with the project follow.
    """
    source = {"name": str(ROOT / SHIPPED_PAIRS), "split": "train", "config": None, "revision": None}
    chat = ChatRenderer(tokenizer) if tokenizer.chat_template else None
    texts: dict[str, None] = {}
    for pair in [*pairs, *load_pairs([source], keep_duplicate_prompts=True).pairs]:
        if len(texts) >= limit:
            break
        if pair.messages is None:
            texts[pair.text] = None
        elif chat is None:
            texts["\n".join(message["content"] for message in pair.messages)] = None
        else:
            try:
                texts[chat.prompt_text(pair.messages)] = None
            except TemplateRefused:
                continue
    return list(texts)


def ensure_same_text(file: GgufFile, tokenizer, texts: list[str]) -> dict:
    """Raise UserError unless llama.cpp reads every text as the same token ids, and has the same chat template.

    Returns:
        {prompts, tokens, template, end_tokens}: what was compared.
    """
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for text, expected in zip(texts, ids, strict=True):
        given = file.tokenize(text)
        if given != expected:
            place = next((k for k, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), -1)
            around = tokenizer.decode(expected[max(0, place - 5) : place + 5])
            raise UserError(
                f"{file.path.name}: llama.cpp reads {around!r} as other token ids than the model's tokenizer, so the"
                " file would be another model; the converter does not know this tokenizer's rules"
            )
    if tokenizer.chat_template and file.template != tokenizer.chat_template:
        raise UserError(f"{file.path.name}: the chat template in the file is not the model's")
    ends = ChatRenderer(tokenizer).end_ids() if tokenizer.chat_template else {tokenizer.eos_token_id} - {None}
    missing = ends - set(file.end_ids())
    return {
        "prompts": len(texts),
        "tokens": sum(map(len, ids)),
        "template": bool(tokenizer.chat_template),
        "end_tokens": sorted(tokenizer.convert_ids_to_tokens(sorted(ends))),
        # llama.cpp would not stop there by itself; the Modelfile names them, and servers have a flag.
        "end_tokens_unknown_to_llama_cpp": sorted(tokenizer.convert_ids_to_tokens(sorted(missing))),
    }


def measured(load, tokenizer, ids, args, identity: dict, name: str) -> tuple[np.ndarray, dict]:
    """(log-probabilities of the answers, shape (pairs, 2), in nats; speed and a sample answer) of one model.

    Cached pair by pair. The model is loaded only if something is missing.

    Args:
        load: returns the model.
        identity: what the results depend on, with the token ids.
        name: for the progress bar.
    """
    cache = ResultCache(args.eval_out, "gguf", identity, args.overwrite)
    missing = [i for i in range(len(ids)) if str(i) not in cache.finished]
    if missing or "speed" not in cache.finished:
        model = load()
        began = time.monotonic()
        response_logps(
            model,
            tokenizer,
            ids,
            args.shared_prompt,
            name,
            missing,
            lambda i, logps: cache.add(str(i), {"logps": logps}),
        )
        # A prompt counts once, since every model computes it once for both answers.
        tokens = sum(len(ids[i][f"{part}_ids"]) for i in missing for part in ("prompt", "chosen", "rejected"))
        scored = tokens / (time.monotonic() - began) if missing else None
        cache.add("speed", {"scored_tokens_per_second": scored, **answer(model, tokenizer)})
        # Frees its memory before the next model is loaded: the patched forward methods form reference cycles.
        del model
        gc.collect()
    results = cache.gather()
    return np.array([results[str(i)]["logps"] for i in range(len(ids))]), results["speed"]


def answer(model, tokenizer) -> dict:
    """A greedy answer to SPEED_PROMPT, and its tokens per second, the prompt's computation included."""
    if not tokenizer.chat_template:
        return {"answer": None, "answer_tokens_per_second": None}
    prompt = [{"role": "user", "content": SPEED_PROMPT}]
    # The first call allocates memory and warms caches.
    list(generate(model, tokenizer, [prompt], max_new_tokens=1))
    began = time.monotonic()
    (given,) = generate(model, tokenizer, [prompt], max_new_tokens=SPEED_TOKENS)
    # The end token is generated, too.
    tokens = given["tokens"] + (given["finish_reason"] == "stop")
    return {"answer": given["text"], "answer_tokens_per_second": tokens / (time.monotonic() - began)}
