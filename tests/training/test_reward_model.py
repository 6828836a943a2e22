"""train_reward_model.py: TRL's losses, shared prompts, rewards as the judge reads them, artifacts, resume, refusals."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line, interrupted_at, make_pairs, write_jsonl
from datasets import Dataset
from helpers import reward_args
from peft import LoraConfig
from scipy.stats import binomtest
from trl import RewardConfig, RewardTrainer

from preflab.data.preferences import drop_longer, load_pairs, tokenize
from preflab.data.prompts import Prompt
from preflab.judging.reward_model import RewardModel
from preflab.models.loading import load_model, load_tokenizer
from preflab.models.reward_head import padding_that_ends_nothing
from preflab.training.base_ranking import rank_by_likelihood
from preflab.training.reward_config import RewardRunConfig
from preflab.training.reward_trainer import ResumableRewardTrainer, RewardCollator, at_last_tokens
from utils.artifacts import RowFile, read_json

SETTINGS = dict(
    per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=20, learning_rate=2e-3, seed=7,
    gradient_checkpointing=False, report_to="none", logging_steps=1, save_strategy="no", max_length=256, use_cpu=True,
    disable_tqdm=True,
)  # fmt: skip
OPTIONS = {"dtype": "float32", "batch_tokens": 512, "batch_size": None}


@pytest.fixture
def reward(call):
    """Run train_reward_model.py in this process; returns (exit code, stdout, stderr)."""
    return lambda *args: call("train_reward_model", *args)


@pytest.fixture
def run(trained_reward):
    """Folder of a finished tiny LoRA reward model, `ck/r` and `out/r`."""
    return trained_reward


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")


def new_model(folder):
    torch.manual_seed(3)
    return load_model(str(folder), reward=True)


def steps(trainer) -> list[dict]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def stock(folder, tmp_path, rows, peft, per_point=None, **extra) -> list[dict]:
    data = [{"chosen": r["chosen"], "rejected": r["rejected"]} for r in rows]
    if per_point:
        data = [
            {**d, "margin": per_point * (r["score_chosen"] - r["score_rejected"])}
            for d, r in zip(data, rows, strict=True)
        ]
    return steps(
        RewardTrainer(
            new_model(folder),
            args=RewardConfig(str(tmp_path / "stock"), bf16=False, **{**SETTINGS, **extra}),
            train_dataset=Dataset.from_list(data),
            processing_class=load_tokenizer(str(folder)),
            peft_config=peft,
        )
    )


def ours(folder, tmp_path, rows, peft, per_point=None, **extra) -> list[dict]:
    from preflab.training.splits import with_margins

    tokenizer = load_tokenizer(str(folder))
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, _ = tokenize(data, tokenizer, None, None)
    return steps(
        ResumableRewardTrainer(
            new_model(folder),
            args=RewardRunConfig(str(tmp_path / "ours"), **{**SETTINGS, **extra}),
            train_dataset=with_margins(data, ids, per_point),
            eval_dataset=None,
            processing_class=tokenizer,
            peft_config=peft,
            row_log=RowFile(tmp_path / "log.jsonl"),
        )
    )


# ----------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize(
    "case", ["lora, margins, centred", "gemma2, full", pytest.param("padded", marks=pytest.mark.slow)]
)
def test_twenty_losses_equal_stock_trl(case, tiny, tiny_gemma2, tmp_path):
    folder, rows = tiny_gemma2 if "gemma2" in case else tiny, make_pairs(24)
    peft = None if "full" in case else lora()
    extra = {"center_rewards_coefficient": 0.01, "per_point": 0.2} if "margins" in case else {}
    own = {"shared_prompt": False} if case == "padded" else {"micro_batch_tokens": 200}
    expected = stock(folder, tmp_path, rows, peft, **extra)
    logged = ours(folder, tmp_path, rows, peft, **extra, **own)
    assert len(logged) == 20
    for a, b in zip(logged, expected, strict=True):
        for key in ("loss", "grad_norm", "accuracy", "margin", "mean_reward"):
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["step"], key)
    # The loss moved, so that equal losses say something about the gradients.
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 0.01


def test_packed_rewards_are_those_of_each_sequence_alone(tiny):
    """Neither the pair's other answer nor the other pairs change a reward."""
    from preflab.models.fast import shared_prompt

    tokenizer, model = load_tokenizer(str(tiny)), new_model(tiny).eval()
    pad = padding_that_ends_nothing(tokenizer, {1})
    model.config.pad_token_id = pad
    examples = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12, 13]},
        {"prompt_ids": [14], "chosen_ids": [15, 16, 17], "rejected_ids": [18]},
    ]
    alone = [
        model(torch.tensor([e["prompt_ids"] + e[f"{side}_ids"]])).logits.item()
        for side in ("chosen", "rejected")
        for e in examples
    ]
    shared_prompt.attach(model)
    batch = at_last_tokens(shared_prompt.PackingCollator(RewardCollator(pad))(examples))
    batch.pop("completion_mask")
    assert batch["input_ids"].shape == (4, 1)
    assert model(**batch).logits.squeeze(-1).tolist() == pytest.approx(alone, abs=1e-5)


def test_margin_key_does_not_reach_the_collator_without_scores():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    assert "margin" not in RewardCollator(0)([row])
    batch = RewardCollator(0)([{**row, "margin": 1.5}])
    assert batch["margin"].tolist() == [1.5]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]


def test_padding_ends_no_sequence(smol_tokenizer, tiny):
    tokenizer = load_tokenizer(str(tiny))
    assert padding_that_ends_nothing(tokenizer, {1234}) == tokenizer.pad_token_id
    other = padding_that_ends_nothing(tokenizer, {tokenizer.pad_token_id, 1234})
    assert other not in (1234,) and tokenizer.pad_token_id == other
    every = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    before = tokenizer.pad_token
    ordinary = padding_that_ends_nothing(tokenizer, every)
    assert ordinary not in every and tokenizer.pad_token == before


def test_pairs_longer_than_the_limit_are_left_out(tiny, tmp_path):
    rows = make_pairs(6)
    rows[2]["chosen"][1]["content"] = "word " * 80
    tokenizer = load_tokenizer(str(tiny))
    data = load_pairs([{"name": str(write_jsonl(tmp_path / "x.jsonl", rows)), "split": "train"}])
    ids, _ = tokenize(data, tokenizer, None, None)
    fitting = drop_longer(data, ids, 80)
    assert len(fitting) == len(data.pairs) == 5 and fitting["pair"] == list(range(5))
    assert data.dropped["longer_than_max_length"] == 1
    assert rows[2]["prompt"] not in [pair.messages[-1]["content"] for pair in data.pairs]


# ----------------------------------------------------------------------------------------------------------------- runs


def test_run_writes_its_artifacts_and_the_judge_reads_the_same_rewards(run, prefs):
    results, weights = run / "out/r", run / "ck/r"
    summary = read_json(results / "train.json")
    rows = [json.loads(line) for line in (results / "heldout_rows.jsonl").read_text().splitlines()]
    assert summary["stage"] == "reward_model" and len(rows) == 8
    assert (results / "reward_training_curves.png").stat().st_size > 10_000
    # The run's rewards, computed packed while training, are those of `rm:` from the saved folder.
    data = load_pairs([{"name": str(prefs), "split": "test"}])
    judge = RewardModel(str(weights), OPTIONS)
    answers = [(Prompt(p.messages, p.source), text) for p in data.pairs for text in (p.chosen, p.rejected)]
    rewards = dict(judge.score(answers))
    expected = [value for row in rows for value in (row["reward_chosen"], row["reward_rejected"])]
    assert [rewards[i] for i in range(16)] == pytest.approx(expected, abs=1e-4)
    # Figures by hand from the rows.
    right = sum(row["reward_chosen"] > row["reward_rejected"] for row in rows)
    metrics = summary["metrics"]
    assert metrics["reward_accuracy"]["value"] == pytest.approx(right / 8)
    assert metrics["p_reward_accuracy_is_half"]["value"] == pytest.approx(binomtest(right, 8).pvalue)
    likelier = sum(row["base_logp_chosen"] > row["base_logp_rejected"] for row in rows)
    assert metrics["base_ranking_accuracy"]["value"] == pytest.approx(likelier / 8)
    longer = sum(len(p.chosen) > len(p.rejected) for p in data.pairs)
    longer += 0.5 * sum(len(p.chosen) == len(p.rejected) for p in data.pairs)
    assert metrics["longer_accuracy"]["value"] == pytest.approx(longer / 8)
    card = (weights / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "pipeline_tag: text-classification" in card
    evaluated = [r for r in map(json.loads, (results / "train_log.jsonl").open()) if r["split"] == "eval"]
    assert evaluated[-1]["accuracy_pair_mean"] == pytest.approx(right / 8)


def test_base_ranking_is_the_causal_models_log_probability(run, tiny, prefs):
    from helpers import slow_logp

    rows = [json.loads(line) for line in (run / "out/r/heldout_rows.jsonl").read_text().splitlines()]
    tokenizer, model = load_tokenizer(str(tiny)), load_model(str(tiny)).eval()
    ids, _ = tokenize(load_pairs([{"name": str(prefs), "split": "test"}]), tokenizer, None, None)
    for row, pair in zip(rows[:2], ids, strict=False):
        with torch.no_grad():
            expected = slow_logp(model, pair["prompt_ids"], pair["rejected_ids"])
        assert row["base_logp_rejected"] == pytest.approx(expected, abs=1e-3)


def test_sharded_training_loads_no_whole_base_for_its_ranking():
    config = SimpleNamespace(base_ranking=True, sharding="FSDP")
    training = SimpleNamespace(config=config, model_args=None, notes=[])
    assert rank_by_likelihood(training, SimpleNamespace(test=True)) is None
    assert training.notes == ["the base's likelihood ranking is left out: training shards the model"]


def test_second_call_prints_the_results_and_evaluations_refuse_a_reward_model(run, tiny, prefs, reward, call):
    code, out, _ = reward(*reward_args(tiny, prefs, run, "--eval_strategy", "epoch"))
    assert code == 0 and "is finished, nothing to train" in out and "rm:" in out
    for script in ("eval_win_rate", "eval_perplexity", "merge_adapter"):
        code, _, err = call(script, "--run_name", "r", "--checkpoints", run / "ck", "--eval_out", run / "out")
        assert code == 2
        assert_one_line(err, str(run / "ck/r"), "reward model")
    code, _, err = call("eval_win_rate", "--checkpoints", run / "ck", "--eval_out", run / "out")
    assert code == 2
    assert_one_line(err, "no finished run")
    code, out, _ = reward("--list", "--output_dir", run / "ck", "--eval_out", run / "out")
    assert "reward model, LoRA" in out


def test_resumed_run_has_the_same_losses(tiny, prefs, run, reward, tmp_path):
    args = ("--save_steps", "2", "--eval_strategy", "epoch")
    with interrupted_at(3):
        assert reward(*reward_args(tiny, prefs, tmp_path, *args))[0] == 130
    code, out, err = reward(*reward_args(tiny, prefs, tmp_path, *args))
    assert code == 0 and "resuming from" in out, err

    def losses(folder):
        rows = map(json.loads, (folder / "out/r/train_log.jsonl").open())
        return [(r["step"], r["loss"], r["mean_reward"]) for r in rows if r["split"] == "train"]

    assert losses(tmp_path) == losses(run)


def test_full_fine_tuning_is_a_complete_reward_model(tiny, prefs, reward, tmp_path):
    code, _, err = reward(*reward_args(tiny, prefs, tmp_path, "--use_peft", "false", "--no_base_ranking"))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out/r/heldout_rows.jsonl").read_text().splitlines()]
    assert "base_logp_chosen" not in rows[0]
    judge = RewardModel(str(tmp_path / "ck/r"), OPTIONS)
    pair = load_pairs([{"name": str(prefs), "split": "test"}]).pairs[0]
    ((_, value),) = judge.score([(Prompt(pair.messages, ""), pair.chosen)])
    assert value == pytest.approx(rows[0]["reward_chosen"], abs=1e-4)


@pytest.mark.slow
def test_four_bit_base_leaves_the_reward_layer_whole(tiny, prefs, reward, tmp_path):
    code, _, err = reward(*reward_args(tiny, prefs, tmp_path, "--load_in_4bit", "--max_steps", "2"))
    assert code == 0, err
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "ck/r/adapter_model.safetensors")
    (score,) = [value for name, value in saved.items() if "score" in name]
    assert score.dtype == torch.float32 and score.shape == (1, 32)


def test_margins_need_scores(tiny, reward, tmp_path):
    rows = make_pairs(8)
    del rows[3]["score_chosen"], rows[3]["score_rejected"]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    extra = ("--margin_per_point", "1", "--dataset_test_split", "none")
    code, _, err = reward(*reward_args(tiny, data, tmp_path, *extra))
    assert code == 2
    assert_one_line(err, "pairs.jsonl", "line 4", "--margin_per_point")


def test_language_model_adapter_is_no_reward_model(trained):
    from utils.errors import UserError

    with pytest.raises(UserError, match="adapter of a language model"):
        RewardModel(str(trained / "ck/r"), OPTIONS)


def test_equal_rewards_have_the_loss_of_chance(tiny, prefs, reward, tmp_path):
    """The preflight's loss before the first step, from the rewards that it also shows."""
    code, out, err = reward(*reward_args(tiny, prefs, tmp_path, "--preflight_only"))
    assert code == 0, err
    step0 = read_json(tmp_path / "out/r/preflight.json")["step0"]
    spread = step0["largest_reward"] - step0["smallest_reward"]
    assert abs(step0["loss"] - math.log(2)) <= spread and step0["pairs"] == 4
