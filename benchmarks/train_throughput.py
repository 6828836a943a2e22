"""How fast is training, compared with an unmodified trainer of TRL?

    python benchmarks/train_throughput.py                              # SmolLM2, the shipped pairs, float32, CPU
    python benchmarks/train_throughput.py --data HuggingFaceH4/ultrafeedback_binarized --split train_prefs
    python benchmarks/train_throughput.py --stage sft --data HuggingFaceH4/ultrafeedback_binarized --split train_prefs
    python benchmarks/train_throughput.py --stage reward
    python benchmarks/train_throughput.py --model shape:gemma-2b --device cuda --dtype bfloat16 --compile_layers

All trainers get the same model, the same token ids in the same order and the same steps. Their runs alternate, each in
its own process, so that none inherits another's memory or patches. The first step of a run is not timed. Prints and
writes as JSON (--json FILE) rows and tokens per second, the share of the machine's matmul rate measured in the same run
(MFU), peak memory, the ratio with its range, and the largest difference of a step's loss.

What a trainer without padding gains depends on the rows. So several draws of rows are timed (--draws, --seed), and the
ratio of each is printed beside the tokens that stock TRL pads its rows to, over their tokens. Draw k of seed s has the
rows of draw 0 of seed s + k.

--stage dpo: the reference's log-probabilities are computed in every step, as stock TRL does. Tokens are those of
[prompt, chosen, rejected] stored once: padding and repeated prompts do not count. MFU counts 6 floating-point
operations per parameter and token: forward, the backward of activations, and the reference's forward.
--stage sft: the chosen answers; MFU counts 4 operations. Two more runs train on packed rows (--packing), stock and
this project's. Their steps have other rows, so they are compared by tokens per second over all draws.
--stage reward: a reward model's loss on the pairs of --stage dpo, with the same new reward layer; 4 operations.
--compile_layers adds a run of this project with compiled decoder layers.
--profile runs one more step of each trainer under the profiler, after the timed ones, and prints how its time divides.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.child import figures_of_child
from preflab.training.memory import OUT_OF_MEMORY
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import start

# The trainers of each stage, in the order of the first round; those named -packed train on packed rows.
WAYS = {
    "dpo": ["stock", "ours"],
    "sft": ["stock", "ours", "stock-packed", "ours-packed"],
    "reward": ["stock", "ours"],
}


@dataclass
class BenchmarkArguments:
    """Keys of this benchmark."""

    stage: str = option("dpo, sft or reward.", "dpo", choices=[*WAYS])
    model: str = option("builtin:smollm2-135m-instruct, a hub id or folder, or shape:NAME of benchmarks/shapes.py.",
                        "builtin:smollm2-135m-instruct")  # fmt: skip
    tokenizer: str = option("Tokenizer for a shape; its ids must be in the shape's vocabulary.",
                            "builtin:smollm2-135m-instruct")  # fmt: skip
    data: str = option("Preference data in any format of the training script.", "data/quickstart_prefs")
    split: str = option("Split of --data.", "train")
    draws: int = option("Random draws of rows, each with its own ratio.", 3)
    seed: int = option("Seed of the first draw; the next ones count up.", 0)
    steps: int = option("Timed optimizer steps per draw; one untimed step comes before the first draw.", 2)
    rounds: int = option("Runs of each trainer on all draws, alternating.", 1)
    batch: int = option("Pairs or conversations per micro-batch; with packing, rows.", 2)
    accumulation: int = option("Micro-batches per step.", 4)
    max_length: int = option("Longest sequence in tokens.", 512)
    dtype: str = option("float32 or bfloat16, of weights and arithmetic.", "float32", choices=["float32", "bfloat16"])
    device: str = option("cpu or cuda.", "cpu", choices=["cpu", "cuda"])
    lora_r: int = option("Rank of the LoRA on all seven projections; 0 trains every weight.", 16)
    micro_batch_tokens: int | None = option("Tokens per forward of this project's trainer (default: its choice).")
    compile_layers: bool = option("Also time this project's trainer with compiled layers.", False)
    profile: bool = option("Also profile one step of each trainer.", False)
    json: str | None = option("Write the figures here.")
    way: str | None = option("Internal: run one trainer and print its figures.", choices=[*WAYS["sft"], "compiled"])


def main():
    stage, args = start("train_throughput", __doc__, BenchmarkArguments)
    if args.way:
        from benchmarks.timed_training import one_way

        measured = one_way(args)
        return print(json.dumps(measured)) if is_main_process() else None
    for key in ("draws", "steps", "rounds", "batch", "accumulation", "max_length"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.lora_r < 0:
        raise UserError(f"--lora_r {args.lora_r}: must be at least 0")

    from preflab.training.throughput import matmul_rate
    from utils.artifacts import write_json
    from utils.provenance import run_record

    runs = {way: [] for way in [*WAYS[args.stage], *(["compiled"] if args.compile_layers else [])]}
    rates = [matmul_rate(args.dtype, args.device)]
    for number in range(args.rounds):
        # Alternate the order too, so that a machine that warms up favours neither.
        for way in list(runs)[:: -1 if number % 2 else 1]:
            runs[way].append(figures_of_child([__file__, *sys.argv[1:], "--way", way], f"the {way} run"))
            print(f"round {number + 1}, {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr)
            rates.append(matmul_rate(args.dtype, args.device))
    # The highest of the run: other work on the machine can only lower it.
    result = compare(runs, max(rates), args.stage) | {"device": args.device}
    print_result(result, args.rounds)
    if args.json:
        write_json(args.json, {**result, "args": {**args.__dict__, "json": None}, "run": run_record(42, stage.seconds)})


def compare(runs: dict[str, list[dict]], rate: float, stage: str) -> dict:
    """Ratio of the times, largest difference of losses, and the figures of each draw and of each trainer.

    Args:
        runs: from `one_way`, by trainer (WAYS), one per round. rate: of this machine's matrix products, FLOP/s.
        stage: "dpo", "sft" or "reward".
    """
    draws = [
        compare_draw({way: [run["draws"][k] for run in runs[way]] for way in ("stock", "ours")})
        for k in range(len(runs["stock"][0]["draws"]))
    ]
    seconds = {way: sum(run["seconds"] for run in measured) for way, measured in runs.items()}
    first = runs["stock"][0]
    return {
        "stage": stage,
        "ratio": seconds["stock"] / seconds["ours"],
        "processor_ratio": processor_ratio(runs),
        "ratio_min": min(draw["ratio_min"] for draw in draws),
        "ratio_max": max(draw["ratio_max"] for draw in draws),
        "max_loss_difference": max(draw["max_loss_difference"] for draw in draws),
        **{name: first[name] for name in ("pairs", "tokens", "padded_tokens")},
        "padded_over_stored_once": first["padded_tokens"] / first["tokens"],
        "matmul_rate": rate,
        "draws": draws,
        "ways": {way: figures(measured, rate, stage) for way, measured in runs.items()},
    }


def compare_draw(rounds: dict[str, list[dict]]) -> dict:
    """The same for one draw. `rounds`: its entry of `one_way`, by trainer, one per round."""
    pairs = list(zip(rounds["stock"], rounds["ours"], strict=True))
    ratios = [stock["seconds"] / ours["seconds"] for stock, ours in pairs]
    losses = [pair for stock, ours in pairs for pair in zip(stock["losses"], ours["losses"], strict=True)]
    first = rounds["stock"][0]
    return {
        **{name: first[name] for name in ("seed", "pairs", "tokens", "padded_tokens")},
        "padded_over_stored_once": first["padded_tokens"] / first["tokens"],
        "ratio": sum(s["seconds"] for s, _ in pairs) / sum(o["seconds"] for _, o in pairs),
        "processor_ratio": processor_ratio(rounds),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "max_loss_difference": max(abs(a - b) for a, b in losses),
        "step_seconds": {way: [run["step_seconds"] for run in measured] for way, measured in rounds.items()},
        "losses": {way: measured[0]["losses"] for way, measured in rounds.items()},
    }


def processor_ratio(runs: dict[str, list[dict]]) -> float:
    """Processor time of stock over that of this project. It is less sensitive to other work than the wall time."""
    stock, ours = (sum(run["processor_seconds"] for run in runs[way]) for way in ("stock", "ours"))
    return stock / ours


def print_result(result: dict, rounds: int) -> None:
    """Print the comparison: a line per draw, then the totals, then a line per trainer."""
    unit, stored = ("rows", "tokens") if result["stage"] == "sft" else ("pairs", "tokens stored once")
    stock_speed = result["ways"]["stock"]["tokens_per_second"]
    for draw in [*result["draws"], result]:
        name = f"draw {draw['seed']}" if "seed" in draw else "together"
        spread = f" ({draw['ratio_min']:.2f} to {draw['ratio_max']:.2f})"
        print(
            f"{name:<9} {draw['pairs']:4} {unit}  {draw['tokens']:6} {stored}"
            f"  padded over stored {draw['padded_over_stored_once']:.2f}"
            f"  ratio {draw['ratio']:.2f}{spread if rounds > 1 or draw is result else ''}"
        )
    # On a GPU the processor only launches kernels.
    if result["device"] == "cpu":
        by_draw = ", ".join(f"{draw['processor_ratio']:.2f}" for draw in result["draws"])
        print(f"ratio of processor time {result['processor_ratio']:.2f} (draws: {by_draw})")
    for way, m in result["ways"].items():
        speed = f"{m['pairs_per_second']:7.3f} {unit}/s  {m['tokens_per_second']:8.0f} tokens/s"
        times = f"{m['tokens_per_second'] / stock_speed:5.2f} x stock"
        print(f"  {way:<12} {speed} {times}  MFU {m['mfu']:.1%}  peak {max(m['peak_memory_gib'].values()):.2f} GiB")
    print(f"matrix products at {result['matmul_rate'] / 1e9:.0f} GFLOP/s")
    print(f"largest difference of a step's loss {result['max_loss_difference']:.2g}")
    for way, m in result["ways"].items():
        if m["time_by_kind"]:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in m["time_by_kind"].items())
            print(f"one step of {way}: {shares}")


def figures(runs: list[dict], rate: float, stage: str) -> dict:
    """Speed and memory of one trainer over its runs."""
    from preflab.training.throughput import DPO_OPERATIONS, STEP_OPERATIONS, model_flops

    operations = DPO_OPERATIONS if stage == "dpo" else STEP_OPERATIONS

    seconds, first = sum(run["seconds"] for run in runs), runs[0]
    tokens = first["tokens"] * len(runs)
    return {
        "seconds": [run["seconds"] for run in runs],
        "pairs_per_second": first["pairs"] * len(runs) / seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": model_flops(first["parameters"], tokens, operations) / seconds / rate,
        "peak_memory_gib": {k: max(run["peak_memory_gib"][k] for run in runs) for k in first["peak_memory_gib"]},
        "time_by_kind": first["time_by_kind"],
        "micro_batch_tokens": first["micro_batch_tokens"],
        "padded_because": first["padded_because"],
    }


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
