"""Model cards: valid Hub metadata, every figure of the summary, and values that are never read as templates."""

import ast
import copy
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import eval_args, save_tiny, train_args, write_jsonl
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from preflab.evaluation.comparison import base_of
from preflab.models import loading
from preflab.models.card import BUILTIN_NOTE, merged_card, model_card
from preflab.models.loading import BUILTIN, BUILTIN_HUB_ID, load_model, load_tokenizer
from preflab.models.public_names import public_name
from utils.artifacts import metric, read_json
from utils.markdown import visible
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
    summary |= {
        "start": {"base": "builtin:smollm2-135m-instruct", "adapter": "hub/a", "merged": "./ck/m"},
        "metrics": {},
    }
    summary["args"]["limit"], summary["data"]["test"] = 6, None
    text = model_card(summary, LOG[:1], "ck/r", peft=True)
    assert "> A trial run on the first 6 rows (--limit)." in text.splitlines()
    assert "builtin:smollm2-135m-instruct with the adapter hub/a merged" in text
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
    names = public_name("org/base"), public_name("./ck/r")
    text = merged_card("ck/m", "r", *names, "float32", True, report, SUMMARY["run"])
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.tags) == (
        "org/base",
        "transformers",
        ["merged", "preference-tuning"],
    )
    assert "quantised base" in text and report.verdict in text and "```\na table\n```" in text and "`c0ffee`" in text


# ---- names from outside are text, without paths of this machine


HOSTILE = [
    "evil\n\n# Heading",
    "\x1b[31mred",
    "<img src=x onerror=alert(1)>",
    "![x](https://example.org/pixel.png)",
    "[link](javascript:x)",
    "`code` | *a* __b__ \\",
    "```\n</code>",
    "--\n---\nbase_model: other",
    "\u202etxt.exe",
]


def rendered(text: str) -> str:
    """HTML of a card's Markdown, in which raw HTML stays, as on the hub."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(text).text)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_text(name, tmp_path):
    """Model, data, adapter and run name, each in every place: the same elements as with harmless names."""

    def card(name):
        summary = copy.deepcopy(SUMMARY)
        summary["run"]["run_name"] = name
        summary["model"]["name"] = f"./{name.replace('/', '_')}"
        summary["start"] = {"base": f"./{name.replace('/', '_')}", "adapter": f"./{name.replace('/', '_')}"}
        for split, key in (("train", "revision"), ("test", "sha256")):
            summary["data"][split]["sources"] = [{"name": name, "split": name, key: "ab" * 20}]
        summary["published"] = {"source": name, "setting": "s", "rows": []}
        return model_card(summary, LOG, f"ck/{name.replace('/', '_')}", peft=True)

    text, plain = card(name), card("harmless")
    data = ModelCard(text).data
    # Quotations of a YAML file may hold Markdown, so the published table's source is compared for HTML only.
    assert re.findall("<[a-z]+", rendered(text).partition("As published")[0]) == re.findall(
        "<[a-z]+", rendered(plain).partition("As published")[0]
    )
    assert "<img" not in rendered(text) and "\x1b" not in text and "\u202e" not in text
    assert data.base_model is None and data.model_name == visible(name)
    assert ast.parse(snippet(text))
    if not re.search(r"[\n\x1b\u202e]", name):
        assert html.escape(name, quote=False) in rendered(text).replace("&quot;", '"'), "nothing of the name is lost"


def snippet(card: str) -> str:
    """The Python code of a card's section Use."""
    return re.search(r"\n(`{3,})python\n(.*?)\n\1", card.partition("## Use")[2], re.S)[2]


@pytest.mark.parametrize("peft", [True, False])
def test_card_has_no_paths_of_this_machine(tmp_path, peft):
    summary = copy.deepcopy(SUMMARY)
    (tmp_path / "my-model").mkdir()
    summary["model"]["name"] = str(tmp_path / "my-model")
    summary["data"]["test"]["sources"][0]["name"] = str(tmp_path / "x.jsonl")
    text = model_card(summary, LOG, str(tmp_path / "ck/r"), peft)
    assert str(tmp_path.parent) not in text and "local folder my-model, trained on" in text and "`x.jsonl`" in text
    assert ModelCard(text).data.base_model is None
    # The hub id of the folder's config, and the user's own before it.
    (tmp_path / "my-model/config.json").write_text('{"_name_or_path": "org/original"}')
    text = model_card(summary, LOG, str(tmp_path / "ck/r"), peft)
    assert "org/original (local folder my-model), trained on" in text
    assert ModelCard(text).data.base_model == "org/original"
    assert ('base = "org/original"\n' in text) == peft
    text = model_card(summary, LOG, str(tmp_path / "ck/r"), peft, base_hub_id="mine/other")
    assert ModelCard(text).data.base_model == "mine/other"
    (tmp_path / "my-model/config.json").write_text('{"_name_or_path": "/home/someone/model"}')
    assert "someone" not in model_card(summary, LOG, str(tmp_path / "ck/r"), peft)


def test_names_of_downloads_and_builtin():
    downloaded = public_name("/home/x/.cache/huggingface/hub/models--org--some-model/snapshots/abc123")
    assert (downloaded.shown, downloaded.hub_id) == ("org/some-model", "org/some-model")
    assert (public_name(BUILTIN).shown, public_name(BUILTIN).loads) == (BUILTIN, BUILTIN_HUB_ID)
    assert public_name("org/model").folder is None and public_name("~/a/b").shown == "local folder b"


def test_missing_throughput_is_not_measured():
    summary = copy.deepcopy(SUMMARY)
    summary["training"] |= {"mfu": None}
    assert "100 tokens per second (MFU not measured)" in model_card(summary, LOG, "ck/r", peft=True)
    summary["training"] = {"seconds": 0.1}
    assert "speed not measured (MFU not measured)" in model_card(summary, LOG, "ck/r", peft=True)


# ---- the snippet in an empty folder


def run_elsewhere(code: str, folder: Path, **links: Path) -> str:
    """Run a card's code in an empty folder with `links` in it, offline, without this repository; its output."""
    folder.mkdir()
    for name, target in links.items():
        (folder / name).symlink_to(target)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        # -I: neither the current folder nor PYTHONPATH is on sys.path.
        [sys.executable, "-I", "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def hub_cache(folder: Path, repo: str, model: Path) -> None:
    """Put a model folder into a hub cache, as a download would: it stands in for the hub."""
    commit = "0" * 40
    place = folder / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    shutil.copytree(model, place / "snapshots" / commit)


def expected_answer(model, folder: Path, text: bool) -> str:
    """What the snippet should print, from this project's own loader."""
    tokenizer = load_tokenizer(str(folder))
    if text:
        inputs = tokenizer("The sky is blue because", return_tensors="pt")
    else:
        turns = [{"role": "user", "content": "Why is the sky blue?"}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=64)[0]
    return tokenizer.decode(output if text else output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_adapter_on_the_builtin_model_works_elsewhere(call, tiny, prefs, tmp_path, monkeypatch):
    """Trained on the builtin model (a tiny stand-in), it loads the hub's original with plain PEFT, and here still the
    exact base."""
    monkeypatch.setattr(loading, "builtin_folder", lambda: tiny)
    code, _, err = call("dpo_train_human_preference", *train_args(BUILTIN, prefs, tmp_path))
    assert code == 0, err
    folder = tmp_path / "ck/r"
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == BUILTIN_HUB_ID
    assert read_json(tmp_path / "out/r/train.json")["model"]["name"] == BUILTIN
    card = (folder / "README.md").read_text()
    assert "dequantised from a 4-bit GGUF" in card and ModelCard(card).data.base_model == BUILTIN_HUB_ID
    # Evaluations load the exact base, also for a checkpoint and from a copy of the adapter alone.
    code, out, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "eval"))
    assert code == 0 and f"against {BUILTIN}" in " ".join(out.split()), err
    assert base_of(str(folder)) == BUILTIN
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, alone / name)
    assert base_of(str(alone)) == BUILTIN_HUB_ID
    flags = ("--adapter_path", alone, "--base_model", BUILTIN, "--dataset_name", prefs, "--eval_out", tmp_path / "copy")
    code, _, err = call("eval_win_rate", *flags)
    assert code == 0, err
    hub_cache(tmp_path / "cache", BUILTIN_HUB_ID, tiny)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    shown = run_elsewhere(snippet(card), tmp_path / "empty", r=folder)
    assert shown.strip() == expected_answer(load_model(str(tiny), adapter=str(folder)), folder, text=False).strip()


def test_snippets_of_text_and_local_models(call, smol_tokenizer, tmp_path):
    """A base model without a chat template: text pairs, a local base, and the merged folder."""
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.chat_template = None
    base = save_tiny(tmp_path / "base", tokenizer)
    rows = [{"prompt": f"Number {i}:", "chosen": f" {i} is a number", "rejected": " no"} for i in range(12)]
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", rows[:8])
    write_jsonl(data / "test.jsonl", rows[8:])
    code, _, err = call("dpo_train_human_preference", *train_args(base, data, tmp_path))
    assert code == 0, err
    folder = tmp_path / "ck/r"
    code, _, err = call("merge_adapter", *eval_args(tmp_path, tmp_path / "out", "--merged_dir", tmp_path / "merged"))
    assert code == 0, err
    expected = expected_answer(load_model(str(base), adapter=str(folder)), folder, text=True)
    for name in ("ck/r", "merged"):
        card = (tmp_path / name / "README.md").read_text()
        assert str(tmp_path) not in card and "apply_chat_template" not in card
        links = {Path(name).name: tmp_path / name} | ({"base": base} if name == "ck/r" else {})
        assert run_elsewhere(snippet(card), tmp_path / f"empty-{Path(name).name}", **links).strip() == expected.strip()


@pytest.mark.slow
def test_note_on_the_builtin_weights_is_exact(tmp_path):
    """The card's second snippet loads what load_model(BUILTIN) loads."""
    code = BUILTIN_NOTE.partition("```python\n")[2].partition("\n```")[0].replace("model = PeftModel", "# ")
    check = "\nprint(sum(p.double().abs().sum().item() for p in base.parameters()))"
    shown = run_elsewhere(f"from transformers import AutoModelForCausalLM\n{code}{check}", tmp_path / "empty")
    expected = sum(p.double().abs().sum().item() for p in load_model(BUILTIN).parameters())
    assert float(shown.split()[-1]) == pytest.approx(expected, rel=1e-12)
