"""Runs in vLLM's own environment, for generation_throughput.py: times its greedy answers to a job on standard input.

The job has model, dtype, longest (tokens of prompt and answer), rounds, prompts (token ids) and lengths. Prints
"seconds [...]", one number per round; loading and a warm-up are not counted.
"""

import json
import sys
import time


def main():
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    engine = LLM(model=job["model"], dtype=job["dtype"], max_model_len=job["longest"], enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    settings = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in job["lengths"]]
    engine.generate(prompts[:1], settings[:1], use_tqdm=False)
    seconds = []
    for _ in range(job["rounds"]):
        started = time.monotonic()
        engine.generate(prompts, settings, use_tqdm=False)
        seconds.append(time.monotonic() - started)
    print("seconds " + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
