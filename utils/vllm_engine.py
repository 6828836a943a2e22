"""vLLM as the engine, where it is installed and a GPU is there: the same answers' form as utils.generation."""

import importlib.util

from utils.chat import ChatRenderer
from utils.errors import UserError
from utils.generation import as_text, prompt_seed


def choose_engine(asked: str) -> str:
    """hf or vllm. "auto" takes vLLM where it is installed and there is a GPU. Raises UserError where it is not."""
    import torch

    there = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not there:
        raise UserError("--engine vllm: vLLM is not installed (requirements/vllm.txt); --engine hf needs nothing more")
    if asked != "auto":
        return asked
    return "vllm" if there and torch.cuda.is_available() else "hf"


def load_engine(model: str, dtype: str, adapter: str | None = None):
    """(engine, LoRA request or None) for a hub id or folder, with the adapter of a LoRA folder."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    engine = LLM(model=model, dtype=dtype, enable_lora=adapter is not None, max_lora_rank=64)
    return engine, LoRARequest("tuned", 1, adapter) if adapter else None


def generate(engine, lora, tokenizer, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=42, **_):
    """As `utils.generation.generate`: `{"index", "text", "tokens", "finish_reason"}` of every prompt."""
    from vllm import SamplingParams

    chat = ChatRenderer(tokenizer)
    ids = chat.ids([chat.prompt_text(as_text(messages, tokenizer)) for messages in prompts])
    stops = sorted({tokenizer.eos_token_id, *chat.end_ids()})
    settings = [
        SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=prompt_seed(seed, messages) % 2**31,
            stop_token_ids=stops,
            repetition_penalty=1.0,
        )
        for messages in prompts
    ]
    for i, found in enumerate(engine.generate([{"prompt_token_ids": row} for row in ids], settings, lora_request=lora)):
        answer = found.outputs[0]
        kept = [token for token in answer.token_ids if token not in stops]
        yield {
            "index": i,
            "text": tokenizer.decode(kept, skip_special_tokens=True).strip(),
            "tokens": len(kept),
            "finish_reason": answer.finish_reason,
        }


def label_logprobs(engine, prompts: list[list[int]], labels: dict[str, int]) -> list[dict[str, float]]:
    """Log-probabilities of the labels as the next token of each prompt; those below the 20 likeliest are missing."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=1.0, logprobs=20)
    found = []
    for answer in engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings):
        top = answer.outputs[0].logprobs[0]
        found.append({label: top[token].logprob for label, token in labels.items() if token in top})
    return found
