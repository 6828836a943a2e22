"""Timed training runs of benchmarks/train_throughput.py, one per process."""

import itertools
import random
import tempfile
import time
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.operation_times import time_by_kind
from benchmarks.shapes import LINEAR, SHAPES, config_of
from preflab.data import conversations, preferences
from preflab.models.checks import largest_and_longest
from preflab.training.dpo_config import DPORunConfig
from preflab.training.dpo_trainer import ResumableDPOTrainer
from preflab.training.memory import card_bytes
from preflab.training.memory_parts import Weights
from preflab.training.reward_config import RewardRunConfig
from preflab.training.reward_trainer import ResumableRewardTrainer
from preflab.training.sft_config import SFTRunConfig
from preflab.training.sft_trainer import ResumableSFTTrainer
from utils.artifacts import RowFile
from utils.errors import UserError
from utils.provenance import peak_memory_gib

# Figures of a draw that are summed over a run.
TOTALS = ("seconds", "processor_seconds", "pairs", "tokens", "padded_tokens")


def load(args):
    """(tokenizer, model) of --model in --dtype; a reward model's has a new reward layer."""
    from preflab.models.loading import load_model, load_tokenizer

    # The reward layer is drawn while loading: every run draws the same one.
    transformers.set_seed(42)
    reward = args.stage == "reward"
    if not args.model.startswith("shape:"):
        return load_tokenizer(args.model), load_model(args.model, dtype=args.dtype, reward=reward)
    name = args.model.removeprefix("shape:")
    if name not in SHAPES:
        raise UserError(f"--model {args.model}: no such shape; available: {', '.join(SHAPES)}")
    torch.manual_seed(0)
    # Random weights, for machines without the model: the cost of a step does not depend on them.
    with torch.device(args.device):
        config = config_of(name, dtype=args.dtype, **({"num_labels": 1} if reward else {}))
        kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
        model = kind.from_config(config, dtype=getattr(torch, args.dtype))
    return load_tokenizer(args.tokenizer), model


class StockDPO(DPOTrainer):
    """TRL's trainer on tokenised rows, so that both trainers get the same token ids."""

    def _prepare_dataset(self, dataset, *others):
        return dataset


# TRL's trainer and config of each stage.
STOCK = {"dpo": (StockDPO, DPOConfig), "sft": (SFTTrainer, SFTConfig), "reward": (RewardTrainer, RewardConfig)}


def complete_sequences(ids):
    """Pairs in the layout of TRL's RewardTrainer: each answer with its prompt."""
    return ids.map(
        lambda row: {f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")},
        remove_columns=["prompt_ids"],
    )


class Clock(TrainerCallback):
    """Times of the ends of steps, peak memory, and the profile of the last of `steps` steps if `profiles`."""

    def __init__(self, device: str, profiles: bool):
        self.device, self.profiles = device, profiles
        self.times, self.processor, self.peak, self.kinds, self.profiler = [], [], None, None, None

    def on_step_begin(self, _, state, *others, **named):
        if self.profiles and state.global_step == state.max_steps - 1:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, *others, **named):
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        self.processor.append(time.process_time())
        # The profiler itself needs memory, so the profiled step does not count.
        self.peak = self.peak if self.profiler else peak_memory_gib()
        if self.profiler:
            self.profiler.stop()
            self.kinds = time_by_kind(self.profiler, self.device, self.times[-1] - self.times[-2])


def draw_rows(args, tokenizer, step: int):
    """The tokenised rows of a run: those of the untimed step, of every draw, and of the profiled step.

    Args:
        step: rows of an optimizer step.
    """
    source = [{"name": args.data, "split": args.split}]
    if args.stage != "sft":
        data = preferences.load_pairs(source, keep_duplicate_prompts=True)
        data.pairs[:] = [data.pairs[k] for k in order_of(args, len(data.pairs), step)]
        return preferences.tokenize(data, tokenizer, args.max_length, args.max_length // 2)[0]
    data = conversations.load_conversations(source)
    # Conversations without a labelled token within max_length are dropped here, so the draw comes afterwards.
    ids, _ = conversations.tokenize(data, tokenizer, "responses", args.max_length)
    return ids.select(order_of(args, len(ids), step)).select_columns(["input_ids", "labels"])


def order_of(args, rows: int, step: int) -> list[int]:
    """Indices of the rows of a run. The untimed and the profiled step compute the first rows of the first draw."""
    draws = drawn(rows, step * args.steps, args.seed, args.draws)
    return [*draws[0][:step], *itertools.chain(*draws), *draws[0][: step * args.profile]]


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


def make_trainer(args, tokenizer, model, ids, steps: int):
    """The trainer of --way on tokenised rows, for `steps` steps (-1: one epoch)."""
    packed = args.way.endswith("-packed")
    own = not args.way.startswith("stock")
    folder = tempfile.mkdtemp()
    settings = dict(
        output_dir=folder, per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulation,
        max_steps=steps, num_train_epochs=1, learning_rate=1e-4, max_length=args.max_length,
        bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", gradient_checkpointing=False, save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True, seed=42, train_sampling_strategy="sequential",
        **({"packing": packed} if args.stage == "sft" else {}),
        **({"compile_layers": args.way == "compiled"} if own else {}),
    )  # fmt: skip
    peft = None
    if args.lora_r:
        task = {"task_type": "SEQ_CLS"} if args.stage == "reward" else {}
        peft = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules=LINEAR, **task)
    common = {"train_dataset": ids, "processing_class": tokenizer, "peft_config": peft}
    if not own:
        if args.stage == "reward":
            common["train_dataset"] = complete_sequences(ids)
        kind, config = STOCK[args.stage]
        return kind(model, args=config(**settings), **common)
    common["row_log"] = RowFile(Path(folder) / "log.jsonl")
    if args.stage == "sft":
        return ResumableSFTTrainer(model, args=SFTRunConfig(**settings), **common)
    if args.stage == "reward":
        return ResumableRewardTrainer(model, args=RewardRunConfig(**settings), eval_dataset=None, **common)
    config = DPORunConfig(**settings, micro_batch_tokens=args.micro_batch_tokens)
    longest = largest_and_longest(ids, ResumableDPOTrainer.SEQUENCES)[1]
    weights = Weights(model.config, args.dtype, peft, reference_beside=peft is None)
    config.choose_micro_batch_tokens(weights, config.largest_row(ids), longest, card_bytes())
    return ResumableDPOTrainer(model, args=config, **common)


def one_way(args) -> dict:
    """Train as --way says: seconds, losses and tokens of each draw, and memory."""
    PartialState(cpu=args.device == "cpu")
    tokenizer, model = load(args)
    parameters = sum(p.numel() for p in model.parameters())
    step = args.batch * args.accumulation * PartialState().num_processes
    ids = draw_rows(args, tokenizer, step)
    packed = args.way.endswith("-packed")
    trainer = make_trainer(args, tokenizer, model, ids, -1 if packed else len(ids) // step)
    clock = Clock(args.device, args.profile)
    trainer.add_callback(clock)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if packed:
        # Packed rows mix the draws, so all steps but the first are one.
        parts = [(None, 1, len(clock.times) - args.profile, trainer.train_dataset)]
    else:
        # Step 0 is the untimed one.
        parts = [(args.seed + k, 1 + k * args.steps, 1 + (k + 1) * args.steps, ids) for k in range(args.draws)]
    per_draw = [part_of_run(args, seed, clock, losses, rows, first, end) for seed, first, end, rows in parts]
    return {
        "draws": per_draw,
        **{name: sum(draw[name] for draw in per_draw) for name in TOTALS},
        "parameters": parameters,
        "peak_memory_gib": clock.peak,
        "time_by_kind": clock.kinds,
        "padded_because": getattr(trainer, "padded_because", None),
        "micro_batch_tokens": getattr(trainer.args, "micro_batch_tokens", None),
    }


def part_of_run(args, seed, clock: Clock, losses: list[float], dataset, first: int, end: int) -> dict:
    """Figures of steps first to end of a run, on rows of `dataset`. Step 0 is the untimed one."""
    times = clock.times[first - 1 : end]
    step = args.batch * args.accumulation * PartialState().num_processes
    rows = dataset.select(range(step * first, min(step * end, len(dataset))))
    return {
        "seed": seed,
        "seconds": times[-1] - times[0],
        # Of all threads of this process: other work on the machine hardly changes it.
        "processor_seconds": clock.processor[end - 1] - clock.processor[first - 1],
        "step_seconds": [after - before for before, after in itertools.pairwise(times)],
        "pairs": len(rows),
        "tokens": sum(map(stored_tokens, rows)),
        "padded_tokens": padded(rows, args.batch),
        "losses": losses[first:end],
    }


def stored_tokens(row: dict) -> int:
    """Tokens of a row: a pair's with its prompt once, or a conversation's or packed row's."""
    return sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids") if name in row)


def padded(rows, batch: int) -> int:
    """Tokens of the padded computation: rows (of a pair: two) × longest of each micro-batch."""
    pairs = "prompt_ids" in rows.column_names

    def longest(row):
        if not pairs:
            return len(row["input_ids"])
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    lengths = [longest(row) for row in rows]
    parts = (lengths[k : k + batch] for k in range(0, len(lengths), batch))
    return (1 + pairs) * sum(len(part) * max(part) for part in parts)
