"""How fast is a reward model's training, compared with an unmodified TRL RewardTrainer?

    python benchmarks/reward_throughput.py                             # SmolLM2, the shipped pairs, float32, CPU
    python benchmarks/reward_throughput.py --dtype bfloat16 --lora_r 0

As benchmarks/train_throughput.py: the same model with the same new reward layer, the same token ids in the same order;
each trainer in its own process, alternating; the first step is not timed. Prints pairs/s, peak memory, the ratio of
each draw of rows beside the tokens that stock TRL pads them to, and the largest difference of a step's loss.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_throughput import compare, print_result
from preflab.training.memory import OUT_OF_MEMORY
from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start


@dataclass
class BenchmarkArguments:
    """Keys of this benchmark."""

    model: str = option("Hub id, folder or builtin model.", "builtin:smollm2-135m-instruct")
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
    json: str | None = option("Write the figures here.")
    way: str | None = option("Internal: run one trainer and print its figures.", choices=["stock", "ours"])


def one_way(args) -> dict:
    """Train with stock TRL or this project's trainer (--way): seconds, losses and tokens of each draw, and memory."""
    from accelerate import PartialState
    from peft import LoraConfig
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from benchmarks.timed_training import TOTALS, Clock, drawn, part_of_run
    from preflab.data.preferences import load_pairs, tokenize
    from preflab.models.loading import load_model, load_tokenizer
    from preflab.training.reward_config import RewardRunConfig
    from preflab.training.reward_trainer import ResumableRewardTrainer
    from utils.artifacts import RowFile

    PartialState(cpu=args.device == "cpu")
    # The reward layer of a language model is drawn while loading.
    set_seed(42)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype=args.dtype, reward=True)
    step = args.batch * args.accumulation
    data = load_pairs([{"name": args.data, "split": args.split}], keep_duplicate_prompts=True)
    draws = drawn(len(data.pairs), step * args.steps, args.seed, args.draws)
    # The untimed step computes the first rows again.
    order = [*draws[0][:step], *itertools.chain(*draws)]
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
    peft = None
    if args.lora_r:
        peft = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules=linear, task_type="SEQ_CLS")
    backbone = sum(p.numel() for p in model.parameters())
    common = {"processing_class": tokenizer, "peft_config": peft}
    if args.way == "stock":
        # TRL's own layout of tokenised rows.
        rows = ids.map(
            lambda row: {f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")},
            remove_columns=["prompt_ids"],
        )
        trainer = RewardTrainer(model, args=RewardConfig(**settings), train_dataset=rows, **common)
    else:
        log = RowFile(Path(folder) / "log.jsonl")
        trainer = ResumableRewardTrainer(
            model, args=RewardRunConfig(**settings), train_dataset=ids, eval_dataset=None, row_log=log, **common
        )
    clock = Clock(args.device, profiles=False)
    trainer.add_callback(clock)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    # Step 0 is the untimed one.
    per_draw = [
        part_of_run(args, args.seed + k, clock, losses, ids, 1 + k * args.steps, 1 + (k + 1) * args.steps)
        for k in range(args.draws)
    ]
    return {
        "draws": per_draw,
        **{name: sum(draw[name] for draw in per_draw) for name in TOTALS},
        "parameters": backbone,
        "peak_memory_gib": clock.peak,
        "time_by_kind": None,
        "padded_because": getattr(trainer, "padded_because", None),
        "micro_batch_tokens": getattr(trainer.args, "micro_batch_tokens", None),
    }


def child(way: str) -> dict:
    """The figures of one run, in its own process."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise UserError(f"the {way} run failed")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    stage, args = start("reward_throughput", __doc__, BenchmarkArguments)
    if args.way:
        return print(json.dumps(one_way(args)))
    for key in ("draws", "steps", "rounds", "batch", "accumulation", "max_length"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")

    from preflab.training.throughput import matmul_rate
    from utils.artifacts import write_json
    from utils.provenance import run_record

    runs, rates = {"stock": [], "ours": []}, [matmul_rate(args.dtype, args.device)]
    for number in range(args.rounds):
        for way in sorted(runs, reverse=number % 2 == 0):
            runs[way].append(child(way))
            print(f"round {number + 1}, {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr)
            rates.append(matmul_rate(args.dtype, args.device))
    result = compare(runs, max(rates), "reward")
    print_result(result, args.rounds)
    if args.json:
        write_json(args.json, {**result, "args": {**args.__dict__, "json": None}, "run": run_record(42, stage.seconds)})


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
