"""KTO on answers with thumbs: TRL's KTOTrainer on the same rows, the data checks, complete runs and resume."""

import pytest
from conftest import assert_one_line, interrupted_at, train_args, write_jsonl
from datasets import Dataset
from scipy.stats import mannwhitneyu
from stock_trl import SETTINGS, lora
from stock_trl import steps as steps_of

from preflab.data.thumbs import load_thumbs, tokenize
from preflab.models.loading import load_model, load_tokenizer
from preflab.training.dpo_config import DPORunConfig
from preflab.training.kto_trainer import ThumbsTrainer
from preflab.training.thumb_metrics import auc
from utils.artifacts import RowFile, read_json

KEYS = (
    "loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "entropy", "num_tokens",
)  # fmt: skip


def thumbs(count: int, offset: int = 0) -> list[dict]:
    """Answers with thumbs, three of five up, as message lists."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {k} of many?"}],
            "completion": [
                {"role": "assistant", "content": f"{'good' if k % 5 < 3 else 'bad'} {'word ' * (k % 4)}{k}"}
            ],
            "label": k % 5 < 3,
        }
        for k in range(offset, offset + count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thumbs")
    write_jsonl(folder / "train.jsonl", thumbs(20))
    write_jsonl(folder / "test.jsonl", thumbs(20, 100))
    return folder


def settings(**extra) -> dict:
    return {**{key: value for key, value in SETTINGS.items() if key != "label_smoothing"}, **extra}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_training_equals_stock_kto(loss_type, tiny, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows, weights = thumbs(24), {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    stock = KTOTrainer(
        load_model(str(tiny)),
        args=KTOConfig(str(tmp_path / "stock"), loss_type=loss_type, bf16=False, **settings(**weights)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(tiny)),
        peft_config=lora(),
    )
    tokenizer = load_tokenizer(str(tiny))
    read = load_thumbs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, _ = tokenize(read, tokenizer, 256, 128)
    own = ThumbsTrainer(
        model=load_model(str(tiny)),
        args=DPORunConfig(str(tmp_path / "ours"), loss_type=[loss_type], **settings(**weights)),
        train_dataset=ids,
        processing_class=tokenizer,
        peft_config=lora(),
        row_log=RowFile(tmp_path / "log.jsonl"),
    )
    assert [row["prompt_ids"] for row in ids] == [row["prompt_ids"] for row in stock.train_dataset]
    expected = steps_of(stock)
    assert expected[-1]["rewards/chosen"] != 0
    for a, b in zip(steps_of(own), expected, strict=True):
        compared = [key for key in KEYS if key in b]
        assert len(compared) > 8
        assert [a[key] for key in compared] == pytest.approx([b[key] for key in compared], abs=1e-4, rel=1e-4), a[
            "step"
        ]


def test_auc_is_the_mann_whitney_statistic():
    values, labels = [0.3, 0.1, 0.1, -2.0, 0.5], [True, True, False, False, True]
    expected = mannwhitneyu([0.3, 0.1, 0.5], [0.1, -2.0]).statistic / 6
    assert auc(values, labels) == pytest.approx(expected) == pytest.approx(5.5 / 6)


def test_rows_are_read_and_counted(smol_tokenizer, tmp_path):
    rows = [
        {"prompt": "A?", "completion": "yes", "label": True, "by": "me"},
        {"prompt": "A?", "completion": "yes", "label": "true"},
        {"prompt": "A?", "completion": "yes", "label": 0},
        {"prompt": "B?", "completion": " ", "label": False},
        *thumbs(1),
    ]
    read = load_thumbs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    assert [(t.prompt_text, t.chosen, t.label) for t in read.pairs[:2]] == [("A?", "yes", True), ("A?", "yes", False)]
    assert (
        read.dropped == {"repeated_row": 1, "empty_response": 1} and read.unused == {"by": 4} or read.unused["by"] == 1
    )
    ids, counts = tokenize(read, smol_tokenizer, 16, 8)
    assert len(ids) == 3 and ids[2]["label"] is True and counts["truncated_prompt"] == 1
    assert max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in ids) <= 16


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([{"prompt": "A?", "completion": "x"}], (), ("'label' is missing", "--columns")),
        ([{"prompt": "A?", "completion": "x", "label": "maybe"}], (), ("'label'", "maybe")),
        ([{"prompt": "A?", "chosen": "x", "rejected": "y"}], (), ("'completion' is missing",)),
        (thumbs(4), ("--label_smoothing", "0.1"), ("--label_smoothing", "kto")),
        (thumbs(4), ("--per_device_train_batch_size", "1"), ("--per_device_train_batch_size 1", "at least 2")),
        (thumbs(4), ("--drop_ties",), ("--drop_ties",)),
        (thumbs(4), ("--desirable_weight", "0"), ("--desirable_weight 0",)),
        (thumbs(4), ("--precompute_ref_log_probs",), ("--precompute_ref_log_probs",)),
    ],
)
def test_bad_input(rows, flags, words, train, tiny, tmp_path):
    data = write_jsonl(tmp_path / "thumbs.jsonl", rows)
    code, _, err = train(
        *train_args(tiny, data, tmp_path, "--loss_type", "kto", "--dataset_test_split", "none", *flags)
    )
    assert code == 2
    assert_one_line(err, *words)


def test_weights_without_kto_are_refused(train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--undesirable_weight", "2"))
    assert code == 2
    assert_one_line(err, "--undesirable_weight", "kto")


def test_run_on_thumbs(train, tiny, data, tmp_path):
    code, out, err = train(*train_args(tiny, data, tmp_path, "--loss_type", "kto", "--beta", "0.5"))
    assert code == 0, err
    assert "12 up, 8 down" in out and "--desirable_weight 0.667 to 0.889" in out and "thumb up" in out
    results, rows = read_json(tmp_path / "out/r/train.json"), RowFile(tmp_path / "out/r/heldout_rows.jsonl").read()
    up, down = ([row["reward"] for row in rows if row["label"] is label] for label in (True, False))
    area = results["metrics"]["reward_auc"]
    assert area["value"] == pytest.approx(mannwhitneyu(up, down).statistic / (len(up) * len(down)))
    assert area["ci95"][0] <= area["value"] <= area["ci95"][1]
    assert results["metrics"]["reward_up"]["value"] == pytest.approx(sum(up) / len(up))
    assert "up above down by reward" in results["text"] and results["data"]["train"]["down"] == 8
    card = (tmp_path / "ck/r/README.md").read_text()
    assert "kto" in card and "undesirable_weight" in card
    assert (tmp_path / "out/r/dpo_training_curves.png").exists()


def test_resume_changes_nothing(train, tiny, data, tmp_path):
    logs = []
    for name in ("whole", "stopped"):
        flags = ("--loss_type", "kto", "--save_steps", "1", "--dataset_test_split", "none")
        args = train_args(tiny, data, tmp_path / name, *flags)
        if name == "stopped":
            with interrupted_at(3):
                assert train(*args)[0] == 130
        code, _, err = train(*args)
        assert code == 0, err
        rows = RowFile(tmp_path / name / "out/r/train_log.jsonl").read()
        logs.append([row[key] for row in rows for key in ("step", "loss", "grad_norm", "kl")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_report_and_release_read_a_run_on_thumbs(train, call, tiny, data, tmp_path):
    args = train_args(tiny, data, tmp_path, "--loss_type", "kto")
    code, out, err = train(*args)
    assert code == 0, err
    # Its held-out rows are no pairs, so no evaluation of pairs is suggested.
    assert "eval_perplexity.py" not in out and "human_eval.py" in out
    folders = ("--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    code, out, err = call("report", *folders, "--output_dir", tmp_path / "report")
    assert code == 0, err
    assert "up above down by reward" in (tmp_path / "report/report.md").read_text()
    release = ("--run_name", "r", "--release_dir", tmp_path / "release", "--base_hub_id", "me/tiny")
    code, out, err = call("release", *folders, *release, "--license", "mit", "--language", "en")
    assert code == 0, err
    card = (tmp_path / "release/README.md").read_text()
    assert "answers with thumbs" in card and "20 thumbs of 20 rows" in card
    # Evaluations of pairs say why they cannot read the rows.
    code, _, err = call("eval_win_rate", "--run_name", "r", *folders)
    assert code == 2
    assert_one_line(err, "test.jsonl", "no pair")
