"""Stock TRL and this project's trainer on the same rows, step by step."""

import json

import pytest
from conftest import write_jsonl
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from preflab.data.preferences import load_pairs, tokenize
from preflab.models.loading import load_model, load_tokenizer
from preflab.training.dpo_config import DPORunConfig
from preflab.training.dpo_trainer import ResumableDPOTrainer

SETTINGS = dict(
    per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-2, beta=0.5, seed=7,
    gradient_checkpointing=False, report_to="none", logging_steps=1, save_strategy="no", max_length=256, use_cpu=True,
    label_smoothing=0.1, disable_tqdm=True,
)  # fmt: skip


KEYS = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "entropy")


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def steps(trainer) -> list[dict]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def stock(folder, loss_type: str, tmp_path, rows, **extra) -> list[dict]:
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    # Stock means stock: undo what fused_head.install changed in this process.
    trl.trainer.utils._use_triton = trl.kernels.chunked_logprob._use_triton
    trl.trainer.utils._ChunkedLogProbFunction = trl.kernels.ChunkedLogProbFunction
    tokenizer = load_tokenizer(str(folder))
    data = [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in rows]
    args = DPOConfig(str(tmp_path / "stock"), loss_type=[loss_type], bf16=False, **{**SETTINGS, **extra})
    return steps(
        DPOTrainer(
            load_model(str(folder)),
            args=args,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=lora(),
        )  # fmt: skip
    )


def ours(folder, loss_type: str, tmp_path, rows, **extra) -> list[dict]:
    from utils.artifacts import RowFile

    tokenizer = load_tokenizer(str(folder))
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, _ = tokenize(data, tokenizer, 256, 128)
    args = DPORunConfig(str(tmp_path / "ours"), loss_type=[loss_type], **{**SETTINGS, **extra})
    log = RowFile(tmp_path / "log.jsonl")
    trainer = ResumableDPOTrainer(
        load_model(str(folder)),
        args=args,
        train_dataset=ids,
        processing_class=tokenizer,
        peft_config=lora(),
        row_log=log,
    )
    history = steps(trainer)
    logged = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["loss"] for row in logged] == [row["loss"] for row in history]
    return history


def trainer_of(tiny, tmp_path, rows=None, **settings):
    """A trainer on tokenised rows (default: one pair), not started."""
    from utils.artifacts import RowFile

    rows = rows or [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}]
    return ResumableDPOTrainer(
        load_model(str(tiny)),
        args=DPORunConfig(str(tmp_path), **{**SETTINGS, "label_smoothing": 0.0, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(tiny)),
        peft_config=lora(),
        row_log=RowFile(tmp_path / "log.jsonl"),
    )


def assert_equal(own_steps: list[dict], stock_steps: list[dict]) -> None:
    for a, b in zip(own_steps, stock_steps, strict=True):
        for key in KEYS:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["step"], key)
