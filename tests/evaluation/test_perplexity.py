"""eval_perplexity.py: equality with a slow loop, `evaluate`'s formula and lm-eval's rolling windows; bad input."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import assert_one_line, eval_args, write_jsonl
from helpers import slow_logp

from preflab.evaluation.perplexity import bos_protocol, cut_documents, prefix_id, section_metrics, text_units, windows
from preflab.models.loading import load_model, load_tokenizer
from utils.artifacts import RowFile, read_json
from utils.errors import UserError

TEXTS = [
    "The garden lay under snow, and nobody had come for weeks. A stone wall ran down to the river.",
    "Music, paper, lamps: three things she would not sell. The café's naïve clerk wrote 日本語 on the bill.",
    "Winter.",
]


@pytest.fixture
def perplexity(call, trained, tmp_path):
    """A function that runs eval_perplexity.py on the tiny run and returns (summary, rows, stdout)."""

    def calling(*extra):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        code, out, err = call("eval_perplexity", *eval_args(trained, tmp_path, *extra, "--output_dir", folder))
        assert code == 0, err
        return read_json(folder / "perplexity.json"), RowFile(folder / "perplexity_rows.jsonl").read(), out

    return calling


@pytest.fixture(scope="module")
def both(tiny, trained):
    """Base and tuned, loaded separately from the script."""
    return load_model(str(tiny)).eval(), load_model(str(tiny), adapter=str(trained / "ck/r")).eval()


def slow_nll(model, ids, start):
    with torch.no_grad():
        return -slow_logp(model, ids[:start], ids[start:])


# ------------------------------------------------------------------------------------------------------------- pairs


def test_pair_scores_match_slow_loop(perplexity, both, prefs, smol_tokenizer):
    import json

    summary, rows, out = perplexity()
    pairs = [json.loads(line) for line in (prefs / "test.jsonl").read_text().splitlines()]
    totals = {}
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            prompt, full = (
                smol_tokenizer(smol_tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=g))[
                    "input_ids"
                ]
                for m, g in ((pair[side][:-1], True), (pair[side], False))
            )
            for part, start in (("response", len(prompt)), ("whole", 1)):
                nlls = [slow_nll(model, full, start) for model in both]
                assert [row[f"nll_{part}_{side}_{m}"] for m in ("base", "tuned")] == pytest.approx(nlls, rel=1e-4)
                assert row[f"tokens_{part}_{side}"] == len(full) - start
                totals.setdefault((part, side), []).append([*nlls, len(full) - start])
            # The answer and the newline after its end of turn.
            assert row[f"bytes_response_{side}"] == len(pair[side][-1]["content"].encode()) + 1
    for (part, side), values in totals.items():
        base, tuned, tokens = np.array(values).T
        for name, nll in (("base", base), ("tuned", tuned)):
            m = {k: summary["metrics"][f"{part}_{side}_{k}_{name}"]["value"] for k in ("ppl", "ppl_mean", "nll")}
            assert m["ppl"] == pytest.approx(math.exp(nll.sum() / tokens.sum()), rel=1e-3)
            assert m["ppl_mean"] == pytest.approx(np.exp(nll / tokens).mean(), rel=1e-3)
            assert m["nll"] == pytest.approx(nll.sum() / tokens.sum(), rel=1e-3)
        change = summary["metrics"][f"{part}_{side}_nll_difference"]
        assert change["value"] == pytest.approx((tuned - base).sum() / tokens.sum(), rel=1e-2, abs=1e-5)
        assert change["ci95"][0] <= change["value"] <= change["ci95"][1]
    assert summary["metrics"]["kl_chosen"]["value"] > 0 and "KL(tuned || base)" in out
    assert "(8 pairs)" in out and set(summary["length_bias"]) == {"test", "train"}


def test_kl_per_answer_token_and_skip_kl(perplexity, both, trained, tmp_path):
    summary, rows, _ = perplexity()
    total = sum(r["kl_rejected"] for r in rows) / sum(r["tokens_response_rejected"] for r in rows)
    assert summary["metrics"]["kl_rejected"]["value"] == pytest.approx(total)
    summary, rows, out = perplexity("--skip_kl")
    assert rows[0]["kl_chosen"] is None and "kl_chosen" not in summary["metrics"] and "KL(" not in out


# -------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("bos", ["once", "per_window", "none"])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (50, 50), (7, 7)])
def test_windows_predict_each_token_once(bos, window, stride):
    for count in (1, 5, 7, 8, 9, 16, 20, 23):
        cut = windows(count, window, stride, bos)
        assert [t for _, first, end in cut for t in range(first, end)] == list(range(count))
        for k, (context, first, end) in enumerate(cut):
            inputs = end - 1 - context + (bos == "per_window" or (bos == "once" and k == 0))
            assert context <= first and inputs <= window
            if k and bos == "once":
                assert inputs == window
            if k and stride == window and end - first == window:
                assert first - context == (bos != "per_window")


def test_text_scores_match_slow_loop(perplexity, both, smol_tokenizer, tmp_path):
    text = " ".join(TEXTS) * 3
    (tmp_path / "t.txt").write_text(text)
    ids = smol_tokenizer(text, add_special_tokens=False)["input_ids"]
    bos, last = smol_tokenizer.bos_token_id, None
    for window, stride in ((16, 16), (16, 5), (4096, 4096)):
        flags = ("--text_file", tmp_path / "t.txt", "--skip_pairs", "--window", window, "--stride", stride)
        summary, rows, _ = perplexity(*flags)
        for side, model in zip(("base", "tuned"), both, strict=True):
            total = 0.0
            for position in range(len(ids)):
                # The window that predicts this token, computed differently from the code.
                end = min(window, len(ids))
                while position >= end:
                    end = min(end + stride, len(ids))
                context = [bos, *ids][: position + 1] if end <= window else ids[max(0, end - window - 1) : position]
                total += slow_nll(model, [*context, ids[position]], len(context))
            assert summary["metrics"][f"text_nll_{side}"]["value"] == pytest.approx(total / len(ids), rel=1e-4)
            bits = summary["metrics"][f"text_bits_per_byte_{side}"]["value"]
            assert bits == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-4)
        assert summary["metrics"]["text_tokens"]["value"] == len(ids) == sum(row["tokens"] for row in rows)
        assert summary["metrics"]["text_bytes"]["value"] == len(text.encode())
        assert f"windows of {window} input tokens, moved by {stride}" in summary["protocol"]["text"]
        last = summary
    assert last["protocol"]["unit_that_is_resampled"] == {"text": "windows"}
    assert last["metrics"]["text_ppl_base"]["ci95"] is None


def test_mean_matches_evaluate_perplexity(perplexity, both, smol_tokenizer, tmp_path):
    """evaluate/metrics/perplexity with add_start_token: BOS before each text, mean over texts of exp(mean nll)."""
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    summary, _, _ = perplexity("--text_dataset", data, "--skip_pairs", "--bos", "once")
    for side, model in zip(("base", "tuned"), both, strict=True):
        ppls = []
        for text in TEXTS:
            ids = torch.tensor([[smol_tokenizer.bos_token_id, *smol_tokenizer(text)["input_ids"]]])
            with torch.no_grad():
                logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
            ppls.append(math.exp(loss.sum() / len(loss)))
        assert summary["metrics"][f"text_ppl_mean_{side}"]["value"] == pytest.approx(np.mean(ppls), rel=1e-3)
    assert summary["protocol"]["unit_that_is_resampled"] == {"text": "documents"}


def rolling(model, tokenizer, text, max_length):
    """lm-eval's rolling log-likelihood of a text, in nats."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1, device="cpu")
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    return lm.loglikelihood_rolling([request], disable_tqdm=True)[0]


@pytest.mark.parametrize("window", [16, 2000])
def test_text_matches_lm_eval_rolling(perplexity, both, smol_tokenizer, tmp_path, window):
    text = " ".join(TEXTS)
    (tmp_path / "t.txt").write_text(text)
    summary, _, _ = perplexity("--text_file", tmp_path / "t.txt", "--skip_pairs", "--window", window)
    assert "one BOS" in summary["protocol"]["text"]
    m = summary["metrics"]
    for side, model in zip(("base", "tuned"), both, strict=True):
        ours = -m[f"text_nll_{side}"]["value"] * m["text_tokens"]["value"]
        assert ours == pytest.approx(rolling(model, smol_tokenizer, text, window), rel=1e-3)


def test_known_difference_to_lm_eval_with_bos(tiny_gemma2, tmp_path):
    """The known difference (lm-evaluation-harness issue 3333): its total is ours plus log P(BOS | BOS)."""
    from tokenizers.processors import TemplateProcessing

    tokenizer, model = load_tokenizer(str(tiny_gemma2)), load_model(str(tiny_gemma2)).eval()
    bos = tokenizer.bos_token_id
    opening = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.backend_tokenizer.post_processor = opening
    assert tokenizer("x")["input_ids"][0] == bos and bos_protocol("auto", tokenizer) == "per_window"
    text = TEXTS[0]
    sequences, rows = cut_documents([{"where": "t", "text": text}], tokenizer, 500, 500, "per_window")
    ours = -slow_nll(model, sequences[0].ids, sequences[0].start)
    lm_eval_score = rolling(model, tokenizer, text, 500)
    # lm-eval scores P(BOS | BOS) first, so every later token sees two BOS.
    with torch.no_grad():
        double = slow_logp(model, [bos, bos], sequences[0].ids[1:])
        bos_given_bos = slow_logp(model, [bos], [bos])
    assert lm_eval_score == pytest.approx(double + bos_given_bos, rel=1e-3)
    assert abs(lm_eval_score - ours) > 1 and sequences[0].ids.count(bos) == 1


def test_bytes_of_split_characters_add_up(smol_tokenizer):
    text = "日本語 naïve 🙂 " * 20
    for window in (3, 7, 64):
        _, rows = cut_documents([{"where": "t", "text": text}], smol_tokenizer, window, window, "once")
        assert sum(row["bytes"] for row in rows) == len(text.encode())
    _, rows = cut_documents([{"where": "t", "text": "One"}], smol_tokenizer, 8, 8, "none")
    assert rows == []


def test_bytes_are_those_of_scored_tokens(smol_tokenizer):
    """Without BOS the first token is not scored: neither its nats nor its bytes count."""
    text = "Internationally, tea has a long history."
    first, *others = smol_tokenizer(text, add_special_tokens=False)["input_ids"]
    size = len(smol_tokenizer.decode(others).encode())
    assert size == len(text.encode()) - len(smol_tokenizer.decode([first]).encode())
    for window in (3, 64):
        for bos, expected in (("none", size), ("once", len(text.encode())), ("per_window", len(text.encode()))):
            sequences, rows = cut_documents([{"where": "t", "text": text}], smol_tokenizer, window, window, bos)
            assert sum(row["bytes"] for row in rows) == expected
            assert sum(row["tokens"] for row in rows) == len(others) + (bos != "none")


def test_bos_protocol_of_tokenizers(smol_tokenizer, gemma_like_tokenizer):
    assert bos_protocol("auto", smol_tokenizer) == "once" and prefix_id(smol_tokenizer) == smol_tokenizer.bos_token_id
    assert bos_protocol("none", smol_tokenizer) == "none"


def test_section_metrics():
    from scipy.stats import permutation_test

    rng = np.random.default_rng(3)
    tokens, size = rng.integers(5, 50, 14).astype(float), rng.integers(20, 200, 14).astype(float)
    base = tokens * rng.uniform(2, 3, 14)
    tuned = base + tokens * rng.normal(0.02, 0.05, 14)
    m = section_metrics("x", np.stack([base, tuned, tokens, size], 1), 1)
    assert m["x_ppl_ratio"]["value"] == pytest.approx(math.exp((tuned - base).sum() / tokens.sum()))
    assert m["x_ppl_difference"]["value"] == pytest.approx(m["x_ppl_tuned"]["value"] - m["x_ppl_base"]["value"])
    # The test of the units' sums; skewness can raise its p-value, never lower it.
    flips = permutation_test((tuned - base,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert flips - 1e-9 <= m["p_x_nll_difference"]["value"] <= 2.5 * flips
    # Standard error of a ratio of sums by the delta method.
    r = base.sum() / tokens.sum()
    delta = np.sqrt(((base - r * tokens) ** 2).sum() * 14 / 13) / tokens.sum()
    assert m["x_nll_base"]["stderr"] == pytest.approx(delta)


def test_text_units_are_documents_or_windows():
    rows = [
        {"document": d, "window": w, "nll_base": b, "nll_tuned": b + 1, "tokens": 2, "bytes": 5}
        for d, w, b in ((0, 0, 3.0), (0, 1, 4.0), (1, 0, 5.0))
    ]
    units, unit = text_units(rows)
    assert unit == "documents" and units.tolist() == [[7, 9, 4, 10], [5, 6, 2, 5]]
    units, unit = text_units(rows[:2])
    assert unit == "windows" and units.tolist() == [[3, 4, 2, 5], [4, 5, 2, 5]]


# --------------------------------------------------------------------------------------------------------- bad input


def test_empty_and_binary_texts_are_errors(call, trained, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}])
    write_jsonl(tmp_path / "other.jsonl", [{"body": "x"}])
    for flag, name, detail in (
        ("--text_file", "empty.txt", "empty"),
        ("--text_file", "binary.txt", "UTF-8"),
        ("--text_dataset", "blank.jsonl", "empty"),
        ("--text_dataset", "other.jsonl", "--text_column"),
    ):
        code, _, err = call("eval_perplexity", *eval_args(trained, tmp_path, "--skip_pairs", flag, tmp_path / name))
        assert code == 2
        assert_one_line(err, name, detail)


def test_lone_surrogates_in_a_text_column_are_named(tmp_path):
    from preflab.evaluation.perplexity import read_documents

    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "whole"}) + "\n" + json.dumps({"text": "cut \ud83d"}) + "\n")
    with pytest.raises(UserError, match="texts.jsonl line 2: text is not valid Unicode"):
        read_documents([], str(path), None, "test", "text")


def test_line_ends_and_byte_order_mark_are_not_text(tmp_path):
    from preflab.evaluation.perplexity import read_documents

    (tmp_path / "unix.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    names = [str(tmp_path / name) for name in ("unix.txt", "windows.txt")]
    documents, _ = read_documents(names, None, None, "test", "text")
    assert documents[0]["text"] == documents[1]["text"] == "one\ntwo\n"
