"""Generation with vLLM, in a process under the interpreter of a separate environment (`bash install_vllm.sh`).

Answers have the form of preflab.models.generation. Prompts are rendered and answers decoded here, with the project's
tokenizer; the process (preflab/models/vllm_worker.py) gets and returns token ids. It ends with `Engine.close`, and with
this process however that ends, so that the GPU's memory is free for the next model.
"""

import atexit
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState

from preflab.data.chat_template import ChatRenderer
from preflab.models.checks import room_within
from preflab.models.generation import as_plain_text, not_a_number
from preflab.models.gguf_model import gguf_path
from preflab.models.sampling import prompt_seed
from preflab.models.vllm_environment import environment, find_python, parse_args, require_python
from utils.artifacts import read_json
from utils.errors import UserError, at_end, explain

WORKER = Path(__file__).with_name("vllm_worker.py")
# vLLM's own default, and memory that this process needs for its CUDA context.
MEMORY_SHARE, MEMORY_MARGIN = 0.9, 0.03
OUT_OF_MEMORY = "lower --vllm_args gpu_memory_utilization or max_model_len"


# ------------------------------------------------------------------------------------------------------------ settings


def choose_engine(requested: str, models=None, bases: Iterable[str] = ()) -> str:
    """Choose "hf" or "vllm". "auto" is vLLM if it is installed, there is a GPU, and it supports the models.

    vLLM is not used with GGUF files and bitsandbytes bases, nor on a GPU with adapters in float32.

    Args:
        requested: auto, hf or vllm.
        models: preflab.evaluation.two_models.TwoModels, if an adapter is involved.
        bases: the names of the models' weights.

    Raises:
        UserError: vllm is requested and cannot be used.
    """
    if requested == "hf" or (requested == "auto" and not torch.cuda.is_available()):
        return "hf"
    problem = None
    if any(gguf_path(base) for base in bases):
        problem = "a GGUF file runs with llama.cpp"
    elif models is not None and models.quantized:
        problem = "it would generate with an unquantised base: pass --load_in_4bit false"
    elif models is not None and models.comparison.adapter and compute_dtype(models) == "float32":
        # Its LoRA kernels for GPUs are for 16 bits; on a CPU they are torch's.
        problem = "it supports adapters in 16 bits only: pass --dtype bfloat16" if torch.cuda.is_available() else None
    if requested == "vllm":
        if problem:
            raise UserError(f"--engine vllm: {problem}; or use --engine hf")
        require_python("--engine vllm", "--engine hf")
        return "vllm"
    return "vllm" if problem is None and find_python() else "hf"


def compute_dtype(models) -> str:
    """The dtype of the models' matrix products, under vLLM's name."""
    return str(models.autocast).removeprefix("torch.") if models.autocast else models.dtype


def lora_rank(adapter: str) -> int:
    """The smallest LoRA rank that vLLM supports and that is at least the adapter's."""
    config = read_json(Path(adapter) / "adapter_config.json")
    rank = max([config.get("r", 64), *(config.get("rank_pattern") or {}).values()])
    # vLLM accepts these values of max_lora_rank only.
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def devices_of_process(gpus: int, place: str = "--vllm_args tensor_parallel_size") -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of this process's engine: every process of a launch has `gpus` GPUs; {} without a GPU.

    Raises:
        UserError: fewer GPUs are visible than the processes of this machine need.
    """
    visible = torch.cuda.device_count()
    if not visible:
        return {}
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if len(names) == visible and all(names) else [str(k) for k in range(visible)]
    first = PartialState().local_process_index * gpus
    if first + gpus > visible:
        needed = f"process {first // gpus + 1} of this machine needs GPUs {first} to {first + gpus - 1}"
        raise UserError(f"{place}={gpus}: {needed}, but {visible} are visible; lower it or the number of processes")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + gpus])}


def memory_share(gpus: int) -> dict[str, float]:
    """vLLM's share of a GPU's memory: at most 0.9, and no more than is free; {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    gc.collect()
    torch.cuda.empty_cache()
    first = PartialState().local_process_index * gpus
    shares = []
    for device in range(first, first + gpus):
        free, total = torch.cuda.mem_get_info(device)
        shares.append(free / total - MEMORY_MARGIN)
    # Rounded down, and above 0, so that vLLM itself says that too little is free.
    return {"gpu_memory_utilization": max(0.01, math.floor(100 * min(MEMORY_SHARE, *shares)) / 100)}


# ------------------------------------------------------------------------------------------------------------- engine


class Engine:
    """vLLM's process with one model, and optionally a LoRA adapter that all of its answers use.

    Attributes:
        max_model_len: most tokens of prompt and answer together.
    """

    def __init__(self, model: str, dtype: str, adapter: str | None = None, words: list[str] | None = None, **options):
        """Start the process and load the model (a hub id or folder).

        Args:
            adapter: a LoRA folder. words: --vllm_args. options: further settings of vLLM (revision, ...).

        Raises:
            UserError: vLLM is not installed, or could not load the model; names the process's log.
        """
        python = require_python(f"vllm:{model}", "transformers (--engine hf, or a judge hf:MODEL)")
        own = parse_args(words)
        gpus = own.get("tensor_parallel_size", 1)
        settings = {
            "model": model,
            "dtype": dtype,
            # The longest context that fits into memory.
            "max_model_len": -1,
            # Only token ids pass, so vLLM's transformers does not have to read a tokenizer of a newer version.
            "skip_tokenizer_init": True,
            **({"enable_lora": True, "max_lora_rank": lora_rank(adapter)} if adapter else {}),
            **memory_share(gpus),
            **own,
            **options,
        }
        self.name, self.process, self.checked = model, None, False
        handle, log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        self.log = Path(log)
        print(f"vLLM: loading {model}, a minute or more (log: {log})", file=sys.stderr)
        with os.fdopen(handle, "wb") as stderr:
            self.process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**environment(), **devices_of_process(gpus)},
                # Its own group: Ctrl-C reaches this process only, which then ends the group.
                start_new_session=True,
                encoding="utf-8",
            )
        at_end(self.close)
        # In a notebook or a test, which no script ends.
        atexit.register(self.close)
        adapter = str(Path(adapter).resolve()) if adapter else None
        self._send({"engine": settings, "adapter": adapter})
        try:
            self.max_model_len = self._receive()["ready"]["max_model_len"]
        except BaseException:
            self.close(keep_log=True)
            raise

    def run(self, prompts: list[list[int]], settings: list[dict]) -> Iterator[dict]:
        """Generate for all prompts at once.

        Args:
            prompts: token ids. settings: vLLM's SamplingParams of each.

        Yields:
            `{"index", "tokens", "finish_reason", "logprobs"}` per prompt, in the order in which they end. `logprobs` is
            {token id: log-probability} at the first token, or None if not requested.
        """
        finished = False
        try:
            self._send({"prompts": prompts, "settings": settings})
            while "done" not in (answer := self._receive()):
                if answer["logprobs"] is not None:
                    answer["logprobs"] = {int(token): value for token, value in answer["logprobs"].items()}
                yield answer
            finished = True
        finally:
            # Answers that nobody read would be taken for those of the next call.
            if not finished:
                self.close()

    def ensure_numbers(self, prompt: list[int]) -> None:
        """Raise UserError if the model's outputs are NaN, of which vLLM would still sample tokens; checked once."""
        if not self.checked:
            settings = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1}
            for answer in self.run([prompt], [settings]):
                if any(math.isnan(value) for value in answer["logprobs"].values()):
                    raise UserError(not_a_number(self.name))
            self.checked = True

    def close(self, keep_log: bool = False) -> None:
        """End the process and those of the engine, which frees the GPU's memory. Does nothing the second time."""
        process, self.process = self.process, None
        if process is None:
            return
        # The group may be gone already, as a zombie or without one.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        if not keep_log:
            self.log.unlink(missing_ok=True)

    def _send(self, message: dict) -> None:
        if self.process is None:
            raise UserError(f"vLLM: the engine of {self.name} was closed")
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        # The process ended; `_receive` finds out why.
        except BrokenPipeError:
            pass

    def _receive(self) -> dict:
        """The next message. Raises UserError with vLLM's error, also where its process ended without one."""
        line = self.process.stdout.readline()
        message = json.loads(line) if line.endswith("\n") else {"error": "its process ended"}
        if "error" not in message:
            return message
        log, cause = self.log, cause_of(self.log, message["error"])
        self.close(keep_log=True)
        advice = explain(RuntimeError(cause), OUT_OF_MEMORY)
        raise UserError(f"vLLM, {self.name}: {advice or cause} (its log: {log})")


def cause_of(log: Path, reported: str) -> str:
    """The error to show: the one reported, or where that only refers to another process, its last one in the log."""
    if not re.search(r"root cause|its process ended|EngineDead|EngineCore|executor failed", reported):
        return reported
    pattern = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception)): (.+)")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    causes = [match for line in lines if (match := pattern.search(line)) and "root cause" not in line]
    causes = [match for match in causes if not re.search(r"EngineDead|EngineCore|executor failed", match[0])]
    return causes[-1][0].strip() if causes else reported


# ------------------------------------------------------------------------------------------------------- what it gives


def generate(engine: Engine, tokenizer, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=42, **_):
    """As `generation.generate`: yields `{"index", "text", "tokens", "finish_reason"}` per prompt that is finished."""
    if not prompts:
        return
    chat = ChatRenderer(tokenizer)
    ids = chat.ids([chat.prompt_text(as_plain_text(messages, tokenizer)) for messages in prompts])
    room = room_within(engine.max_model_len, ids, max_new_tokens, engine.name, "with vLLM")
    engine.ensure_numbers(ids[0])
    # Those of the model's generation config are added by vLLM.
    stops = sorted({tokenizer.eos_token_id, *chat.end_ids()})
    settings = [
        {
            "max_tokens": room[i],
            "temperature": temperature,
            "top_p": top_p,
            # As generation.generate, each prompt has its own seed, so an answer does not depend on the other prompts.
            "seed": prompt_seed(seed, messages) % 2**31,
            "stop_token_ids": stops,
            # As generation.only_settings: no default of the model's generation config applies.
            "repetition_penalty": 1.0,
        }
        for i, messages in enumerate(prompts)
    ]
    for answer in engine.run(ids, settings):
        yield {
            "index": answer["index"],
            "text": tokenizer.decode(answer["tokens"], skip_special_tokens=True).strip(),
            "tokens": len(answer["tokens"]),
            "finish_reason": answer["finish_reason"],
        }


def label_logprobs(
    engine: Engine, prompts: list[list[int]], labels: dict[str, int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Log-probabilities of the labels as the next token of each prompt.

    Args:
        prompts: token ids.
        labels: token id per label.

    Yields:
        (index, {label: log-probability}) per prompt, normalised over the vocabulary.

    Raises:
        UserError: a log-probability is NaN.
    """
    # Of these tokens, wherever they rank; `logprobs` alone gives the likeliest tokens.
    settings = {"max_tokens": 1, "temperature": 1.0, "logprob_token_ids": sorted(labels.values())}
    for answer in engine.run(prompts, [settings] * len(prompts)):
        logprobs = {label: answer["logprobs"][token] for label, token in labels.items()}
        if any(math.isnan(value) for value in logprobs.values()):
            raise UserError(not_a_number(engine.name))
        yield answer["index"], logprobs
