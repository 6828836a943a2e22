"""Does the planned memory of a training step agree with the measured one?

    python benchmarks/plan_check.py                       # ten configurations, CPU, about 5 minutes
    python benchmarks/plan_check.py --only gemma --json plan_check.json

Random models of different shapes take two optimizer steps on random token ids, each in its own process. Measured is
the peak of the process's resident memory during training, minus what it had after a training step of a tiny model, so
that libraries and threads do not count. Planned is `preflab.training.memory.needed`, which reads the model's config
only. Prints both, with the plan's parts.
"""

import ctypes
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.child import figures_of_child
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import start
from utils.tables import render


@dataclass(frozen=True)
class Case:
    """A configuration: a model's shape, and how it is trained.

    Attributes:
        pair: tokens of prompt, chosen and rejected answer of every pair; (length, trained on) of a conversation.
        lora: its rank, 0 trains every weight.
    """

    kind: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    pair: tuple[int, ...]
    batch: int
    accumulation: int = 1
    lora: int = 16
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    tied: bool = True

    def shape(self) -> dict:
        """Keys of transformers' config."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_heads,
            "head_dim": self.hidden // self.heads, "vocab_size": self.vocabulary, "tie_word_embeddings": self.tied,
        }  # fmt: skip


# Of each case the peak is at least some hundred MiB, so that the allocator's rounding is small beside it.
PAIR = (200, 150, 162)
CASES = {
    "llama LoRA": Case("Llama", 256, 704, 10, 4, 2, 49152, PAIR, 2),
    "llama LoRA, long": Case("Llama", 256, 704, 8, 4, 2, 49152, (600, 700, 724), 1),
    "llama LoRA, bf16 over float32": Case("Llama", 384, 1024, 8, 6, 2, 49152, PAIR, 2, bf16=True),
    "llama LoRA, bf16 weights": Case("Llama", 384, 1024, 8, 6, 2, 49152, PAIR, 4, dtype="bfloat16", bf16=True),
    "llama LoRA, checkpointing": Case("Llama", 384, 1024, 12, 6, 2, 49152, (300, 350, 374), 2, checkpointing=True),
    "llama full": Case("Llama", 256, 704, 8, 4, 4, 49152, PAIR, 2, lora=0, tied=False),
    "llama full, bf16, checkpointing": Case("Llama", 256, 704, 10, 4, 4, 49152, PAIR, 4, lora=0, bf16=True,
                                            checkpointing=True),
    "gemma LoRA": Case("Gemma", 256, 2048, 6, 4, 1, 128000, PAIR, 2, accumulation=2),
    "qwen3 SFT, full": Case("Qwen3", 256, 768, 8, 4, 2, 49152, (512, 400), 2, lora=0, accumulation=2),
    "gemma2 SFT, LoRA, bf16": Case("Gemma2", 256, 1024, 8, 4, 2, 64000, (512, 400), 2, bf16=True),
}  # fmt: skip
# Tokens of the largest forward, pairs and their parts in a step, and the measured peak in GiB (torch's allocator).
RECORDED = {
    "gemma-2b LoRA on an H200, a step in one forward": (8192, 8, (152, 250, 250), 20.05),
    "gemma-2b LoRA on an H200, 2,048 tokens together": (2048, 8, (152, 250, 250), 10.84),
}


@dataclass
class CheckArguments:
    """Keys of this benchmark."""

    recorded: bool = option("Plan the recorded GPU runs instead.", False)
    only: str | None = option("Only the configurations whose name contains this.")
    json: str | None = option("Write the figures here.")
    case: str | None = option("Internal: measure one configuration and print its figures.")
    instrument: str = option(
        "rss: peak resident memory. tensors: the largest sum of live tensors, without the allocator's overhead."
        " heap: the growth of the free pieces in glibc's heap at the peak.",
        "rss",
        choices=["rss", "tensors", "heap"],
    )


def measure(case: Case, instrument: str) -> dict:
    """Planned parts and measured peak of one configuration, in bytes."""
    if instrument != "tensors":
        make_trainer(Case("Llama", 64, 128, 2, 2, 2, 49152, case.pair, 1), tempfile.mkdtemp()).train()
    before, free_before = resident("VmRSS"), free_in_heap()
    trainer = make_trainer(case, tempfile.mkdtemp())
    planned = plan(case, trainer)
    if instrument != "rss":
        from preflab.training.traced_memory import Live

        weights = [tensor for model in models(trainer) for tensor in (*model.parameters(), *model.buffers())]
        stored = {tensor.untyped_storage(): tensor.untyped_storage().nbytes() for tensor in weights}

        class Watched(Live):
            """Notes the free pieces whenever the live tensors have a new peak."""

            def __torch_dispatch__(self, *args):
                peak, results = self.peak, super().__torch_dispatch__(*args)
                if self.peak > peak:
                    self.free = free_in_heap()
                return results

        with Watched(weights) as live:
            trainer.train()
        if instrument == "heap":
            return {"planned": {**planned, "total": planned["holes"]}, "measured": live.free - free_before}
        return {"planned": planned, "measured": live.peak + sum(stored.values())}
    # Linux: 5 sets the peak back to the present use.
    Path("/proc/self/clear_refs").write_text("5")
    trainer.train()
    return {"planned": planned, "measured": resident("VmHWM") - before}


def models(trainer) -> list:
    """The policy, and the reference beside it where there is one."""
    reference = getattr(trainer, "ref_model", None)
    return [trainer.model, *([reference] if reference is not None else [])]


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2 (malloc.h, since 2.33)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def free_in_heap() -> int:
    """Bytes of the free pieces in the heap of this process; 0 where libc is not glibc."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = MallocInfo
    return function().fordblks


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def plan(case: Case, trainer) -> dict:
    """The planned parts, from the config alone."""
    from preflab.training.memory_parts import Weights

    config = trainer.args
    weights = Weights(
        model_config(case), case.dtype, lora(case), reference_beside=len(case.pair) == 3 and not case.lora
    )
    longest = case.pair[0] + max(case.pair[1:]) if len(case.pair) == 3 else case.pair[0]
    memory = config.memory(weights, case.pair, longest, checkpointing=case.checkpointing, alike=True)
    return {**asdict(memory), "total": memory.total}


def model_config(case: Case):
    """transformers' config of a case."""
    import transformers

    return getattr(transformers, f"{case.kind}Config")(**case.shape(), max_position_embeddings=4096)


def lora(case: Case):
    """PEFT's config of a case, None where every weight is trained."""
    from peft import LoraConfig

    from benchmarks.shapes import LINEAR

    # In SFT, TRL leaves the dropout on.
    return LoraConfig(r=case.lora, lora_alpha=2 * case.lora, target_modules=LINEAR) if case.lora else None


def make_trainer(case: Case, folder: str):
    """This project's trainer of random token ids, for two steps."""
    import torch
    import transformers
    from datasets import Dataset

    from preflab.models.loading import load_tokenizer
    from preflab.training.dpo_config import DPORunConfig
    from preflab.training.dpo_trainer import ResumableDPOTrainer
    from preflab.training.sft_config import SFTRunConfig
    from preflab.training.sft_trainer import ResumableSFTTrainer
    from utils.artifacts import RowFile

    pairs, steps, dtype = len(case.pair) == 3, 2, getattr(torch, case.dtype)
    settings = dict(
        output_dir=folder, per_device_train_batch_size=case.batch, gradient_accumulation_steps=case.accumulation,
        max_steps=steps, learning_rate=1e-4, max_length=4096, bf16=case.bf16, use_cpu=True,
        gradient_checkpointing=case.checkpointing, save_strategy="no", report_to="none", disable_tqdm=True, seed=42,
    )  # fmt: skip
    torch.manual_seed(0)
    rows = steps * case.batch * case.accumulation

    def ids(count):
        return torch.randint(1000, 40000, (rows, count)).tolist()

    def model():
        return transformers.AutoModelForCausalLM.from_config(model_config(case), dtype=dtype)

    if pairs:
        columns = {f"{part}_ids": ids(n) for part, n in zip(("prompt", "chosen", "rejected"), case.pair, strict=True)}
        settings |= {
            "micro_batch_tokens": sum(case.pair) * case.batch,
            "max_prompt_length": 2048,
            "reference_cache": False,
        }
    else:
        columns = {"input_ids": ids(case.pair[0])}
        first = case.pair[0] - case.pair[1]
        columns["labels"] = [[-100] * first + row[first:] for row in columns["input_ids"]]
    kind, config = (ResumableDPOTrainer, DPORunConfig) if pairs else (ResumableSFTTrainer, SFTRunConfig)
    reference = {"ref_model": model()} if pairs and not case.lora else {}
    return kind(
        model=model(),
        args=config(**settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=load_tokenizer("builtin:smollm2-135m-instruct"),
        peft_config=lora(case),
        row_log=RowFile(Path(folder) / "log.jsonl"),
        **reference,
    )


def recorded() -> dict:
    """Planned parts of the recorded GPU runs, beside their measured peaks, in bytes."""
    from benchmarks.shapes import config_of
    from preflab.training.memory import needed
    from preflab.training.memory_parts import Weights, packed_rows

    weights = Weights(config_of("gemma-2b"), "bfloat16", lora(CASES["llama LoRA"]))
    args, results = SimpleNamespace(precision="bf16", optim="adamw_torch_fused"), {}
    for name, (budget, pairs, pair, measured) in RECORDED.items():
        batch = packed_rows(pair, budget, pairs)
        accumulates = batch.tokens < pairs * sum(pair)
        memory = needed(weights, args, batch, accumulates, checkpointing=False, reference_in_step=True, cuda=True)
        results[name] = {"planned": {**asdict(memory), "total": memory.total}, "measured": measured * 2**30}
    return results


def main():
    stage, args = start("plan_check", __doc__, CheckArguments)
    if args.case:
        return print(json.dumps(measure(CASES[args.case], args.instrument))) if is_main_process() else None
    if args.recorded:
        return print(table(recorded(), "torch's allocator"))
    chosen = [name for name in CASES if args.only is None or args.only in name]
    if not chosen:
        raise UserError(f"--only {args.only}: no such configuration; choose from {', '.join(CASES)}")
    results = {}
    for name in chosen:
        results[name] = figures_of_child([__file__, *sys.argv[1:], "--case", name], name)
        print(f"{name}: measured {results[name]['measured'] / 2**20:.0f} MiB", file=sys.stderr)
    print(table(results, args.instrument))
    if args.json:
        from utils.artifacts import write_json
        from utils.provenance import run_record

        write_json(args.json, {"results": results, "run": run_record(42, stage.seconds)})


def table(results: dict, instrument: str) -> str:
    """Planned beside measured memory in MiB. Weights with the reference's; training: gradients and optimizer state."""
    columns = {
        "weights": ("weights", "reference"), "training": ("gradients", "optimizer"), "activations": ("activations",),
        "heap": ("holes",), "kernels": ("kernels",),
    }  # fmt: skip
    lines = [("configuration", *columns, "planned", "measured", "ratio")]
    for name, result in results.items():
        planned, measured = result["planned"], result["measured"]
        figures = [sum(planned[part] for part in parts) for parts in columns.values()]
        sizes = [f"{value / 2**20:,.0f}" for value in (*figures, planned["total"], measured)]
        lines.append((name, *sizes, f"{planned['total'] / measured:.2f}"))
    what = {"rss": "peak resident memory", "tensors": "most live tensors", "heap": "holes"}.get(instrument, instrument)
    return render(f"planned and measured memory of training in MiB ({what})", lines)


if __name__ == "__main__":
    run(main)
