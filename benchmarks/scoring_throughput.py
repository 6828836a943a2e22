"""How fast is scoring, beside a plain loop that takes one row at a time?

    python benchmarks/scoring_throughput.py                                     # the quickstart run, 40 pairs
    python benchmarks/scoring_throughput.py --run_name NAME --pairs 200 [--dataset_name ID --split NAME ...]

The plain loop is what a reader would write first: for each answer one forward of base and one of tuned over prompt and
answer, log_softmax of all logits, the answer's entries summed. Both ways score the same sequences in turns, `--rounds`
times; the best round of each counts. Prints tokens a second of each, their ratio, and the largest difference of a sum.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import quick_help
from utils.errors import run
from utils.evaluation_arguments import ComparisonArguments, option


@dataclass
class BenchmarkArguments:
    """Keys of this benchmark."""

    pairs: int = option("Held-out pairs to score.", 40)
    rounds: int = option("Times that each way is timed; the best counts.", 3)


def plain_loop(models, sequences):
    """[base, tuned] summed log-probability of each sequence's answer, one row at a time."""
    import torch

    found = []
    with torch.inference_mode():
        for s in sequences:
            ids = torch.tensor([s.ids], device=models.device)
            row = []
            for side in models.sides:
                with models.side(side) as model:
                    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                row.append(logps.gather(1, ids[0, 1:, None])[s.start - 1 :, 0].sum().item())
            found.append(row)
    return found


def batched(models, sequences, args):
    """The same from utils.scoring, in the batches that the evaluation scripts take."""
    from utils.batching import token_batches
    from utils.scoring import score_batch

    found = [None] * len(sequences)
    for batch in token_batches([len(s.ids) for s in sequences], args.batch_tokens, args.batch_size):
        for i, scores in zip(batch, score_batch(models, [sequences[i] for i in batch]), strict=True):
            found[i] = [float(scores.base.sum()), float(scores.tuned.sum())]
    return found


def main():
    quick_help(__doc__, runs_bare=True)

    from utils.cli import parse
    from utils.comparison import TwoModels, resolve
    from utils.distributed import join_processes
    from utils.evaluation_data import held_out_pairs
    from utils.logs import quiet_libraries
    from utils.scoring import Sequence

    quiet_libraries()
    args, ours = parse((ComparisonArguments, BenchmarkArguments))
    args.limit = ours.pairs
    comparison = resolve(args)
    join_processes()
    models = TwoModels(comparison)
    _, ids, _ = held_out_pairs(comparison, models.tokenizer)
    models.load()
    answers, with_kl = [], []
    for row in ids:
        for side in ("chosen", "rejected"):
            start = len(row["prompt_ids"])
            answers.append(Sequence(row["prompt_ids"] + row[f"{side}_ids"], start))
            with_kl.append(Sequence(row["prompt_ids"] + row[f"{side}_ids"], 1, start))
    ways = {
        "plain loop, one row at a time": lambda: plain_loop(models, answers),
        "eval_win_rate.py's scoring": lambda: batched(models, answers, args),
        "eval_perplexity.py's scoring, whole texts and KL": lambda: batched(models, with_kl, args),
    }
    tokens = sum(len(s.ids) for s in answers)
    best, results = {}, {}
    for _ in range(ours.rounds):
        for name, way in ways.items():
            started = time.monotonic()
            results[name] = way()
            best[name] = min(best.get(name, float("inf")), time.monotonic() - started)
    plain, scored, _ = results.values()
    apart = max(abs(a - b) for x, y in zip(plain, scored, strict=True) for a, b in zip(x, y, strict=True))
    first = next(iter(best.values()))
    print(f"{len(answers)} answers, {tokens} tokens, each read by base and tuned; best of {ours.rounds} rounds")
    for name, seconds in best.items():
        print(f"  {name:<50} {seconds:7.2f} s  {tokens / seconds:7.0f} tokens/s  {first / seconds:.2f} times the loop")
    print(f"largest difference of a summed log-probability: {apart:.2g} nats")


if __name__ == "__main__":
    run(main)
