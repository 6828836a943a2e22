"""Figures of a file beside the model, against calculations by hand and scipy."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from preflab.gguf.metrics import ensure_rounding_only, file_metrics, source_metrics
from preflab.gguf.report import render
from utils.errors import UserError

RNG = np.random.default_rng(1)
TOKENS = RNG.integers(5, 40, (60, 2))
SOURCE = -RNG.uniform(1, 3, (60, 2)) * TOKENS
FILE = SOURCE + RNG.normal(-0.5, 1.5, (60, 2))
BASE = SOURCE + RNG.normal(0, 2, (60, 2))
PROMPTS = list(range(60))
FILES = {
    "Q4_K_M": {
        "file": "r-Q4_K_M.gguf",
        "bytes": 105_000_000,
        "bits_per_weight": 6.3,
        "scored_tokens_per_second": 100.0,
        "answer_tokens_per_second": 12.0,
        "fallback_tensors": 181,
    }
}


def figures(base=BASE) -> dict:
    common = (TOKENS, 42, PROMPTS)
    return file_metrics("Q4_K_M", FILE, SOURCE, base, *common) | source_metrics(SOURCE, base, *common)


def test_figures_by_hand():
    m = {key: value["value"] for key, value in figures().items()}
    assert m["logp_difference_Q4_K_M"] == pytest.approx((FILE - SOURCE).mean())
    assert m["ppl_Q4_K_M"] == pytest.approx(math.exp(-FILE.sum() / TOKENS.sum()))
    assert m["ppl_source"] == pytest.approx(math.exp(-SOURCE.sum() / TOKENS.sum()))
    assert m["ppl_ratio_Q4_K_M"] == pytest.approx(m["ppl_Q4_K_M"] / m["ppl_source"])
    own, source = FILE[:, 0] > FILE[:, 1], SOURCE[:, 0] > SOURCE[:, 1]
    assert m["same_preference_Q4_K_M"] == pytest.approx((own == source).mean())
    reward = (FILE - BASE)[:, 0] > (FILE - BASE)[:, 1]
    reward_source = (SOURCE - BASE)[:, 0] > (SOURCE - BASE)[:, 1]
    assert m["reward_accuracy_Q4_K_M"] == pytest.approx(reward.mean())
    assert m["reward_accuracy_difference_Q4_K_M"] == pytest.approx(reward.mean() - reward_source.mean())
    gained, lost = (reward & ~reward_source).sum(), (~reward & reward_source).sum()
    assert m["p_reward_accuracy_difference_Q4_K_M"] == pytest.approx(binomtest(gained, gained + lost, 0.5).pvalue)
    # No more significant than the paired t test of the pairs' nats.
    student = ttest_1samp((SOURCE - FILE).sum(1), 0).pvalue
    assert student <= m["p_ppl_ratio_Q4_K_M"] < 1e-3


def test_rewards_need_a_base():
    assert not [key for key in figures(base=None) if "reward" in key]
    text = render(figures(base=None), FILES, "t", FILES["Q4_K_M"]).text
    assert "likelihood" in text and "reward accuracy" not in text


def test_report_fits_and_names_the_other_types():
    report = render(figures(), FILES, "run: GGUF files beside the model", FILES["Q4_K_M"], "a note")
    assert max(map(len, report.text.splitlines())) <= 100
    assert "Q4_K_M 181" in " ".join(report.text.split()) and "a note" in report.text
    assert report.verdict.startswith("The file has the model's token ids and chat template.")


def test_sixteen_bits_may_differ_by_rounding_only():
    # 10 tokens of -2 nats: 2 x 2^-11 x (20 + 32 sqrt(10)) + 0.001 = 0.119 nats are allowed in float16.
    source, tokens = np.full((1, 2), -20.0), np.full((1, 2), 10)
    ensure_rounding_only("F16", "f", source + 0.11, source, tokens)
    with pytest.raises(UserError, match="f: log-probabilities differ.*deleted"):
        ensure_rounding_only("F16", "f", source + 0.13, source, tokens)
    # A quantisation is measured, not limited.
    ensure_rounding_only("Q4_K_M", "f", source + 5, source, tokens)
    with pytest.raises(UserError, match="NaN or infinite"):
        ensure_rounding_only("Q4_K_M", "f", source * np.nan, source, tokens)
