"""sft_train_instruction.py: TRL's losses, packing that changes none, artifacts, resume, and what it refuses."""

import json

import pytest
import torch
from conftest import ROOT, assert_one_line, interrupted_at, make_pairs, write_jsonl
from datasets import Dataset
from helpers import instructions, sft_args
from peft import LoraConfig
from transformers import AutoConfig
from trl import SFTConfig, SFTTrainer

from preflab.data.conversations import load_conversations, tokenize
from preflab.models.fast import shared_prompt
from preflab.models.loading import load_model, load_tokenizer
from preflab.training.held_out import heldout_metrics
from preflab.training.sft_config import SFTRunConfig
from preflab.training.sft_report import verdict_of
from preflab.training.sft_trainer import ResumableSFTTrainer
from utils.artifacts import RowFile, read_json


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with train.jsonl (32 rows)."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "train.jsonl", instructions(32))
    return folder


@pytest.fixture
def sft(call):
    """Run sft_train_instruction.py in this process; returns (exit code, stdout, stderr)."""
    return lambda *args: call("sft_train_instruction", *args)


def log(folder, split="train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "out/r/train_log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


# ----------------------------------------------------------------------------------------------------------------- TRL

SETTINGS = dict(
    per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=5, learning_rate=1e-2, seed=7,
    gradient_checkpointing=False, report_to="none", logging_steps=1, save_strategy="no", max_length=96, use_cpu=True,
    disable_tqdm=True,
)  # fmt: skip
KEYS = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def history(trainer) -> list[dict]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def stock(folder, data: list[dict], **extra) -> list[dict]:
    """TRL's trainer on the same conversations, rendered, tokenised and masked by TRL itself."""
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    trl.trainer.utils._use_triton = trl.kernels.chunked_logprob._use_triton
    trl.trainer.utils._ChunkedLogProbFunction = trl.kernels.ChunkedLogProbFunction
    args = SFTConfig(str(folder / "stock"), bf16=False, **{**SETTINGS, **extra})
    model = load_model(str(folder))
    tokenizer = load_tokenizer(str(folder))
    common = {"processing_class": tokenizer, "peft_config": lora()}
    return history(SFTTrainer(model, args=args, train_dataset=Dataset.from_list(data), **common))


def ours(folder, path, tmp_path, loss_on="responses", **extra) -> list[dict]:
    tokenizer = load_tokenizer(str(folder))
    data = load_conversations([{"name": str(path), "split": "train"}])
    ids, _ = tokenize(data, tokenizer, loss_on, SETTINGS["max_length"])
    args = SFTRunConfig(str(tmp_path / "ours"), **{**SETTINGS, **extra})
    trainer = ResumableSFTTrainer(
        model=load_model(str(folder)),
        args=args,
        train_dataset=ids,
        processing_class=tokenizer,
        peft_config=lora(),
        row_log=RowFile(tmp_path / "log.jsonl"),
    )
    return history(trainer)


@pytest.mark.parametrize("loss_on", ["responses", "everything"])
def test_sft_matches_stock_trl(loss_on, tiny, tmp_path):
    pairs = make_pairs(30)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": r["chosen"]} for r in pairs])
    if loss_on == "responses":
        stock_rows = [{"prompt": r["chosen"][:1], "completion": r["chosen"][1:]} for r in pairs]
    else:
        stock_rows = [{"messages": r["chosen"]} for r in pairs]
    for a, b in zip(ours(tiny, path, tmp_path, loss_on), stock(tiny, stock_rows), strict=True):
        for key in KEYS:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["step"], key)


@pytest.mark.parametrize("kind", ["tiny", "tiny_gemma2"])
def test_packed_conversations_do_not_interact(kind, request, tmp_path):
    """One packed batch of all rows against the rows one by one: the same loss and the same gradients."""
    folder = request.getfixturevalue(kind)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": r["chosen"]} for r in make_pairs(12)])
    one_step = {"max_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    together = {"per_device_train_batch_size": 12, **one_step}
    packed = ours(folder, path, tmp_path, packing=True, **together)
    without_padding = ours(folder, path, tmp_path, **together)
    singly = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12, "padding_free": False}
    alone = ours(folder, path, tmp_path, **{**one_step, **singly})
    # The last two as TRL computes them: with padding, and with one mask over a packed row.
    others = [ours(folder, path, tmp_path, packing=p, padding_free=False, **together) for p in (False, True)]
    for other in (packed, without_padding, *others):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert other[0][key] == pytest.approx(alone[0][key], rel=1e-5), key
        # Logged as means over micro-batches, so only those of one batch are comparable.
        for key in KEYS:
            assert other[0][key] == pytest.approx(packed[0][key], rel=1e-5), key


@pytest.mark.parametrize("packing", [False, True])
def test_each_conversation_has_its_own_attention(packing, tiny, tmp_path, monkeypatch):
    """No product over a padded batch or a packed row: each call has the queries of one conversation."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": r["chosen"]} for r in make_pairs(6)])
    lengths = []
    causal = shared_prompt.causal_attention

    def recorded(query, key, value, **settings):
        lengths.append(query.shape[2])
        assert query.shape[:1] == (1,) and key.shape[2] == query.shape[2]
        return causal(query, key, value, **settings)

    monkeypatch.setattr(shared_prompt, "causal_attention", recorded)
    row = ours(tiny, path, tmp_path, packing=packing, max_steps=1, per_device_train_batch_size=6)[0]
    layers = AutoConfig.from_pretrained(tiny).num_hidden_layers
    assert len(lengths) >= 6 * layers and sum(lengths) == layers * row["num_tokens"]


def test_scores_do_not_depend_on_batch(tiny, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": r["chosen"]} for r in make_pairs(7)])
    tokenizer = load_tokenizer(str(tiny))
    ids, _ = tokenize(load_conversations([{"name": str(path), "split": "train"}]), tokenizer, "responses", None)

    def scored(batch):
        args = SFTRunConfig(str(tmp_path / "o"), **{**SETTINGS, "per_device_eval_batch_size": batch})
        trainer = ResumableSFTTrainer(
            model=load_model(str(tiny)), args=args, train_dataset=ids, processing_class=tokenizer,
            row_log=RowFile(tmp_path / "log.jsonl"),
        )  # fmt: skip
        return trainer.score(ids), trainer.score(ids, [5, 2])

    all_scores, two_scores = scored(3)
    model = load_model(str(tiny)).eval()
    for row, nll in zip(ids, all_scores, strict=True):
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        assert nll == pytest.approx(mean.item() * (labels[0, 1:] != -100).sum().item(), rel=1e-5)
    assert two_scores == pytest.approx([all_scores[5], all_scores[2]], rel=1e-6)
    assert scored(1)[0] == pytest.approx(all_scores, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- script


def test_run_writes_all_artifacts(sft, call, tiny, rows, tmp_path):
    code, out, err = sft(*sft_args(tiny, rows, tmp_path, "--eval_strategy", "steps", "--eval_steps", 2))
    assert code == 0, err
    folder, weights = tmp_path / "out/r", tmp_path / "ck/r"
    assert {p.name for p in folder.iterdir()} == {
        "preflight.json", "train.json", "train_log.jsonl", "heldout_rows.jsonl", "samples.md",
        "sft_training_curves.png",
    }  # fmt: skip
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in weights.iterdir()}
    summary = read_json(folder / "train.json")
    assert summary["stage"] == "sft" and summary["data"]["train"]["conversations"] == 24
    assert summary["data"]["test"]["conversations"] == 8 and summary["model"]["weights_sha256"]
    assert summary["claim"] in " ".join(out.split())
    for figure in summary["metrics"].values():
        assert set(figure) - {"power"} == {"value", "stderr", "ci95", "n"} and figure["n"] == 8
    # The held-out rows give the summary's figures again.
    held_out = [json.loads(line) for line in (folder / "heldout_rows.jsonl").read_text().splitlines()]
    for side in ("base", "tuned"):
        mean = sum(r[f"nll_{side}"] for r in held_out) / sum(r["tokens"] for r in held_out)
        assert summary["metrics"][f"heldout_nll_{side}"]["value"] == pytest.approx(mean)
    assert log(tmp_path, "eval")[-1]["step"] == 4 and log(tmp_path, "eval")[-1]["mean_token_accuracy"] >= 0
    assert (folder / "sft_training_curves.png").read_bytes()[:4] == b"\x89PNG"
    card = (weights / "README.md").read_text()
    assert "instruction-tuning" in card and "| Token accuracy |" in card and "24 conversations" in card
    samples = (folder / "samples.md").read_text()
    assert "### base (" in samples and "### tuned (" in samples

    # The run can be evaluated, on pairs that are named.
    test = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(6, 300))
    folders = ("--run_name", "r", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    code, out, err = call("eval_win_rate", *folders, "--dataset_name", test)
    assert code == 0 and "6 held-out pairs" in out, err
    # Finished, it is not trained again.
    code, out, _ = sft(*sft_args(tiny, rows, tmp_path, "--eval_strategy", "steps", "--eval_steps", 2))
    assert code == 0 and "nothing to train" in out


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_peft", "false", "--learning_rate", "1e-3"),
        ("--load_in_4bit", "--packing"),
        ("--loss_on", "everything", "--packing", "--gradient_checkpointing", "true"),
        ("--chat_template_path", ROOT / "configs/templates/alpaca.jinja", "--test_rows", "0"),
    ],
)
def test_training_modes(flags, sft, tiny, rows, tmp_path):
    code, out, err = sft(*sft_args(tiny, rows, tmp_path, "--max_steps", 2, "--sample_prompts", 1, *flags))
    assert code == 0 and len(log(tmp_path)) == 2, err
    summary = read_json(tmp_path / "out/r/train.json")
    if "--test_rows" in flags:
        assert summary["metrics"] == {} and "No claim" in summary["claim"] and "### Response:" in " ".join(out.split())
        # The template goes with the weights.
        assert "### Response:" in load_tokenizer(str(tmp_path / "ck/r")).chat_template
        assert summary["args"]["chat_template_path"].endswith("alpaca.jinja")
    else:
        assert summary["metrics"]["heldout_ppl_base"]["value"] > 1
        # Without an adapter to switch off, no base is left to answer.
        assert ("### base (" in (tmp_path / "out/r/samples.md").read_text()) == ("--use_peft" not in flags)
    assert ("packed rows" in out) == ("--packing" in flags)


def test_resume_gives_the_same_losses(sft, tiny, rows, tmp_path):
    code, _, err = sft(*sft_args(tiny, rows, tmp_path / "whole", "--save_steps", 2))
    assert code == 0, err

    with interrupted_at(3):
        code, _, _ = sft(*sft_args(tiny, rows, tmp_path / "cut", "--save_steps", 2))
        assert code == 130
    code, out, err = sft(*sft_args(tiny, rows, tmp_path / "cut", "--save_steps", 2))
    assert code == 0 and "checkpoint-" in out, err
    uninterrupted, resumed = log(tmp_path / "whole"), log(tmp_path / "cut")
    assert [r["step"] for r in resumed] == [1, 2, 3, 4]
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["num_tokens"] == b["num_tokens"]
    metrics = [read_json(tmp_path / w / "out/r/train.json")["metrics"] for w in ("whole", "cut")]
    for key in ("heldout_ppl_base", "heldout_ppl_tuned"):
        assert metrics[0][key]["value"] == pytest.approx(metrics[1][key]["value"], rel=1e-5)


def test_packing_needs_max_length(sft, tiny, rows, tmp_path):
    (tmp_path / "c.yaml").write_text("max_length: null\npacking: true\n")
    args = sft_args(tiny, rows, tmp_path)
    at = args.index("--max_length")
    code, _, err = sft("--config", tmp_path / "c.yaml", *args[:at], *args[at + 2 :])
    assert code == 2
    assert_one_line(err, "--packing", "--max_length")


def test_unusable_rows(sft, tiny, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}, {"a": 1}])
    code, _, err = sft(*sft_args(tiny, data, tmp_path))
    assert code == 2
    assert_one_line(err, "x.jsonl line 2", "keys: a")


# ------------------------------------------------------------------------------------------------------------- figures


def test_held_out_metrics_by_hand():
    import math

    rows = [
        {"nll_base": 6.0, "nll_tuned": 3.0, "tokens": 3, "bytes": 10},
        {"nll_base": 2.0, "nll_tuned": 2.0, "tokens": 1, "bytes": 5},
    ]
    metrics = heldout_metrics(rows)
    assert metrics["heldout_ppl_base"]["value"] == pytest.approx(math.exp(8 / 4))
    assert metrics["heldout_ppl_tuned"]["value"] == pytest.approx(math.exp(5 / 4))
    assert metrics["heldout_nll_difference"]["value"] == pytest.approx(-0.75)
    assert metrics["heldout_bits_per_byte_tuned"]["value"] == pytest.approx(5 / math.log(2) / 15)
    tuned_only = heldout_metrics([{**row, "nll_base": None} for row in rows])
    assert "heldout_ppl_base" not in tuned_only and tuned_only["heldout_ppl_tuned"] == metrics["heldout_ppl_tuned"]


@pytest.mark.parametrize(("shift", "verdict"), [(-0.5, "helped"), (0.5, "hurt"), (0.0, "Inconclusive")])
def test_verdict_needs_interval_and_test(shift, verdict):
    rows = [
        {"nll_base": 10.0 + k, "nll_tuned": 10.0 + k + 5 * shift + 0.01 * (-1) ** k, "tokens": 5, "bytes": 20}
        for k in range(12)
    ]
    assert verdict in verdict_of(heldout_metrics(rows))[1]
