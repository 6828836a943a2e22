"""Model cards: valid Hub metadata, every figure of the summary, and values that are never read as templates."""

import copy

import pytest
from huggingface_hub import ModelCard

from preflab.models.card import merged_card, model_card
from utils.artifacts import metric
from utils.stage import Report

SPLIT = {"rows": 9, "pairs": 8, "dropped": {"tied_scores": 1}, "text_sha256": "ab" * 32}
SUMMARY = {
    "stage": "train",
    "model": {"name": "org/base"},
    "start": None,
    "published": None,
    "metrics": {
        "reward_accuracy": metric(0.75, 0.04, (0.67, 0.83), 8),
        "reward_margin": metric(float("nan"), None, None, 8),
        "p_reward_accuracy_is_half": metric(0.01, n=8),
    },
    "args": {"loss_type": ["sigmoid", "sft"], "beta": 0.1, "load_in_4bit": True, "limit": None},
    "run": {
        "run_name": "r",
        "git_commit": "c0ffee",
        "finished_utc": "2026-11-21T13:49:53Z",
        "world_size": 2,
        "versions": {"python": "3.11", "torch": "2.13"},
        "hardware": {"cpu": "EPYC", "cores": 2, "gpus": ["H100"]},
    },
    "claim": "Training helped.",
    "warning": None,
    "training": {"seconds": 12.3, "pairs_per_second": 0.7, "tokens_per_second": 99.6, "mfu": 0.125},
    "plan": {
        "steps": 30,
        "global_batch_size": 8,
        "epochs": 1.0,
        "batch": {"per_device": 2, "accumulation": 4, "processes": 1},
    },
    "dropout": "0",
    "precision": "bf16",
    "data": {
        "train": {**SPLIT, "sources": [{"name": "org/prefs", "split": "train", "revision": "abc123"}]},
        "test": {**SPLIT, "sources": [{"name": "x.jsonl", "split": "test", "sha256": "cd" * 32}]},
    },
}
LOG = [
    {"split": "train", "step": 1, "loss": 0.7},
    {"split": "train", "step": 3, "loss": 0.6},
    {"split": "eval", "step": 2, "epoch": 0.5, "loss": 0.65, "rewards/chosen": -1.0},
]


def test_card_shows_every_figure():
    text = model_card(SUMMARY, LOG, "ck/r", peft=True)
    for line in (
        "org/base, trained on preference pairs with the sigmoid + sft loss (LoRA on a 4-bit base).",
        "| reward_accuracy | 0.7500 | 0.0400 | 0.6700 to 0.8300 | 8 |",
        "| p_reward_accuracy_is_half | 0.01 | - | - | 8 |",
        "| 0.7000 | 0.50 | 2 | 0.6500 | -1.0000 | - | - | - | - | - | - | - |",
        "- beta: 0.1",
        "- steps: 30 of 8 rows (2 per process × 4 accumulation × 1 processes), 1.0 epochs",
        f"- train: 8 pairs of 9 rows; dropped: {{'tied_scores': 1}}; sha256 of the texts `{'ab' * 8}`",
        "  - `org/prefs`, split train, abc123",
        f"  - `x.jsonl`, split test, sha256 {'cd' * 8}",
        "- commit `c0ffee`, 2026-11-21T13:49:53Z",
        "- 12 s of training, 0.7 pairs and 100 tokens per second (MFU 12.5%), on EPYC (2 cores), H100, 2 processes",
        "- python 3.11, torch 2.13",
    ):
        assert line in text.splitlines(), line
    assert "trial run" not in text and "Warning" not in text and "\n\n\n" not in text


def test_metadata_has_a_model_index():
    data = ModelCard(model_card(SUMMARY, LOG, "ck/r", peft=True)).data
    assert (data.base_model, data.library_name, data.datasets) == ("org/base", "peft", ["org/prefs"])
    assert {"dpo", "lora", "sigmoid", "sft"} <= set(data.tags) and data.model_name == "r"
    # Neither NaN, which is not valid JSON, nor p-values.
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results] == [
        ("reward_accuracy", 0.75, "x.jsonl")
    ]


@pytest.mark.parametrize("name", ["{{ 1 + 1 }}", "{% endif %}", 'a: "b" #c', "---"])
def test_values_are_not_read_as_template_or_yaml(name):
    summary = copy.deepcopy(SUMMARY)
    summary["run"]["run_name"] = summary["claim"] = summary["warning"] = name
    text = model_card(summary, LOG, "ck/r", peft=False)
    assert f"# {name}" in text.splitlines() and f"> Warning: {name}" in text.splitlines()
    assert ModelCard(text).data.model_name == name


def test_start_limit_and_missing_test_split():
    summary = copy.deepcopy(SUMMARY)
    summary |= {"start": {"base": "builtin:smollm2-135m-instruct", "adapter": "ck/a", "merged": "ck/m"}, "metrics": {}}
    summary["args"]["limit"], summary["data"]["test"] = 6, None
    text = model_card(summary, LOG[:1], "ck/r", peft=True)
    assert "> A trial run on the first 6 rows (--limit)." in text.splitlines()
    assert "builtin:smollm2-135m-instruct with the adapter ck/a merged" in text
    assert "There was no test split." in text and "Training results" not in text
    data = ModelCard(text).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.model_name == "r" and not data.eval_results


def test_published_results_are_a_separate_table():
    published = {"source": "paper", "setting": "8 GPUs", "rows": [{"step": 300, "loss": 0.4594, "epoch": 1}]}
    text = model_card({**SUMMARY, "published": published}, LOG[:1], "ck/r", peft=True)
    assert "paper; 8 GPUs." in text and text.count("| Training Loss |") == 2
    assert "| - | 1.00 | 300 | 0.4594 | - |" in text


def test_card_of_a_merged_adapter():
    report = Report("a table", "The merged folder is the same model.")
    text = merged_card("ck/m", "r", "org/base", "ck/r", "float32", True, report, SUMMARY["run"])
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.tags) == (
        "org/base",
        "transformers",
        ["merged", "preference-tuning"],
    )
    assert "quantised base" in text and report.verdict in text and "```\na table\n```" in text and "`c0ffee`" in text
