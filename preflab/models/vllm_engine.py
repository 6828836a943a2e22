"""Generation with vLLM, if it is installed and there is a GPU. Same results format as preflab.models.generation.

vLLM is optional (requirements/vllm.txt), so it is imported where it is used.
"""

import gc
import importlib.util
from pathlib import Path

import torch
from accelerate import PartialState

from preflab.data.chat_template import ChatRenderer
from preflab.models.generation import as_plain_text, prompt_seed
from utils.artifacts import read_json
from utils.errors import UserError

# Prompts per call of the engine, so that finished answers are cached between calls.
CHUNK = 128


def choose_engine(requested: str, models=None) -> str:
    """Choose "hf" or "vllm". "auto" is vLLM if it is installed, there is a GPU, and it supports the models.

    vLLM is not used with several processes (each engine would claim the first GPU), with bitsandbytes bases, or with
    adapters in float32.

    Args:
        requested: auto, hf or vllm.
        models: preflab.evaluation.two_models.TwoModels, if an adapter is involved.

    Raises:
        UserError: vllm is requested and cannot be used.
    """
    problem = None
    if importlib.util.find_spec("vllm") is None:
        problem = "vLLM is not installed (requirements/vllm.txt)"
    elif PartialState().num_processes > 1:
        problem = "one vLLM process uses all GPUs: run without accelerate launch"
    elif models is not None and models.quantized:
        problem = "it would generate with an unquantised base: pass --load_in_4bit false"
    elif models is not None and models.comparison.adapter and compute_dtype(models) == "float32":
        problem = "it supports adapters in 16 bits only: pass --dtype bfloat16"
    if requested == "vllm" and problem:
        raise UserError(f"--engine vllm: {problem}; or use --engine hf")
    if requested != "auto":
        return requested
    return "vllm" if problem is None and torch.cuda.is_available() else "hf"


def compute_dtype(models) -> str:
    """The dtype of the models' matrix products, under vLLM's name."""
    return str(models.autocast).removeprefix("torch.") if models.autocast else models.dtype


def lora_rank(adapter: str) -> int:
    """The smallest LoRA rank that vLLM supports and that is at least the adapter's."""
    rank = read_json(Path(adapter) / "adapter_config.json").get("r", 64)
    # vLLM accepts these values of max_lora_rank only.
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def load_engine(model: str, dtype: str, adapter: str | None = None, **kwargs):
    """Load a hub id or folder, optionally with a LoRA folder: (engine, LoRA request or None)."""
    from vllm import LLM

    if adapter is None:
        return LLM(model=model, dtype=dtype, **kwargs), None
    from vllm.lora.request import LoRARequest

    engine = LLM(model=model, dtype=dtype, enable_lora=True, max_lora_rank=lora_rank(adapter), **kwargs)
    # 1 is the adapter's number within the engine, which must be above 0.
    return engine, LoRARequest("tuned", 1, str(Path(adapter).resolve()))


def close(engine) -> None:
    """Free the GPU. `del` alone does not stop vLLM's engine process."""
    stop = getattr(getattr(getattr(engine, "llm_engine", None), "engine_core", None), "shutdown", None)
    if stop:
        stop()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(engine, lora, tokenizer, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=42, **_):
    """As `generation.generate`: yields `{"index", "text", "tokens", "finish_reason"}` per prompt, chunk by chunk."""
    from vllm import SamplingParams

    chat = ChatRenderer(tokenizer)
    ids = chat.ids([chat.prompt_text(as_plain_text(messages, tokenizer)) for messages in prompts])
    stops = sorted({tokenizer.eos_token_id, *chat.end_ids()})
    for start in range(0, len(ids), CHUNK):
        chunk = range(start, min(start + CHUNK, len(ids)))
        settings = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                # As generation.generate, each prompt has its own seed, so an answer does not depend on the other
                # prompts.
                seed=prompt_seed(seed, prompts[i]) % 2**31,
                stop_token_ids=stops,
                # As generation.only_settings: no default of the model's generation config applies.
                repetition_penalty=1.0,
            )
            for i in chunk
        ]
        outputs = engine.generate([{"prompt_token_ids": ids[i]} for i in chunk], settings, lora_request=lora)
        for i, output in zip(chunk, outputs, strict=True):
            answer = output.outputs[0]
            # As in generation.generate, the end token is not counted.
            tokens = [token for token in answer.token_ids if token not in stops]
            yield {
                "index": i,
                "text": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                "tokens": len(tokens),
                "finish_reason": answer.finish_reason,
            }


def label_logprobs(engine, prompts: list[list[int]], labels: dict[str, int]):
    """Log-probabilities of the labels as the next token of each prompt, chunk by chunk.

    Args:
        prompts: token ids.
        labels: token id per label.

    Yields:
        {label: log-probability} per prompt, without labels outside the 20 most likely tokens.
    """
    from vllm import SamplingParams

    # 20 is vLLM's default limit of logprobs per token (max_logprobs).
    settings = SamplingParams(max_tokens=1, temperature=1.0, logprobs=20)
    for start in range(0, len(prompts), CHUNK):
        for answer in engine.generate([{"prompt_token_ids": ids} for ids in prompts[start : start + CHUNK]], settings):
            top = answer.outputs[0].logprobs[0]
            yield {label: top[token].logprob for label, token in labels.items() if token in top}
