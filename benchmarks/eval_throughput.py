"""How fast is scoring, compared with lm-evaluation-harness on the same requests?

    python benchmarks/eval_throughput.py                                     # the latest run, 40 pairs
    python benchmarks/eval_throughput.py --run_name NAME --pairs 200 [--dataset_name ID --split NAME ...]

The peer is the harness's own model class (HFLM): log-likelihoods of the same token ids, in batches of 8, once under
base and once under tuned. The implementations alternate, --rounds times. Prints tokens per second of each, the ratio
with its range over rounds, and the largest difference of a sum; --json FILE writes them. --profile runs each way once
more and prints its matrix products' share of the time, their number of operations, and their rate relative to the
machine's: the remaining potential. Answers are measured by generation_throughput.py.

Tokens are counted as in the peer, so computation that is avoided counts as done. The third way of scoring does more
than the peer: full texts, and KL over the vocabulary.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.evaluation.arguments import ComparisonArguments
from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start


@dataclass
class BenchmarkArguments:
    """Keys of this benchmark."""

    pairs: int = option("Held-out pairs to score.", 40)
    harness_batch: int = option("Rows per batch of the harness.", 8)
    rounds: int = option("Timed runs of each implementation.", 3)
    profile: bool = option("Also profile each way.", False)
    json: str | None = option("Write the figures here.")


def harness(models, sequences, batch: int):
    """[base, tuned] summed log-probability of each sequence's answer, from lm-evaluation-harness."""
    import logging

    from lm_eval.models.huggingface import HFLM

    from preflab.models.logprobs import without_adapter_shell

    # It warns that some of its own arguments do not apply to a loaded model.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    longest = max(len(s.ids) for s in sequences)
    # ((context, continuation) as texts, which are only part of cache keys, and both as token ids).
    requests = [(("", str(i)), s.ids[: s.start], s.ids[s.start :]) for i, s in enumerate(sequences)]
    by_side = []
    for side in models.sides:
        with models.side(side) as model:
            # Adapter layers stay active inside the transformers model.
            inner = without_adapter_shell(model)
            peer = HFLM(pretrained=inner, tokenizer=models.tokenizer, batch_size=batch, max_length=longest)
            by_side.append([total for total, _ in peer._loglikelihood_tokens(requests, disable_tqdm=True)])
    return [list(sums) for sums in zip(*by_side, strict=True)]


def batched(models, sequences, args):
    """The same from preflab.evaluation.logprob_scoring, in the batches of the evaluation scripts."""
    from preflab.evaluation.logprob_scoring import batches_of, score_batch, units_of

    sums = [None] * len(sequences)
    for batch in batches_of(units_of([s.ids for s in sequences], models.shares_prompts), args):
        for i, scores in zip(batch, score_batch(models, [sequences[i] for i in batch]), strict=True):
            sums[i] = [float(scores.base.sum()), float(scores.tuned.sum())]
    return sums


def alternate(ways: dict, rounds: int) -> tuple[dict, dict]:
    """(seconds by round, last result) of each way. Every second round reverses the order, so that none is favoured."""
    seconds, results = {name: [] for name in ways}, {}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            started = time.monotonic()
            results[name] = ways[name]()
            seconds[name].append(time.monotonic() - started)
    return seconds, results


def profiled(way, rate: float) -> dict:
    """Profile one run: time shares of matrix products and attention, the products' operations and their rate."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.operation_times import kind_of

    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        way()
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    products = [e for e in events if kind_of(e.key) == "matrix products"]
    seconds, operations = sum(e.self_cpu_time_total for e in products) / 1e6, sum(e.flops for e in products)
    attention = sum(e.self_cpu_time_total for e in events if kind_of(e.key) == "attention")
    return {
        "products_share": 1e6 * seconds / total,
        "attention_share": attention / total,
        "operations": operations,
        "rate": operations / seconds,
        "of_the_machines": operations / seconds / rate,
    }


def print_profiles(profiles: dict, rate: float) -> None:
    """Print the results of `profiled` by way; operations are relative to the first one's."""
    first = next(iter(profiles.values()))
    print(f"profile (this machine's rate of matrix products: {rate / 1e9:.0f} GFLOP/s)")
    for name, m in profiles.items():
        left = 1 - m["products_share"] - m["attention_share"]
        print(
            f"  {name:<50} products {m['products_share']:.0%} at {m['of_the_machines']:.0%} of the rate, attention"
            f" {m['attention_share']:.0%}, other {left:.0%}; {m['operations'] / first['operations']:.2f} times"
            " the harness's operations"
        )


def table(title: str, tokens: int, seconds: dict) -> dict:
    """Print and return tokens per second and the ratio to the first way, with its range over rounds."""
    print(title)
    first, figures = next(iter(seconds.values())), {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(first, times, strict=True)]
        speed, ratio = tokens * len(times) / sum(times), sum(first) / sum(times)
        figures[name] = {"seconds": times, "tokens_per_second": speed, "ratio": ratio}
        figures[name] |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  {name:<50} {speed:7.0f} tokens/s  {ratio:.2f} times the harness ({spread})")
    return figures


def main():
    stage, args, benchmark = start("eval_throughput", __doc__, ComparisonArguments, BenchmarkArguments)

    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.held_out import held_out_pairs
    from preflab.evaluation.logprob_scoring import Sequence
    from preflab.evaluation.two_models import TwoModels
    from utils.artifacts import write_json
    from utils.distributed import join_processes
    from utils.provenance import run_record

    if min(benchmark.rounds, benchmark.pairs, benchmark.harness_batch) < 1:
        raise UserError("--rounds, --pairs and --harness_batch must be at least 1")
    args.limit = benchmark.pairs
    comparison = resolve(args)
    join_processes()
    models = TwoModels(comparison)
    _, ids, _ = held_out_pairs(comparison, models.tokenizer)
    models.load()
    answers, with_kl = [], []
    for row in ids:
        for side in ("chosen", "rejected"):
            answer_start = len(row["prompt_ids"])
            answers.append(Sequence(row["prompt_ids"] + row[f"{side}_ids"], answer_start))
            with_kl.append(Sequence(row["prompt_ids"] + row[f"{side}_ids"], 1, answer_start))
    ways = {
        f"lm-evaluation-harness, batch {benchmark.harness_batch}": lambda: harness(
            models, answers, benchmark.harness_batch
        ),
        "eval_win_rate.py's scoring": lambda: batched(models, answers, args),
        "eval_perplexity.py's scoring, full texts and KL": lambda: batched(models, with_kl, args),
    }
    tokens = sum(len(s.ids) for s in answers)
    seconds, results = alternate(ways, benchmark.rounds)
    peer, scored, _ = results.values()
    largest = max(abs(a - b) for x, y in zip(peer, scored, strict=True) for a, b in zip(x, y, strict=True))
    title = f"scoring {len(answers)} answers, {tokens} tokens, each scored by base and tuned"
    figures = {"scoring": table(title, tokens, seconds), "max_logp_difference": largest}
    print(f"largest difference of a summed log-probability: {largest:.2g} nats")
    if benchmark.profile:
        from preflab.training.throughput import matmul_rate

        rate = matmul_rate(models.dtype, models.device.type)
        figures["profile"] = {name: profiled(way, rate) for name, way in ways.items()}
        print_profiles(figures["profile"], rate)
    if benchmark.json:
        record = {"args": args.__dict__, "benchmark": benchmark.__dict__, "run": run_record(42, stage.seconds)}
        write_json(benchmark.json, {**figures, **record})


if __name__ == "__main__":
    run(main)
