"""How fast are answers, compared with the best of transformers' own ways and with vLLM?

    python benchmarks/generation_throughput.py                             # both workloads, base and LoRA, two rounds
    python benchmarks/generation_throughput.py --workloads mixed --models base --rounds 3

Two workloads of greedy answers: "mixed", prompts of 17 to 970 tokens (evenly in the logarithm) with 64 new tokens
each; "ends", prompts of 17 to 300 tokens whose answers end after 8 to 512 tokens. An end is forced: no way of
computing knows it beforehand, except generate_batch and vLLM, which get each answer's length as its limit.

Peers: `model.generate` with the prompts sorted by length, in batches of 4, 8, 16 and 32, of which the fastest in the
first round counts and is repeated; `model.generate_batch`'s manager (continuous batching, paged attention); vLLM on the
base model, where its environment exists (install_vllm.sh, or VLLM_PYTHON). The LoRA model has random adapters (r16, all
projections). Prints tokens per second, the ratio to the best of `generate` with its range over rounds, and how many
answers have the same tokens; --json FILE writes the figures.
"""

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS, MODELS = ("mixed", "ends"), ("base", "lora")
# Tokens of the shortest answer of the workload `ends`.
SHORTEST_ANSWER = 8
# Reported as the pass without a result.
FAILED = "failed"


@dataclass
class GenerationArguments:
    """Keys of this benchmark."""

    model: str = option("The model that answers.", "builtin:smollm2-135m-instruct")
    workloads: list[str] = field(default_factory=lambda: list(WORKLOADS), metadata={"help": "mixed, ends, or both."})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "base, lora, or both."})
    prompts: int = option("Prompts per workload.", 16)
    batches: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Batch sizes of generate."})
    batch_tokens: int = option("This project's token budget.", 16384)
    longest_answer: int = option("Longest answer in tokens of the workload `ends`.", 512)
    rounds: int = option("Timed runs of each.", 2)
    dtype: str = option("Precision.", "float32")
    continuous: bool = option("Run transformers' generate_batch.", True)
    vllm: bool = option("Run vLLM on the base model, if it is installed.", True)
    before: bool = option("Also run the loop that other architectures use: generate, batched by token budget.", False)
    profile: bool = option("Also profile this project's pass.", False)
    json: str | None = option("Write the figures here.")


@dataclass
class Countdown:
    """Takes the place of an answer's random generator: its end token comes at this place."""

    left: int


class ForcedEnds:
    """Takes the place of a sampler: greedy, an end token where `Countdown` says and nowhere else."""

    def __init__(self, end: int):
        self.end = end

    def __call__(self, scores, countdowns):
        scores[:, self.end] = -math.inf
        tokens = scores.argmax(-1)
        for row, countdown in enumerate(countdowns):
            countdown.left -= 1
            if countdown.left == 0:
                tokens[row] = self.end
        return tokens


def evenly(low: int, high: int, count: int) -> list[int]:
    """`count` numbers from low to high at equal ratios."""
    return [round(low * (high / low) ** (k / max(1, count - 1))) for k in range(count)]


def requests_of(workload: str, tokenizer, args) -> tuple[list[list[int]], list[int], int]:
    """(token ids of each prompt, length of each answer with its end token, longest allowed answer)."""
    text = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rng = random.Random(0)
    longest = 64 if workload == "mixed" else args.longest_answer
    sizes = evenly(17, 970 if workload == "mixed" else 300, args.prompts)
    lengths = [64] * args.prompts if workload == "mixed" else evenly(SHORTEST_ANSWER, longest, args.prompts)
    # Independent of each other: neither order says where an answer ends.
    rng.shuffle(lengths)
    prompts = []
    for size in sizes:
        first = rng.randrange(len(ids) - size)
        prompts.append(ids[first : first + size])
    return prompts, lengths, longest


def here(model, tokenizer, prompts, lengths, longest, args, padded: bool = False):
    """This project's loop; `padded`: the one for architectures that are not decoded without padding."""
    from types import SimpleNamespace

    from preflab.models.generation import Request, answers_by_batch, answers_by_row

    way = answers_by_batch if padded else answers_by_row
    end = tokenizer.eos_token_id
    requests = [Request(i, ids, longest, Countdown(n)) for i, (ids, n) in enumerate(zip(prompts, lengths, strict=True))]
    names = SimpleNamespace(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    done = list(way(model, names, requests, {end}, ForcedEnds(end), args.batch_tokens, None, None))
    return [request.tokens for request in sorted(done, key=lambda r: r.index)]


def generate_sorted(model, tokenizer, prompts, lengths, longest, batch: int):
    """transformers' `generate` on the prompts sorted by length, longest first; rows that ended are padded."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    end, answers = tokenizer.eos_token_id, [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

    class Ends(LogitsProcessor):
        def __init__(self, rows):
            self.sampler, self.rows = ForcedEnds(end), [Countdown(lengths[i]) for i in rows]

        def __call__(self, input_ids, scores):
            tokens = self.sampler(scores, self.rows)
            return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)

    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        width = len(prompts[rows[0]])
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(rows):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        settings = dict(do_sample=False, max_new_tokens=longest, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        with torch.inference_mode():
            out = model.generate(**inputs, logits_processor=LogitsProcessorList([Ends(rows)]), **settings)
        for row, i in enumerate(rows):
            answers[i] = out[row, width : width + lengths[i]].tolist()
    return answers


def generate_batch(model, tokenizer, prompts, lengths, longest):
    """transformers' continuous batching, as `generate_batch` runs it; each answer's length is its limit."""
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    # No end token: the lengths are limits.
    settings = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(max(map(len, prompts)), longest, len(prompts))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    configured, answers = base.config._attn_implementation, {}
    try:
        with base.continuous_batching_context_manager(settings, timeout=5, workload_hints=hints) as manager:
            for i, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
                manager.add_request(ids, str(i), max_new_tokens=length)
            while len(answers) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    answers[int(result.request_id)] = result.generated_tokens
                elif result is None and not manager.is_running():
                    return None
    finally:
        base.set_attn_implementation(configured)
    return [answers[i] for i in range(len(prompts))]


def vllm_seconds(python: str, model: str, prompts, lengths, args) -> list[float] | str:
    """Seconds of each of vLLM's rounds, loading excluded, or why there are none."""
    from preflab.models.vllm_environment import environment

    job = {"model": model, "dtype": args.dtype, "prompts": prompts, "lengths": lengths, "rounds": args.rounds}
    job["longest"] = max(len(p) + n for p, n in zip(prompts, lengths, strict=True)) + 1
    worker = Path(__file__).with_name("vllm_peer.py")
    done = subprocess.run(
        [python, str(worker)], input=json.dumps(job), capture_output=True, text=True, env=environment()
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    return (
        json.loads(lines[-1].removeprefix("seconds ")) if lines else (done.stderr.strip().splitlines() or [FAILED])[-1]
    )


def timed(way) -> tuple[float, object]:
    """(seconds, result) of a call."""
    started = time.monotonic()
    result = way()
    return time.monotonic() - started, result


def compare(model, tokenizer, name: str, workload: str, args) -> dict:
    """Time all ways on one workload and print their table."""
    from preflab.models.loading import locate
    from preflab.models.vllm_environment import find_python

    prompts, lengths, longest = requests_of(workload, tokenizer, args)
    given = (model, tokenizer, prompts, lengths, longest)
    tokens, padded = sum(lengths), {}
    sizes = sorted({min(size, len(prompts)) for size in args.batches})
    for size in sizes:
        padded[size] = timed(lambda size=size: generate_sorted(*given, size))
        print(f"    generate, batch {size:<2} {tokens / padded[size][0]:7.1f} tokens/s", flush=True)
    best = min(padded, key=lambda size: padded[size][0])
    seconds = {f"generate, sorted, batch {best}": [padded[best][0]]}
    ways = {
        f"generate, sorted, batch {best}": lambda: generate_sorted(*given, best),
        "generate_batch": lambda: generate_batch(*given),
        "this project": lambda: here(*given, args),
    }
    if not args.continuous:
        del ways["generate_batch"]
    if args.before:
        ways["in batches, as before"] = lambda: here(*given, args, padded=True)
    results = {f"generate, sorted, batch {best}": padded[best][1]}
    for number in range(args.rounds):
        for way in ways:
            # The first round of the best `generate` was timed above.
            if number == 0 and way in seconds:
                continue
            elapsed, results[way] = timed(ways[way])
            seconds.setdefault(way, []).append(elapsed)
    python = find_python() if args.vllm else None
    if python and name == "base":
        vllm = vllm_seconds(python, locate(args.model), prompts, lengths, args)
        if isinstance(vllm, str):
            print(f"    vLLM: {vllm}")
        else:
            seconds["vLLM"] = vllm
    return report(seconds, results, tokens, {size: tokens / s for size, (s, _) in padded.items()})


def report(seconds: dict, results: dict, tokens: int, by_batch: dict) -> dict:
    """Print and return tokens per second and the ratio to the first way, with its range over rounds."""
    first = next(iter(seconds))
    figures = {"tokens": tokens, "generate_tokens_per_second": by_batch}
    for way, times in seconds.items():
        if results.get(way, ()) is None:
            print(f"  {way:<28} {FAILED}")
            continue
        ratios = [a / b for a, b in zip(seconds[first], times, strict=False)]
        speed, ratio = (
            tokens * len(times) / sum(times),
            sum(seconds[first]) / len(seconds[first]) / sum(times) * len(times),
        )
        # generate_batch stops at its limit, so its last token is not the forced end.
        equal = (
            sum(a[:-1] == b[:-1] for a, b in zip(results[way], results[first], strict=True)) if way in results else None
        )
        figures[way] = {"seconds": times, "tokens_per_second": speed, "ratio": ratio, "equal_answers": equal}
        same = "" if equal is None else f"  {equal} of {len(results[first])} answers equal"
        print(f"  {way:<28} {speed:7.1f} tokens/s  ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}){same}")
    return figures


def with_random_adapter(model):
    """The model with LoRA (r16, all projections), whose weights are random but not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return tuned.eval()


def main():
    stage, args = start("generation_throughput", __doc__, GenerationArguments)

    from preflab.models.fast import fused_lora
    from preflab.models.loading import load_model, load_tokenizer
    from utils.artifacts import write_json
    from utils.distributed import join_processes
    from utils.provenance import run_record

    for key, known in (("workloads", WORKLOADS), ("models", MODELS)):
        if unknown := set(getattr(args, key)) - set(known):
            raise UserError(f"--{key} {unknown.pop()}: choose from {', '.join(known)}")
    if min(args.rounds, args.prompts, *args.batches) < 1:
        raise UserError("--rounds, --prompts and --batches must be at least 1")
    if args.longest_answer < SHORTEST_ANSWER:
        raise UserError(f"--longest_answer {args.longest_answer}: must be at least {SHORTEST_ANSWER}")
    join_processes()
    tokenizer = load_tokenizer(args.model)
    figures = {}
    for name in args.models:
        # Anew for each: generate_batch replaces the attention of a model.
        model = load_model(args.model, dtype=args.dtype).eval()
        if name == "lora":
            model = with_random_adapter(model)
            fused_lora.attach(model)
        for workload in args.workloads:
            print(f"{workload}, {name}: {args.prompts} prompts", flush=True)
            figures[f"{workload}, {name}"] = compare(model, tokenizer, name, workload, args)
            if args.profile:
                profile(model, tokenizer, requests_of(workload, tokenizer, args), args)
    if args.json:
        write_json(args.json, {**figures, "benchmark": args.__dict__, "run": run_record(0, stage.seconds)})


def profile(model, tokenizer, requests, args) -> None:
    """Print the operations of this project's pass by time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with profiling(activities=[ProfilerActivity.CPU]) as profiler:
        here(model, tokenizer, *requests, args)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=50))


if __name__ == "__main__":
    run(main)
