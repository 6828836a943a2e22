"""A stand-in for the package vllm, and for an interpreter that has it: the tests of preflab.models.vllm_engine.

It records the arguments of every call in calls.jsonl, and answers a prompt with its own last tokens. Like vLLM, it runs
another process and prints to stdout.
"""

import shlex
import sys
from pathlib import Path

PACKAGE = """
import json, math, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0-fake"
HERE = Path(__file__).parent.parent
# As the processes of vLLM: it continues unless it is ended with this one.
PROCESS = subprocess.Popen(["sleep", "600"])


def note(**call):
    with open(HERE / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")


class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings


class LLM:
    def __init__(self, **arguments):
        environment = {k: os.environ.get(k) for k in ("RANK", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
        note(pids=[os.getpid(), PROCESS.pid], arguments=arguments, environment=environment)
        print("vLLM prints to stdout")
        if "unknown" in arguments:
            raise TypeError("LLM.__init__() got an unexpected keyword argument 'unknown'")
        self.dies = arguments.get("dies")
        self.llm_engine, self.queue, self.noted = self, [], False
        self.model_config = SimpleNamespace(max_model_len=64)

    def add_lora(self, request):
        note(adapter=[request.number, request.path])

    def add_request(self, request, prompt, settings, lora_request=None):
        self.queue.append((request, prompt["prompt_token_ids"], settings.settings))
        # As vLLM: what it returns is not the id of the output.
        self.adapter = lora_request and lora_request.path
        return f"{request}-0123"

    def has_unfinished_requests(self):
        return bool(self.queue)

    def step(self):
        if self.dies and len(self.queue[0][1]) > 3:
            print("(EngineCore pid=1) ERROR [core.py:1] RuntimeError: cuda out of reach", file=sys.stderr, flush=True)
            os._exit(1)
        if not self.noted:
            prompts = [{"prompt_token_ids": ids} for _, ids, _ in self.queue]
            note(prompts=prompts, settings=[s for _, _, s in self.queue], adapter=self.adapter)
        # The last request ends first.
        request, ids, settings = self.queue.pop()
        self.noted = bool(self.queue)
        stop = settings.get("stop_token_ids", [0])[-1]
        tokens = [*ids[-5:-2], stop][: settings["max_tokens"]]
        wanted = settings.get("logprob_token_ids") or ([7] if "logprobs" in settings else [])
        scores = {t: SimpleNamespace(logprob=math.nan if 13 in ids else -float(t)) for t in [*wanted, 5]}
        reason = "stop" if tokens[-1] == stop else "length"
        output = SimpleNamespace(token_ids=tokens, finish_reason=reason, logprobs=[scores] if wanted else None)
        return [SimpleNamespace(request_id=request, finished=True, outputs=[output])]
"""
LORA = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.name, self.number, self.path = name, number, path
"""


def make(folder: Path) -> Path:
    """Write the package, and an interpreter that finds it. Returns the interpreter, for VLLM_PYTHON."""
    (folder / "vllm" / "lora").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(PACKAGE)
    (folder / "vllm" / "lora" / "__init__.py").touch()
    (folder / "vllm" / "lora" / "request.py").write_text(LORA)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder))} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return python
