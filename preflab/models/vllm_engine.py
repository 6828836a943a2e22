"""vLLM as the engine, where it is installed and a GPU is there: the same answers' form as preflab.models.generation."""

import importlib.util
from pathlib import Path

from preflab.data.chat_template import ChatRenderer
from preflab.models.generation import as_text, prompt_seed
from utils.artifacts import read_json
from utils.errors import UserError

CHUNK = 128


def choose_engine(asked: str, models=None) -> str:
    """hf or vllm. "auto" takes vLLM where it is installed, there is a GPU, and it can do what the models need.

    vLLM is not used under several processes (each engine would claim the first GPU), on bitsandbytes bases, and in
    float32 with an adapter.

    Raises:
        UserError: where vllm is asked for and cannot be.
    """
    import torch
    from accelerate import PartialState

    why = None
    if importlib.util.find_spec("vllm") is None:
        why = "vLLM is not installed (requirements/vllm.txt)"
    elif PartialState().num_processes > 1:
        why = "one process drives all GPUs of vLLM: call it without accelerate launch"
    elif models is not None and models.quantized:
        why = "it would answer with an unquantised base: give --load_in_4bit false"
    elif models is not None and models.comparison.adapter and compute_dtype(models) == "float32":
        why = "its adapters run in 16 bits alone: give --dtype bfloat16"
    if asked == "vllm" and why:
        raise UserError(f"--engine vllm: {why}; or take --engine hf")
    if asked != "auto":
        return asked
    return "vllm" if why is None and torch.cuda.is_available() else "hf"


def compute_dtype(models) -> str:
    """The precision that the models compute in, as vLLM names it."""
    return str(models.autocast).removeprefix("torch.") if models.autocast else models.dtype


def lora_rank(adapter: str) -> int:
    """The smallest of vLLM's own ranks that holds the adapter's."""
    rank = read_json(Path(adapter) / "adapter_config.json").get("r", 64)
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def load_engine(model: str, dtype: str, adapter: str | None = None, **kwargs):
    """(engine, LoRA request or None) for a hub id or folder, with the adapter of a LoRA folder."""
    from vllm import LLM

    if adapter is None:
        return LLM(model=model, dtype=dtype, **kwargs), None
    from vllm.lora.request import LoRARequest

    engine = LLM(model=model, dtype=dtype, enable_lora=True, max_lora_rank=lora_rank(adapter), **kwargs)
    return engine, LoRARequest("tuned", 1, str(Path(adapter).resolve()))


def close(engine) -> None:
    """Give the GPU back: `del` alone does not stop vLLM's own process."""
    import gc

    import torch

    stop = getattr(getattr(getattr(engine, "llm_engine", None), "engine_core", None), "shutdown", None)
    if stop:
        stop()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(engine, lora, tokenizer, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=42, **_):
    """As `models.generation.generate`: `{"index", "text", "tokens", "finish_reason"}` per prompt, chunk by chunk."""
    from vllm import SamplingParams

    chat = ChatRenderer(tokenizer)
    ids = chat.ids([chat.prompt_text(as_text(messages, tokenizer)) for messages in prompts])
    stops = sorted({tokenizer.eos_token_id, *chat.end_ids()})
    for start in range(0, len(ids), CHUNK):
        chunk = range(start, min(start + CHUNK, len(ids)))
        settings = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=prompt_seed(seed, prompts[i]) % 2**31,
                stop_token_ids=stops,
                repetition_penalty=1.0,
            )
            for i in chunk
        ]
        found = engine.generate([{"prompt_token_ids": ids[i]} for i in chunk], settings, lora_request=lora)
        for i, answered in zip(chunk, found, strict=True):
            answer = answered.outputs[0]
            kept = [token for token in answer.token_ids if token not in stops]
            yield {
                "index": i,
                "text": tokenizer.decode(kept, skip_special_tokens=True).strip(),
                "tokens": len(kept),
                "finish_reason": answer.finish_reason,
            }


def label_logprobs(engine, prompts: list[list[int]], labels: dict[str, int]):
    """Log-probabilities of the labels as the next token of each prompt, chunk by chunk.

    Those below the 20 likeliest tokens are missing.
    """
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=1.0, logprobs=20)
    for start in range(0, len(prompts), CHUNK):
        for answer in engine.generate([{"prompt_token_ids": ids} for ids in prompts[start : start + CHUNK]], settings):
            top = answer.outputs[0].logprobs[0]
            yield {label: top[token].logprob for label, token in labels.items() if token in top}
