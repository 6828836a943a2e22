"""--compare: paired differences by hand, Holm over all tests, and what is not comparable."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line
from example_runs import rewrite, write_run
from helpers import texts
from scipy.stats import binomtest, ttest_1samp


def only_training(results: Path) -> None:
    """Delete all results but those of training, and the log, so that few figures are compared and none is drawn."""
    for path in results.rglob("*"):
        if path.is_file() and path.name not in ("train.json", "heldout_rows.jsonl"):
            path.unlink()


def shifted(root: Path, name: str, seed: int) -> np.ndarray:
    """A second run on the same pairs with other margins; returns whether each pair is ranked correctly."""
    results = write_run(root, name)
    for each in (results, root / "out" / "quickstart"):
        only_training(each)
    path, rng = results / "heldout_rows.jsonl", np.random.default_rng(seed)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, noise in zip(rows, rng.normal(0.3, 0.4, len(rows)), strict=True):
        row["margin"] += noise
        row["chosen"] += noise
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return np.array([row["margin"] > 0 for row in rows], float)


def margins(results: Path) -> np.ndarray:
    return np.array([json.loads(line)["margin"] for line in (results / "heldout_rows.jsonl").read_text().splitlines()])


def test_paired_differences_by_hand(root, report):
    right = {"quickstart": (margins(root / "out/quickstart") > 0).astype(float)}
    right |= {name: shifted(root, name, seed) for name, seed in (("b", 1), ("c", 2))}
    _, page, markdown = report("--compare", "quickstart", "b", "c")
    metrics = json.loads((root / "out/report.json").read_text())["metrics"]
    p_values = {name: m["value"] for name, m in metrics.items() if name.startswith("p_Preference")}
    for name in ("b", "c"):
        figure = f"Preference training/reward accuracy, % (ties half)/{name}-quickstart"
        difference = right[name] - right["quickstart"]
        assert metrics[figure]["value"] == pytest.approx(difference.mean())
        discordant = difference[difference != 0]
        exact = binomtest(int((discordant > 0).sum()), len(discordant), 0.5).pvalue
        assert metrics[f"p_{figure}"]["value"] == pytest.approx(exact)
        margin = f"Preference training/reward margin, beta x nats/{name}-quickstart"
        change = margins(root / "out" / name) - margins(root / "out/quickstart")
        assert metrics[margin]["value"] == pytest.approx(change.mean())
        # A permutation test has no p-value below 1 / its draws.
        assert ttest_1samp(change, 0).pvalue < metrics[f"p_{margin}"]["value"] < 0.001
    # Holm (1979) over all tests, by its definition: the k-th smallest times m - k + 1, and never below the one before.
    running, m = 0.0, len(p_values)
    assert m == 10, "five figures of two runs"
    for k, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (m - k) * p))
        assert metrics[f"p_holm_{name.removeprefix('p_')}"]["value"] == pytest.approx(running)
    assert f"over all {m} tests" in texts(page) and f"over all {m} tests" in markdown


def test_no_claim_from_a_judge_that_ignores_the_answers(root, report):
    """The example's judge flips on 95% of the prompts: another run that always wins is not called better."""
    results = write_run(root, "other")
    for each in (results, root / "out" / "quickstart"):
        # Only battles are compared, and no curves drawn.
        for name in ("train.json", "train_log.jsonl", "win_rate.json", "perplexity.json", "lm_eval/quick/lm_eval.json"):
            (each / name).unlink()
    path = results / "battle_rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "consistent": 1.0}) + "\n" for row in rows))
    _, page, _ = report("--compare", "quickstart", "other")
    shown = texts(page)
    battles = shown[shown.index("wins against base under the judge, %") :][:400]
    assert "other 100.0" in battles and "no claim" in battles and "better" not in battles
    assert "No claim: the judge is unreliable" in shown

    # The same rows under a judge without that defect.
    def steady(summary):
        for match in summary["matches"]:
            for metrics in match["judges"].values():
                metrics["flip_rate"].update(value=0.1, ci95=[0.05, 0.2])

    for name in ("quickstart", "other"):
        rewrite(root / "out" / name / "battle.json", steady)
    battles = texts(report("--compare", "quickstart", "other")[1])
    assert "better" in battles[battles.index("wins against base under the judge, %") :][:400]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(claim="NOT HELD OUT: the run was trained on these prompts. (Helped.)"), "NOT HELD OUT"),
        (lambda s: s["data"]["test"].update(text_sha256="0" * 64), "other data"),
        (lambda s: s["model"].update(weights_sha256="0" * 64), "other base model"),
        (lambda s: s["args"].update(max_length=256), "other setting: max_length 256, not 512"),
        (lambda s: s["model"].update(dtype="bfloat16"), "other base model"),
    ],
    ids=["trained on", "data", "base", "setting", "precision"],
)
def test_not_comparable_is_never_in_the_column(root, report, change, reason):
    shifted(root, "other", 3)
    rewrite(root / "out/other/train.json", change)
    _, page, _ = report("--compare", "quickstart", "other")
    metrics = json.loads((root / "out/report.json").read_text())["metrics"]
    assert not any(name.startswith("Preference training") for name in metrics)
    shown = texts(page)
    listed = shown[shown.index("Not comparable") : shown.index("quickstart state finished")]
    assert re.search(f"Preference training other [^|]*{reason}", listed)
    # On the first page the figures of both runs are under different headings.
    overview = shown[shown.index("Figures of the tuned models") : shown.index("Beside published models")]
    assert "not comparable with the runs above" in overview


def test_rewards_of_another_beta(root, report):
    """Another beta changes the unit of margins, and neither accuracies nor log-probabilities."""
    shifted(root, "other", 3)
    rewrite(root / "out/other/train.json", lambda s: s["args"].update(beta=0.3))
    report("--compare", "quickstart", "other")
    metrics = json.loads((root / "out/report.json").read_text())["metrics"]
    assert "Preference training/reward accuracy, % (ties half)/other-quickstart" in metrics
    assert not any("reward margin" in name and name.startswith("Preference") for name in metrics)


def test_rows_of_other_pairs_are_not_paired(root, report):
    shifted(root, "other", 3)
    path = root / "out/other/heldout_rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "where": f"elsewhere {k}"}) + "\n" for k, row in enumerate(rows)))
    _, page, _ = report("--compare", "quickstart", "other")
    assert "other rows under the same data" in texts(page)


def logged(results: Path, right: list[int], scale: float) -> list[float]:
    """Samples of the tuned model in lm_eval's own files: right or wrong, and a score; returns the scores."""
    folder, scores = results / "lm_eval/quick/tuned-call/model", [scale * (k % 7) + k / 10 for k in range(len(right))]
    folder.mkdir(parents=True)
    figures = {"acc,none": float(np.mean(right)), "score,none": float(np.mean(scores))}
    row = {"filter": "none", "prompt_hash": "p", "metrics": ["acc", "score"], "resps": [["x"]],
           "arguments": {"gen_args_0": {"arg_0": "Q"}}}  # fmt: skip
    rows = [{**row, "doc_id": k, "doc_hash": f"d{k}", "acc": a, "score": s}
            for k, (a, s) in enumerate(zip(right, scores, strict=True))]  # fmt: skip
    (folder / "samples_t_1.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    report = {"results": {"t": {"alias": "t", **figures}}, "configs": {"t": {}},
              "higher_is_better": {"t": {"acc": True, "score": True}},
              "config": dict.fromkeys(("model", "model_args", "gen_kwargs", "limit", "batch_size"), "x")}  # fmt: skip
    (folder / "results_1.json").write_text(json.dumps(report))

    def change(summary):
        first = summary["rows"][0]
        summary["rows"] = [
            {
                **first,
                "task": "t",
                "alias": "t",
                "metric": name,
                "tuned": {**first["tuned"], "value": figures[f"{name},none"]},
            }
            for name in ("acc", "score")
        ]

    rewrite(results / "lm_eval/quick/lm_eval.json", change)
    return scores


def test_tasks_of_the_harness_by_hand(root, report):
    other = write_run(root, "other")
    for results in (root / "out/quickstart", other):
        for path in results.iterdir():
            if path.is_file():
                path.unlink()
    right = {"quickstart": [0] * 9 + [1] * 31, "other": [1] * 8 + [0] + [1] * 29 + [0] * 2}
    scores = {
        name: logged(root / "out" / name, right[name], scale) for name, scale in (("quickstart", 1), ("other", 1.2))
    }
    metrics = {}
    for seed in (42, 43):
        report("--compare", "quickstart", "other", "--seed", seed)
        metrics[seed] = json.loads((root / "out/report.json").read_text())["metrics"]
    acc, score = (f"lm-evaluation-harness, suite quick/t: {name}, none/other-quickstart" for name in ("acc", "score"))
    # 8 documents became right and 2 wrong.
    assert metrics[42][acc]["value"] == pytest.approx(6 / 40)
    assert metrics[42][f"p_{acc}"]["value"] == pytest.approx(binomtest(8, 10, 0.5).pvalue)
    change = np.subtract(scores["other"], scores["quickstart"])
    assert metrics[42][score]["value"] == pytest.approx(change.mean())
    assert metrics[42][score]["stderr"] == pytest.approx(change.std(ddof=1) / 40**0.5)
    assert metrics[42][f"p_holm_{acc}"]["value"] == pytest.approx(metrics[42][f"p_{acc}"]["value"])
    assert metrics[42][f"p_holm_{score}"]["value"] == pytest.approx(2 * metrics[42][f"p_{score}"]["value"])
    # The seed is that of the flag.
    assert metrics[42][score]["ci95"] != metrics[43][score]["ci95"]


def test_baseline_without_rows(call, root):
    write_run(root, "other")
    for path in (root / "out/quickstart").rglob("*rows.jsonl"):
        path.unlink()
    shutil.rmtree(root / "out/quickstart/lm_eval")
    folders = ("--checkpoints", root / "ck", "--eval_out", root / "out")
    code, _, err = call("report", *folders, "--compare", "quickstart", "other")
    assert code == 2 and not (root / "out/report.html").exists()
    assert_one_line(err, "--compare", "quickstart", "python eval_win_rate.py")
