"""The process that runs vLLM: it reads jobs as JSON lines from stdin and writes answers as JSON lines to stdout.

`preflab.models.vllm_engine` starts it under the interpreter of vLLM's environment, which has other versions of torch
and transformers than the project's. So this file imports nothing of the project, and only token ids cross the pipe.

    -> {"engine": {arguments of vllm.LLM}, "adapter": FOLDER|null}
    <- {"ready": {"vllm": VERSION, "max_model_len": N}}
    -> {"prompts": [[ID, ...], ...], "settings": [{SamplingParams}, ...]}
    <- {"index": K, "tokens": [ID, ...], "finish_reason": "stop"|"length", "logprobs": {ID: LOGPROB}|null}   per prompt
    <- {"done": N}
    <- {"error": ONE LINE}   in place of any of these; the process then ends
"""

import json
import os
import queue
import signal
import sys
import threading

# The adapter's number within the engine, which must be above 0.
ADAPTER_NUMBER = 1


def main() -> None:
    # vLLM and its processes print to stdout, which belongs to the answers: they get stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    jobs = read_jobs()
    try:
        serve(jobs, send)
    except Exception as error:
        import traceback

        traceback.print_exc()
        send({"error": one_line(error)})
    # vLLM's processes would outlive an engine that failed.
    end_group()


def read_jobs() -> queue.Queue:
    """A queue that a thread fills from stdin. When stdin ends, this process and vLLM's end: their user is gone."""
    jobs = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        end_group()

    threading.Thread(target=read, daemon=True).start()
    return jobs


def end_group() -> None:
    """End this process and those of the engine, which share its process group. Does not return."""
    sys.stderr.flush()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def serve(jobs: queue.Queue, send) -> None:
    """Load the engine of the first job, then answer the others."""
    first = jobs.get()
    import vllm
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(**first["engine"])
    adapter = LoRARequest("tuned", ADAPTER_NUMBER, first["adapter"]) if first["adapter"] else None
    if adapter:
        # Now, so that an adapter that vLLM cannot apply fails before the first answer.
        llm.llm_engine.add_lora(adapter)
    send({"ready": {"vllm": vllm.__version__, "max_model_len": llm.llm_engine.model_config.max_model_len}})
    while True:
        answer(llm, adapter, jobs.get(), send)


def answer(llm, adapter, job: dict, send) -> None:
    """Generate for all prompts of a job at once; every answer is sent when it is finished."""
    from vllm import SamplingParams

    for index, (ids, values) in enumerate(zip(job["prompts"], job["settings"], strict=True)):
        # Text is decoded by the reader, with the project's tokenizer.
        settings = SamplingParams(**values, detokenize=False)
        # Not LLM.enqueue: the ids that it returns are not those of the outputs.
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, settings, lora_request=adapter)
    while llm.llm_engine.has_unfinished_requests():
        # LLM.generate would return all answers together, at the end.
        for output in llm.llm_engine.step():
            if output.finished:
                send({"index": int(output.request_id), **answer_of(output.outputs[0])})
    send({"done": len(job["prompts"])})


def answer_of(output) -> dict:
    """Tokens, finish reason, and the log-probabilities at the first token if they were requested."""
    tokens = list(output.token_ids)
    # The end token is not part of the answer; whatever token it is, it comes last.
    if output.finish_reason == "stop":
        tokens.pop()
    first = output.logprobs[0] if output.logprobs else None
    logprobs = first and {token: entry.logprob for token, entry in first.items()}
    return {"tokens": tokens, "finish_reason": output.finish_reason, "logprobs": logprobs}


def one_line(error: Exception) -> str:
    """The error's type and text; of pydantic's, which have several lines, the one that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError" and len(lines) > 2:
        lines = lines[2:]
    text = lines[0] if lines else "no reason given"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
