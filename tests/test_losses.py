"""The trainer against stock TRL: same rows, same order, every loss, step by step."""

import json

import pytest
from conftest import make_pairs, write_jsonl
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from preflab.data.preferences import load_pairs, tokenize
from preflab.models.loading import load_model, load_tokenizer
from preflab.training.dpo_trainer import TRL_LOSSES, PreferenceConfig, PreferenceTrainer

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
    args = PreferenceConfig(str(tmp_path / "ours"), loss_type=[loss_type], **{**SETTINGS, **extra})
    log = RowFile(tmp_path / "log.jsonl")
    trainer = PreferenceTrainer(
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


def assert_equal(mine: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for key in KEYS:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["step"], key)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_every_loss_trains_as_stock_trl(loss_type, tiny, tmp_path):
    rows = make_pairs(24)
    assert_equal(ours(tiny, loss_type, tmp_path, rows), stock(tiny, loss_type, tmp_path, rows))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_and_still_after_20_steps(loss_type, tiny, tmp_path):
    rows, longer = make_pairs(24), {"max_steps": 20, "learning_rate": 1e-3}
    mine = ours(tiny, loss_type, tmp_path, rows, **longer)
    assert len(mine) == 20
    assert_equal(mine, stock(tiny, loss_type, tmp_path, rows, **longer))


def test_softcapped_gemma_2_trains_as_stock_trl(tiny_gemma2, tmp_path):
    rows = make_pairs(24)
    assert_equal(ours(tiny_gemma2, "sigmoid", tmp_path, rows), stock(tiny_gemma2, "sigmoid", tmp_path, rows))


def test_the_list_of_losses_is_trls():
    """TRL names its losses in the error that an unknown one raises."""
    import inspect
    import re

    source = inspect.getsource(DPOTrainer._compute_loss)
    named = set(re.findall(r'loss_type == "(\w+)"', source))
    assert named == set(TRL_LOSSES)
