"""eval_win_rate.py: reproduced trainer metrics, metrics recomputed from the rows, and bad input."""

import json
import math

import numpy as np
import pytest
from conftest import assert_one_line, eval_args, make_pairs, save_tiny, write_jsonl

from preflab.evaluation.reward_slices import best_scale, calibration_bins, calibration_metrics, slices
from preflab.evaluation.trainer_metrics import TrainerEvaluation, compare, in_order_batches, longest_first_batches
from utils.artifacts import RowFile, read_json


@pytest.fixture
def win_rate(call, trained, tmp_path):
    """A function that runs eval_win_rate.py on the tiny run and returns (summary, rows, stdout)."""

    def calling(*extra):
        code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, *extra))
        assert code == 0, err
        return read_json(tmp_path / "r/win_rate.json"), RowFile(tmp_path / "r/win_rate_rows.jsonl").read(), out

    return calling


# ----------------------------------------------------------------------------------------------------------- figures


def test_trainer_metrics_are_reproduced(win_rate, trained, tmp_path):
    summary, rows, out = win_rate("--expected", trained / "out/r/train_log.jsonl")
    own, m = read_json(trained / "out/r/train.json")["metrics"], summary["metrics"]
    for name, trainer_name in {
        "win_rate": "reward_accuracy_strict",
        "win_rate_ties_half": "reward_accuracy",
        "avg_margin": "reward_margin",
        "avg_reward_chosen": "reward_chosen",
        "avg_reward_rejected": "reward_rejected",
        "likelihood_ranking_base": "likelihood_ranking_base",
    }.items():
        assert m[name]["value"] == pytest.approx(own[trainer_name]["value"], abs=1e-4), name
        assert m[name]["ci95"] == pytest.approx(own[trainer_name]["ci95"], abs=1e-3), name
    held_out = RowFile(trained / "out/r/heldout_rows.jsonl").read()
    for row, trainer_row in zip(rows, held_out, strict=True):
        for key in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
            assert row[key] == pytest.approx(trainer_row[key], abs=1e-4)
    assert summary["expected"]["agrees"] and summary["expected"]["batch_size"] == 3
    assert m["evaluated_examples"]["value"] == 8 and m["skipped_examples"]["value"] == 0
    assert "DIFFERS" not in out and (tmp_path / "r/win_rate.png").stat().st_size > 10_000
    for key in ("git_commit", "command", "seed", "versions", "hardware", "wall_seconds"):
        assert key in summary["run"]
    assert summary["model"]["tuned"]["adapter_sha256"] and summary["data"]["text_sha256"]


def test_trainer_mean_is_over_batches(win_rate, trained):
    """8 pairs in batches of 3: the last batch has 2 rows and the same weight as the others."""
    summary, _, _ = win_rate("--expected", trained / "out/r/train_log.jsonl")
    figures = summary["expected"]["figures"]
    assert abs(figures["rewards/margins"]["mean_over_rows"] - figures["rewards/margins"]["trainer"]) > 1e-3
    assert figures["rewards/margins"]["recomputed"] == pytest.approx(figures["rewards/margins"]["trainer"], abs=1e-4)


def test_expected_reads_trainer_state(call, trained, tmp_path):
    """The adapter of checkpoint-2 and the evaluation of step 2 in its trainer_state.json."""
    state = trained / "ck/r/checkpoint-2/trainer_state.json"
    args = ("--adapter_path", trained / "ck/r/checkpoint-2", "--eval_out", tmp_path, "--expected", state)
    code, out, err = call("eval_win_rate", *args, "--expected_batch_size", 3)
    assert code == 0, err
    assert read_json(tmp_path / "r-checkpoint-2/win_rate.json")["expected"]["agrees"]
    code, out, err = call("eval_win_rate", *args, "--expected_batch_size", 4)
    assert code == 2 and "DIFFERS" in out
    assert_one_line(err, "--expected")


def test_summary_follows_from_rows(win_rate):
    summary, rows, _ = win_rate("--beta", 0.5)
    m = summary["metrics"]
    margins = []
    for row in rows:
        chosen, rejected = (0.5 * (row[k] - row[f"ref_{k}"]) for k in ("chosen", "rejected"))
        assert (row["reward_chosen"], row["reward_rejected"]) == pytest.approx((chosen, rejected))
        margins.append(chosen - rejected)
    assert m["win_rate"]["value"] == np.mean([x > 0 for x in margins])
    assert m["avg_margin"]["value"] == pytest.approx(np.mean(margins))
    per_token = [
        (r["chosen"] - r["ref_chosen"]) / r["tokens_chosen"]
        - (r["rejected"] - r["ref_rejected"]) / r["tokens_rejected"]
        for r in rows
    ]
    assert m["win_rate_length_normalised"]["value"] == np.mean([x > 0 for x in per_token])
    assert m["avg_margin_length_normalised"]["value"] == pytest.approx(0.5 * np.mean(per_token))
    assert m["likelihood_ranking_base"]["value"] == np.mean([r["ref_chosen"] > r["ref_rejected"] for r in rows])
    assert m["calibration_log_loss"]["value"] == pytest.approx(np.mean([math.log1p(math.exp(-x)) for x in margins]))
    from scipy.stats import spearmanr

    lengths = [r["tokens_chosen"] - r["tokens_rejected"] for r in rows]
    assert m["margin_length_correlation"]["value"] == pytest.approx(spearmanr(margins, lengths).statistic)


def fake_rows(margin, chosen, rejected, gap=None, base=None):
    """Rows with given margins and token counts."""
    n = len(margin)
    gap, base = [None] * n if gap is None else gap, np.zeros(n) if base is None else base
    return [
        {
            "margin": margin[i], "tokens_chosen": chosen[i], "tokens_rejected": rejected[i],
            "score_chosen": None if gap[i] is None else 1.0 + gap[i], "score_rejected": None if gap[i] is None else 1.0,
            "ref_chosen": base[i], "ref_rejected": 0.0,
        }
        for i in range(n)
    ]  # fmt: skip


def test_slices_select_the_right_pairs():
    margin = [1.0, -1.0, 0.0, 2.0, 1.0, -3.0]
    rows = fake_rows(
        margin, [10, 20, 30, 5, 10, 8], [10, 10, 29, 10, 11, 8], [0, 1, 2, 3, None, 4], [1, 1, 1, -1, -1, 0]
    )
    groups = slices(rows, 1)
    longer = groups["by_longer_side"]
    assert {k: v["n"] for k, v in longer.items()} == {
        f"{k}, tokens": 2 for k in ("chosen longer", "rejected longer", "equal")
    }
    assert longer["chosen longer, tokens"]["win_rate"]["value"] == 0
    assert longer["chosen longer, tokens"]["win_rate_ties_half"]["value"] == 0.25
    assert longer["rejected longer, tokens"]["base_ranking"]["value"] == 0
    matched = groups["by_length_match"]
    assert {k: v["n"] for k, v in matched.items()} == {"lengths within 10%": 4, "lengths beyond 10%": 2}
    assert sum(v["n"] for v in groups["by_length"].values()) == 6
    gaps = groups["by_score_gap"]
    assert gaps["without scores"]["n"] == 1 and sum(v["n"] for v in gaps.values()) == 6
    assert "by_score_gap" not in slices(fake_rows(margin, [1] * 6, [2] * 6), 1)
    same = slices(fake_rows(margin, [7] * 6, [7] * 6), 1)
    assert list(same["by_length"]) == ["tokens 7"]


def test_calibration_recovers_known_scale():
    """Outcomes are drawn with P(chosen) = sigmoid(2 x), so margins x are underconfident by a factor of 2."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(size=4000))
    right = rng.random(4000) < 1 / (1 + np.exp(-2 * size))
    margin = np.where(right, size, -size)
    assert best_scale(margin) == pytest.approx(2, abs=0.15)
    bins = calibration_bins(2 * margin, 1)
    assert len(bins) == 10 and sum(b["n"] for b in bins) == 4000
    assert max(abs(b["accuracy"]["value"] - b["confidence"]) for b in bins) < 0.06
    metrics = calibration_metrics(margin, 1)
    assert metrics["calibration_ece"]["value"] > 0.08 > calibration_metrics(2 * margin, 1)["calibration_ece"]["value"]
    assert metrics["calibration_brier"]["value"] == pytest.approx(np.mean((1 - 1 / (1 + np.exp(-margin))) ** 2))


def test_in_order_batches_match_accelerate():
    """Compared with accelerate's BatchSamplerShard, which distributes evaluation batches."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    for count in (1, 5, 7, 8, 12, 13):
        for size in (1, 2, 3):
            for world in (1, 2, 3):
                sampler = BatchSampler(SequentialSampler(range(count)), size, drop_last=False)
                ranks = (
                    [list(BatchSamplerShard(sampler, world, r)) for r in range(world)] if world > 1 else [list(sampler)]
                )
                expected = [sorted(i for batch in step for i in batch) for step in zip(*ranks, strict=True)]
                batches = [sorted(batch) for batch in in_order_batches(count, size, world)]
                assert batches == expected, (count, size, world)


def test_longest_first_batches():
    assert longest_first_batches([3, 9, 5, 7], 3, 1) == [[1, 3, 2], [0]]
    batches = longest_first_batches([3, 9, 5], 1, 2)
    assert batches == [[2, 1], [0, 2]]


def test_compare_reports_differences():
    rows = [{"margin": 1.0, "reward_chosen": 1.0, "reward_rejected": 0.0, "chosen": -1.0, "rejected": -2.0}] * 4
    logged = {"rewards/accuracies": 1.0, "rewards/margins": 1.002, "logps/chosen": -1.0}
    comparison = compare(rows, TrainerEvaluation(logged, 2, 1))
    assert not comparison["agrees"] and set(comparison["figures"]) == set(logged)
    assert [f["agrees"] for f in comparison["figures"].values()] == [True, False, True]


# ------------------------------------------------------------------------------------------------------- length bias


def test_length_bias_counts_words(win_rate, prefs):
    from scipy.stats import binomtest

    summary, _, out = win_rate()
    assert set(summary["length_bias"]) == {"test", "train"}
    for split, bias in summary["length_bias"].items():
        rows = [json.loads(line) for line in (prefs / f"{split}.jsonl").read_text().splitlines()]
        words = [[len(row[side][-1]["content"].split()) for side in ("chosen", "rejected")] for row in rows]
        chosen, rejected = np.array(words).T
        w = bias["words"]
        assert w["mean_chosen"]["value"] == chosen.mean() and w["mean_rejected"]["value"] == rejected.mean()
        assert w["relative_difference"]["value"] == pytest.approx(chosen.mean() / rejected.mean() - 1)
        assert w["share_chosen_longer"]["value"] == (chosen > rejected).mean()
        assert w["share_equal"]["value"] == (chosen == rejected).mean()
        test = binomtest(int((chosen > rejected).sum()), int((chosen != rejected).sum()))
        assert w["p_chosen_longer_is_half"]["value"] == pytest.approx(test.pvalue)
        assert f"of {split} ({len(rows)} pairs)" in out
        assert bias["tokens"]["mean_chosen"]["value"] > 0


# ------------------------------------------------------------------------------------------- models, data, bad input


def test_merged_model_matches_adapter(call, trained, tiny, prefs, tmp_path):
    from preflab.models.loading import load_model, load_tokenizer

    merged = tmp_path / "merged"
    load_model(str(tiny), adapter=str(trained / "ck/r")).merge_and_unload().save_pretrained(merged)
    load_tokenizer(str(tiny)).save_pretrained(merged)
    args = (
        "--base_model",
        tiny,
        "--tuned_model",
        merged,
        "--dataset_name",
        prefs,
        "--split",
        "test",
        "--max_length",
        128,
    )
    code, out, err = call("eval_win_rate", *args, "--eval_out", tmp_path / "out")
    assert code == 0, err
    evaluated, own = read_json(tmp_path / "out/merged/win_rate.json"), read_json(trained / "out/r/train.json")
    assert evaluated["metrics"]["avg_margin"]["value"] == pytest.approx(
        own["metrics"]["reward_margin"]["value"], abs=1e-3
    )


def test_published_command_with_dashes(call, trained, tiny, prefs, tmp_path):
    args = ("--adapter-path", trained / "ck/r/checkpoint-4", "--base-model", tiny, "--batch-size", 4)
    args += ("--max-length", 1024, "--output-json", tmp_path / "deep/dpo_winrate.json", "--eval-out", tmp_path)
    code, out, err = call("eval_win_rate", *args)
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [
        "dpo_winrate.json", "dpo_winrate.png", "dpo_winrate_rows.jsonl",
    ]  # fmt: skip
    assert read_json(tmp_path / "deep/dpo_winrate.json")["args"]["batch_size"] == 4


def test_other_evaluation_is_not_overwritten(call, trained, prefs, tmp_path):
    assert call("eval_win_rate", *eval_args(trained, tmp_path))[0] == 0
    before = (tmp_path / "r/win_rate.json").read_text()
    other = ("--dataset_name", prefs / "test.jsonl", "--seed", 7)
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, *other))
    assert code == 2 and (tmp_path / "r/win_rate.json").read_text() == before
    assert_one_line(err, "win_rate.json", "--output_dir", "--overwrite")
    assert call("eval_win_rate", *eval_args(trained, tmp_path, *other, "--output_dir", tmp_path / "x"))[0] == 0
    # Arguments that do not change results may differ.
    assert call("eval_win_rate", *eval_args(trained, tmp_path, "--batch_size", 2, "--batch_tokens", 99))[0] == 0


def test_training_pairs_give_no_claim(call, trained, tmp_path):
    code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--split", "train"))
    assert code == 0, err
    assert out.count("NOT HELD OUT") == 1 and "NOT HELD OUT" in read_json(tmp_path / "r/win_rate.json")["claim"]


def test_battle_flags_need_battle(call, trained, tmp_path):
    for extra in (("--prompts", "x.jsonl"), ("--judge", "longer")):
        code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, *extra))
        assert code == 2
        assert_one_line(err, extra[0], "--battle")


def test_limit_marks_file_names(call, trained, tmp_path):
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--limit", 3))
    assert code == 0, err
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert names == {"win_rate_LIMIT3.json", "win_rate_LIMIT3.png", "win_rate_LIMIT3_rows.jsonl"}


def test_single_plain_text_pair(call, trained, tmp_path):
    data = write_jsonl(
        tmp_path / "one.jsonl", [{"prompt": "Say yes.", "chosen": " Yes it is.", "rejected": " No, never."}]
    )
    code, out, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--dataset_name", data))
    assert code == 0, err
    assert "1 held-out pair" in read_json(tmp_path / "r/win_rate.json")["claim"]


def test_expected_without_evaluation(call, trained, tmp_path):
    for name, text in (("a.json", "{}"), ("b.jsonl", '{"split": "train"}\n'), ("c.jsonl", "nonsense\n")):
        (tmp_path / name).write_text(text)
        code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--expected", tmp_path / name))
        assert code == 2
        assert_one_line(err, "--expected", name)


def test_adapter_of_another_base(call, trained, tiny_gemma2, smol_tokenizer, tmp_path):
    args = ("--adapter_path", trained / "ck/r", "--base_model", tiny_gemma2, "--eval_out", tmp_path)
    code, _, err = call("eval_win_rate", *args)
    assert code == 2
    assert_one_line(err, "tiny-llama", "tiny-gemma2")
    # The shapes fit, so --allow_other_base works.
    code, _, err = call("eval_win_rate", *args, "--allow_other_base")
    assert code == 0, err
    wide = save_tiny(tmp_path / "tiny-llama", smol_tokenizer, hidden_size=48)
    code, _, err = call("eval_win_rate", *args[:2], "--base_model", wide, "--eval_out", tmp_path)
    assert code == 2
    assert_one_line(err, "tiny-llama", "--allow_other_base")
    args = (*args[:2], "--base_model", wide, "--eval_out", tmp_path / "wide", "--allow_other_base")
    code, _, err = call("eval_win_rate", *args)
    assert code == 2
    assert_one_line(err, "tiny-llama")


def test_data_without_pairs(call, trained, tmp_path):
    rows = [{**row, "rejected": row["chosen"]} for row in make_pairs(3)]
    data = write_jsonl(tmp_path / "same.jsonl", rows)
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--dataset_name", data))
    assert code == 2
    assert_one_line(err, "identical_responses", "3")
    data = write_jsonl(tmp_path / "none.jsonl", [{"instruction": "a", "output": "b"}])
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--dataset_name", data))
    assert code == 2
    assert_one_line(err, "none.jsonl line 1", "--columns", "instruction, output")


def without_template(folder, copy):
    """A copy of a model's or adapter's folder whose tokenizer has no chat template."""
    import shutil

    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


def test_missing_chat_template_of_base(call, trained, tiny, tmp_path):
    plain = without_template(tiny, tmp_path / "tiny-llama")
    bare = without_template(trained / "ck/r", tmp_path / "bare")
    same = ("--base_model", plain, "--allow_other_base", "--dataset_name", "data/quickstart_prefs", "--limit", 4)
    code, out, err = call("eval_win_rate", "--adapter_path", trained / "ck/r", *same, "--eval_out", tmp_path / "a")
    assert code == 0 and (tmp_path / "a/r/win_rate_LIMIT4.json").exists(), err
    code, _, err = call("eval_win_rate", "--adapter_path", bare, *same, "--eval_out", tmp_path / "b")
    assert code == 2
    assert_one_line(err, "--chat_template_path")


def test_adapter_chat_template_is_used(call, trained, tiny, tmp_path):
    """The adapter's template wins over the base's, as in training."""
    import shutil

    from preflab.data.chat_template import ChatRenderer
    from preflab.models.loading import load_tokenizer

    other = tmp_path / "other"
    shutil.copytree(trained / "ck/r", other)
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }} says:\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant says:\n{% endif %}"
    )
    same = ("--base_model", tiny, "--dataset_name", "data/quickstart_prefs", "--split", "test", "--limit", 1)
    same = (*same, "--max_length", 1024, "--max_prompt_length", 512)  # the whole prompt, not the run's 64 tokens
    for folder in (trained / "ck/r", other):
        flags = ("--adapter_path", folder, *same, "--output_dir", tmp_path / folder.name, "--eval_out", tmp_path)
        code, _, err = call("eval_win_rate", *map(str, flags))
        assert code == 0, err
        (row,) = map(json.loads, (tmp_path / folder.name / "win_rate_LIMIT1_rows.jsonl").read_text().splitlines())
        pair = json.loads(open("data/quickstart_prefs/test.jsonl").readline())
        chat = ChatRenderer(load_tokenizer(str(folder)))
        (ids,) = chat.ids([chat.prompt_text(pair["chosen"][:-1])])
        assert row["tokens_prompt"] == len(ids)


def run_with(trained, tmp_path, **changed):
    """Flags for a copy of the tiny run with `changed` arguments in its run.json."""
    import shutil

    folder = tmp_path / "ck/r"
    shutil.copytree(trained / "ck/r", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    run = json.loads((folder / "run.json").read_text())
    run["args"] |= changed
    (folder / "run.json").write_text(json.dumps(run))
    return ("--run_name", "r", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")


def test_run_without_held_out_data(call, trained, prefs, tmp_path):
    data = str(prefs / "train.jsonl")
    args = run_with(trained, tmp_path, dataset_name=data, dataset_test_split="none")
    code, _, err = call("eval_win_rate", *args)
    assert code == 2
    assert_one_line(err, "--dataset_name")


def test_mixture_uses_every_test_split(call, trained, prefs, tmp_path):
    other = write_jsonl(tmp_path / "b/test.jsonl", make_pairs(5, 300)).parent
    mix = [{"path": str(prefs), "test_split": "test"}, {"path": str(other), "test_split": "test"}]
    args = run_with(trained, tmp_path, datasets=mix, dataset_name=None)
    code, out, err = call("eval_win_rate", *args)
    assert code == 0, err
    assert "13 held-out pairs" in out


def test_run_filters_apply_to_its_own_data(call, trained, tmp_path):
    args = run_with(trained, tmp_path, min_score_margin=4.0)
    code, out, err = call("eval_win_rate", *args)
    assert code == 0, err
    assert "score_margin_below_threshold" in out
    plain = write_jsonl(
        tmp_path / "plain.jsonl", [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "x"} for i in "ab"]
    )
    code, out, err = call("eval_win_rate", *args, "--dataset_name", plain, "--output_dir", tmp_path / "plain")
    assert code == 0, err
    assert "2 of 2 rows" in out


def test_nan_scores_are_not_cached(call, trained, tiny, tmp_path):
    import torch

    from preflab.models.loading import load_model, load_tokenizer

    broken = load_model(str(tiny), adapter=str(trained / "ck/r")).merge_and_unload()
    broken.get_input_embeddings().weight.data[:] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(tiny)).save_pretrained(tmp_path / "broken")
    data = write_jsonl(tmp_path / "x.jsonl", make_pairs(2))
    args = ("--base_model", tiny, "--tuned_model", tmp_path / "broken", "--dataset_name", data, "--eval_out", tmp_path)
    for _ in range(2):
        code, _, err = call("eval_win_rate", *args)
        assert code == 2
        assert_one_line(err, "--dtype")


def test_bad_flags_fail_before_scoring(call, trained, tmp_path, monkeypatch):
    from preflab.evaluation.two_models import TwoModels

    monkeypatch.setattr(TwoModels, "load", lambda self: pytest.fail("scored before the flags were checked"))
    for extra in (("--expected", "gone.json"), ("--length_bias_splits", "gone"), ("--expected", tmp_path)):
        code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, *extra))
        assert code == 2
        assert_one_line(err)


def test_skipped_pairs_are_counted(call, trained, tmp_path):
    rows = [*make_pairs(4), {**make_pairs(1, 9)[0], "chosen": make_pairs(1, 9)[0]["rejected"]}]
    rows.append({"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": " "}],
                 "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}]})  # fmt: skip
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path, "--dataset_name", data))
    assert code == 0, err
    summary = read_json(tmp_path / "r/win_rate.json")
    assert summary["metrics"]["skipped_examples"]["value"] == 2
    assert summary["data"]["dropped"] == {"identical_responses": 1, "empty_response": 1}
