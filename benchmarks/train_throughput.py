"""How fast is DPO training, compared with an unmodified TRL DPOTrainer?

    python benchmarks/train_throughput.py                              # SmolLM2, the shipped pairs, float32, CPU
    python benchmarks/train_throughput.py --data HuggingFaceH4/ultrafeedback_binarized --split train_prefs
    python benchmarks/train_throughput.py --model shape:gemma-2b --device cuda --dtype bfloat16

Both trainers get the same model, the same token ids in the same order and the same steps. Their runs alternate, each in
its own process, so that neither inherits the other's memory or patches. The first step of a run is not timed. The
reference's log-probabilities are computed in every step, as stock TRL does. Prints and writes as JSON (--json FILE)
pairs/s, tokens/s, the share of the machine's matmul rate measured in the same run (MFU), peak memory, the ratio with
its range, and the largest difference of a step's loss.

What shared prompts without padding gain depends on the rows. So several draws of rows are timed (--draws, --seed), and
the ratio of each is printed beside the tokens that stock TRL pads its rows to, over their tokens stored once. Draw k of
seed s has the rows of draw 0 of seed s + k.

Tokens are those of [prompt, chosen, rejected] stored once: padding and repeated prompts do not count. MFU counts 6
floating-point operations per parameter and token: forward, the backward of activations, and the reference's forward.
--profile runs one more step of each trainer under the profiler, after the timed ones, and prints how its time divides.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.training.memory import OUT_OF_MEMORY
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import start

# Real shapes with random weights, for machines without the model: the cost of a step does not depend on the weights.
SHAPES = {
    "gemma-2b": {
        "kind": "Gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
    },
    "llama-3-8b": {
        "kind": "Llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclass
class BenchmarkArguments:
    """Keys of this benchmark."""

    model: str = option("builtin:smollm2-135m-instruct, a hub id or folder, or shape:gemma-2b, shape:llama-3-8b.",
                        "builtin:smollm2-135m-instruct")  # fmt: skip
    tokenizer: str = option("Tokenizer for a shape; its ids must be in the shape's vocabulary.",
                            "builtin:smollm2-135m-instruct")  # fmt: skip
    data: str = option("Preference data in any format of the training script.", "data/quickstart_prefs")
    split: str = option("Split of --data.", "train")
    draws: int = option("Random draws of rows, each with its own ratio.", 3)
    seed: int = option("Seed of the first draw; the next ones count up.", 0)
    steps: int = option("Timed optimizer steps per draw; one untimed step comes before the first draw.", 2)
    rounds: int = option("Runs of each trainer on all draws, alternating.", 1)
    batch: int = option("Pairs per micro-batch.", 2)
    accumulation: int = option("Micro-batches per step.", 4)
    max_length: int = option("Longest sequence in tokens.", 512)
    dtype: str = option("float32 or bfloat16, of weights and arithmetic.", "float32", choices=["float32", "bfloat16"])
    device: str = option("cpu or cuda.", "cpu", choices=["cpu", "cuda"])
    lora_r: int = option("Rank of the LoRA on all seven projections; 0 trains every weight.", 16)
    micro_batch_tokens: int | None = option("Tokens per forward of this project's trainer (default: its choice).")
    profile: bool = option("Also profile one step of each trainer.", False)
    json: str | None = option("Write the figures here.")
    way: str | None = option("Internal: run one trainer and print its figures.", choices=["stock", "ours"])


def load(args):
    """(tokenizer, model) of --model in --dtype."""
    import torch

    from preflab.models.loading import load_model, load_tokenizer

    if not args.model.startswith("shape:"):
        return load_tokenizer(args.model), load_model(args.model, dtype=args.dtype)
    import transformers

    if args.model.removeprefix("shape:") not in SHAPES:
        raise UserError(f"--model {args.model}: no such shape; available: {', '.join(SHAPES)}")
    shape = dict(SHAPES[args.model.removeprefix("shape:")])
    kind = shape.pop("kind")
    torch.manual_seed(0)
    with torch.device(args.device):
        config = getattr(transformers, f"{kind}Config")(**shape, max_position_embeddings=8192, dtype=args.dtype)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return load_tokenizer(args.tokenizer), model


def drawn(rows: int, count: int, seed: int, draws: int) -> list[list[int]]:
    """Indices of `count` rows for each draw, without repeats in a draw.

    Raises:
        UserError: the split has fewer rows.
    """
    if rows < count:
        raise UserError(
            f"the split has {rows} usable rows, a draw needs {count}: lower --steps, --batch or --accumulation"
        )
    return [random.Random(seed + k).sample(range(rows), count) for k in range(draws)]


def one_way(args) -> dict:
    """Train with stock TRL or this project's trainer (--way): seconds, losses and tokens of each draw, and memory."""
    import torch
    from accelerate import PartialState
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from benchmarks.operation_times import time_by_kind
    from preflab.data.preferences import load_pairs, tokenize
    from preflab.models.checks import largest_and_longest
    from preflab.training.dpo_config import DPORunConfig
    from preflab.training.dpo_trainer import ResumableDPOTrainer
    from preflab.training.memory import card_bytes
    from preflab.training.memory_parts import Weights
    from utils.artifacts import RowFile
    from utils.provenance import peak_memory_gib

    class Stock(DPOTrainer):
        """TRL's trainer on tokenised rows, so that both trainers get the same token ids."""

        def _prepare_dataset(self, dataset, *others):
            return dataset

    class Clock(TrainerCallback):
        times, peak, kinds, profiler = [], None, None, None

        def on_step_begin(self, _, state, *others, **named):
            if state.global_step == timed_steps + 1:
                self.profiler = torch.profiler.profile()
                self.profiler.start()

        def on_step_end(self, *others, **named):
            if args.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.monotonic())
            # The profiler itself needs memory, so the profiled step does not count.
            self.peak = self.peak if self.profiler else peak_memory_gib()
            if self.profiler:
                self.profiler.stop()
                wall = self.times[-1] - self.times[-2]
                self.kinds = time_by_kind(self.profiler, args.device, wall)

    PartialState(cpu=args.device == "cpu")
    tokenizer, model = load(args)
    step = args.batch * args.accumulation * PartialState().num_processes
    timed_steps = args.steps * args.draws
    data = load_pairs([{"name": args.data, "split": args.split}], keep_duplicate_prompts=True)
    draws = drawn(len(data.pairs), step * args.steps, args.seed, args.draws)
    # The untimed step and the profiled one compute the first rows again.
    order = [*draws[0][:step], *itertools.chain(*draws), *draws[0][: step * args.profile]]
    data.pairs[:] = [data.pairs[k] for k in order]
    ids, _ = tokenize(data, tokenizer, args.max_length, args.max_length // 2)
    folder = tempfile.mkdtemp()
    settings = dict(
        output_dir=folder, per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulation,
        max_steps=len(order) // step, learning_rate=1e-4, max_length=args.max_length, bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu", gradient_checkpointing=False, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, seed=42, train_sampling_strategy="sequential",
    )  # fmt: skip
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules=linear) if args.lora_r else None
    common = {"train_dataset": ids, "processing_class": tokenizer, "peft_config": peft}
    backbone = sum(p.numel() for p in model.parameters())
    if args.way == "stock":
        trainer = Stock(model, args=DPOConfig(**settings), **common)
    else:
        log = RowFile(Path(folder) / "log.jsonl")
        config = DPORunConfig(**settings, micro_batch_tokens=args.micro_batch_tokens)
        longest = largest_and_longest(ids, ResumableDPOTrainer.SEQUENCES)[1]
        weights = Weights(model.config, args.dtype, peft, reference_beside=peft is None)
        config.choose_micro_batch_tokens(weights, config.largest_row(ids), longest, card_bytes())
        trainer = ResumableDPOTrainer(model, args=config, row_log=log, **common)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    per_draw = []
    for k, seed in enumerate(range(args.seed, args.seed + args.draws)):
        # Step 0 is the untimed one.
        first, end = 1 + k * args.steps, 1 + (k + 1) * args.steps
        times = clock.times[first - 1 : end]
        rows = ids.select(range(step * first, step * end))
        per_draw.append({
            "seed": seed,
            "seconds": times[-1] - times[0],
            "step_seconds": [after - before for before, after in itertools.pairwise(times)],
            "pairs": len(rows),
            "tokens": sum(len(row[f"{part}_ids"]) for row in rows for part in ("prompt", "chosen", "rejected")),
            "padded_tokens": padded(rows, args.batch),
            "losses": losses[first:end],
        })  # fmt: skip
    return {
        "draws": per_draw,
        **{name: sum(draw[name] for draw in per_draw) for name in ("seconds", "pairs", "tokens", "padded_tokens")},
        "parameters": backbone,
        "peak_memory_gib": clock.peak,
        "time_by_kind": clock.kinds,
        "padded_because": getattr(trainer, "padded_because", None),
        "micro_batch_tokens": getattr(trainer.args, "micro_batch_tokens", None),
    }


def padded(rows, batch: int) -> int:
    """Tokens of the padded computation: 2 × pairs × longest of each micro-batch."""
    longest = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    return sum(2 * len(part) * max(part) for part in (longest[k : k + batch] for k in range(0, len(longest), batch)))


def child(way: str) -> dict:
    """The figures of one run, in its own process."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], capture_output=True, text=True)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        if not last or not last[0].startswith("error: "):
            sys.stderr.write(done.stderr)
        raise UserError(f"the {way} run failed: {' '.join(last).removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    stage, args = start("train_throughput", __doc__, BenchmarkArguments)
    if args.way:
        measured = one_way(args)
        return print(json.dumps(measured)) if is_main_process() else None
    for key in ("draws", "steps", "rounds", "batch", "accumulation", "max_length"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")

    from preflab.training.throughput import matmul_rate
    from utils.artifacts import write_json
    from utils.provenance import run_record

    runs = {"stock": [], "ours": []}
    rates = [matmul_rate(args.dtype, args.device)]
    for number in range(args.rounds):
        # Alternate the order too, so that a machine that warms up favours neither.
        for way in sorted(runs, reverse=number % 2 == 0):
            runs[way].append(child(way))
            print(f"round {number + 1}, {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr)
            rates.append(matmul_rate(args.dtype, args.device))
    # The highest of the run: other work on the machine can only lower it.
    result = compare(runs, max(rates))
    print_result(result, args.rounds)
    if args.json:
        write_json(args.json, {**result, "args": {**args.__dict__, "json": None}, "run": run_record(42, stage.seconds)})


def compare(runs: dict[str, list[dict]], rate: float) -> dict:
    """Ratio of the times, largest difference of losses, and the figures of each draw and of each trainer.

    Args:
        runs: from `one_way`, by trainer ("stock", "ours"), one per round. rate: of this machine's matrix products,
            FLOP/s.
    """
    draws = [
        compare_draw({way: [run["draws"][k] for run in measured] for way, measured in runs.items()})
        for k in range(len(runs["stock"][0]["draws"]))
    ]
    seconds = {way: sum(run["seconds"] for run in measured) for way, measured in runs.items()}
    first = runs["stock"][0]
    return {
        "ratio": seconds["stock"] / seconds["ours"],
        "ratio_min": min(draw["ratio_min"] for draw in draws),
        "ratio_max": max(draw["ratio_max"] for draw in draws),
        "max_loss_difference": max(draw["max_loss_difference"] for draw in draws),
        **{name: first[name] for name in ("pairs", "tokens", "padded_tokens")},
        "padded_over_stored_once": first["padded_tokens"] / first["tokens"],
        "matmul_rate": rate,
        "draws": draws,
        "ways": {way: figures(measured, rate) for way, measured in runs.items()},
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
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "max_loss_difference": max(abs(a - b) for a, b in losses),
        "step_seconds": {way: [run["step_seconds"] for run in measured] for way, measured in rounds.items()},
        "losses": {way: measured[0]["losses"] for way, measured in rounds.items()},
    }


def print_result(result: dict, rounds: int) -> None:
    """Print the comparison: a line per draw, then the totals."""
    for draw in [*result["draws"], result]:
        name = f"draw {draw['seed']}" if "seed" in draw else "together"
        spread = f" ({draw['ratio_min']:.2f} to {draw['ratio_max']:.2f})"
        print(
            f"{name:<9} {draw['pairs']:4} pairs  {draw['tokens']:6} tokens stored once"
            f"  padded over stored {draw['padded_over_stored_once']:.2f}"
            f"  ratio {draw['ratio']:.2f}{spread if rounds > 1 or draw is result else ''}"
        )
    for way, m in result["ways"].items():
        speed = f"{m['pairs_per_second']:7.3f} pairs/s  {m['tokens_per_second']:8.0f} tokens/s"
        print(f"  {way:<6} {speed}  MFU {m['mfu']:.1%}  peak {max(m['peak_memory_gib'].values()):.2f} GiB")
    print(f"matrix products at {result['matmul_rate'] / 1e9:.0f} GFLOP/s")
    print(f"largest difference of a step's loss {result['max_loss_difference']:.2g}")
    for way, m in result["ways"].items():
        if m["time_by_kind"]:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in m["time_by_kind"].items())
            print(f"one step of {way}: {shares}")


def figures(runs: list[dict], rate: float) -> dict:
    """Speed and memory of one trainer over its runs."""
    from preflab.training.throughput import model_flops

    seconds, first = sum(run["seconds"] for run in runs), runs[0]
    tokens = first["tokens"] * len(runs)
    return {
        "seconds": [run["seconds"] for run in runs],
        "pairs_per_second": first["pairs"] * len(runs) / seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": model_flops(first["parameters"], tokens) / seconds / rate,
        "peak_memory_gib": {k: max(run["peak_memory_gib"][k] for run in runs) for k in first["peak_memory_gib"]},
        "time_by_kind": first["time_by_kind"],
        "micro_batch_tokens": first["micro_batch_tokens"],
        "padded_because": first["padded_because"],
    }


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
