"""The report: its figures are those of the artifacts; what is missing or damaged is named; warnings and lineage."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from example_runs import ATTACK, EXAMPLE, rewrite, write_run
from helpers import elements, texts

from preflab.reporting.artifacts import read_all
from preflab.reporting.published import COLUMNS, published_table, read_comparison

# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_artifacts(report):
    out, page, markdown = report()
    shown = texts(page)
    metrics = {name: json.loads((EXAMPLE / f"{name}.json").read_text())["metrics"] for name in ("train", "perplexity")}
    accuracy = metrics["train"]["reward_accuracy"]
    low, high = (100 * (x - 0.5) for x in accuracy["ci95"])
    for text in (
        f"{100 * accuracy['value']:.1f} ± {100 * accuracy['stderr']:.1f}",
        f"[+{low:.1f}, +{high:.1f}]",
        f"{metrics['perplexity']['response_chosen_ppl_base']['value']:.3f}",
    ):
        assert text in shown and text in markdown.replace("\\", ""), text
    for name in ("train", "win_rate", "perplexity", "battle"):
        claim = json.loads((EXAMPLE / f"{name}.json").read_text())["claim"]
        assert " ".join(claim.split()) in shown
    # How to repeat: command and commit of every stage.
    run = json.loads((EXAMPLE / "win_rate.json").read_text())["run"]
    assert run["git_commit"] in shown and "python eval_win_rate.py" in shown and "trl 1.16.0" in shown
    assert "report.html" in out and "1 run" in json.loads((Path(out.split("wrote ")[1].split(":")[0]) / "report.json")
                                                          .read_text())["claim"]  # fmt: skip


def test_page_is_self_contained(root, report):
    for name in ("dpo_training_curves", "win_rate", "perplexity", "battle"):
        shutil.copy(EXAMPLE / f"{name}.png", root / "out" / "quickstart")
    _, page, _ = report()
    assert page.count("<script>") == 1 and page.count("<style>") == 1
    for tag, attributes in elements(page):
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "action", "srcset", "data"):
            target = attributes.get(name) or ""
            # Links inside answers are opened by the reader only.
            allowed = ("#", "data:image/png;base64,") + (("http://", "https://", "mailto:") if tag == "a" else ())
            assert not target or target.startswith(allowed), target
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy and "img-src data:" in policy
    assert page.count("data:image/png;base64,") >= 4


def test_texts_are_escaped(root, report):
    results = root / "out" / "quickstart"
    rows = [json.loads(line) for line in (results / "battle_rows.jsonl").read_text().splitlines()]
    rows[0]["answer_a"]["text"], rows[0]["text"], rows[0]["category"] = ATTACK, f"Prompt {ATTACK}", ATTACK
    (results / "battle_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite(results / "train.json", lambda s: s.update(claim=f"Claim {ATTACK}", text=ATTACK, warning=f"Warn {ATTACK}"))
    command = {"command": ["eval_win_rate.py", ATTACK], "git_commit": ATTACK}
    rewrite(results / "win_rate.json", lambda s: s["run"].update(command))
    _, page, markdown = report()
    tags = [tag for tag, _ in elements(page)]
    assert tags.count("script") == 1 and all(a.get("src", "data:").startswith("data:") for t, a in elements(page))
    assert "window.hacked" in texts(page), "the text is shown"
    assert "+21.7 [+13.0, +29.0] p=2.3e-06" in markdown
    # In Markdown, outside code, nothing starts a tag.
    outside = re.sub(r"`[^`]*`", "", markdown)
    assert "Claim &lt;script>" in markdown and "<script" not in outside and "<img" not in outside


# --------------------------------------------------------------------------------------------------- missing or damaged


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.write_text("{"), "not valid JSON"),
        (lambda f: f.write_text("[]"), "is no summary"),
        (lambda f: rewrite(f, lambda s: s.pop("metrics")), "has no section `metrics`"),
        (lambda f: rewrite(f, lambda s: s["metrics"].pop("avg_margin")), "has no avg_margin"),
        (lambda f: rewrite(f, lambda s: s["metrics"].update(avg_margin={"n": 3})), "metric avg_margin has no value"),
        (lambda f: rewrite(f, lambda s: s["metrics"]["win_rate"].update(value="much")), "'much' is not a number"),
        (lambda f: f.write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda f: rewrite(f, lambda s: s["run"].update(limit=["4"])), "`limit` is not of the kind"),
        (lambda f: rewrite(f, lambda s: s.update(data=[1])), "`data` is not of the kind"),
    ],
    ids=["cut off", "a list", "no metrics", "a metric missing", "no value", "text", "binary", "limit", "data"],
)  # fmt: skip
def test_damaged_artifact_is_named(root, report, damage, words):
    damage(root / "out" / "quickstart" / "win_rate.json")
    _, page, markdown = report()
    shown = texts(page)
    assert words in shown and words in markdown.replace("\\", "")
    # The section has no figures at all: not a partial table, and no zeros.
    section = shown[shown.index("Do implicit rewards rank held-out pairs correctly?") :]
    section = section[: section.index("What happened to the model's language?")]
    assert "There are no figures of it here" in section and "win rate by reward" not in section
    assert "71.7 ± 4.1" in shown, "the other stages are shown"


def test_figure_without_a_value_is_a_dash(root, report):
    rewrite(root / "out/quickstart/train.json", lambda s: s["metrics"]["reward_accuracy"].update(value=None, ci95=None))
    _, page, _ = report()
    assert "reward accuracy, % (ties half) 50.0 by def. - - p=" in texts(page)


def test_missing_stages_are_listed_with_their_command(root, report):
    for name in ("battle.json", "perplexity.json"):
        (root / "out" / "quickstart" / name).unlink()
    _, page, _ = report()
    folders = f"--run_name quickstart --checkpoints {root}/ck --eval_out {root}/out"
    assert f"Battles: python eval_win_rate.py --battle {folders}" in texts(page)
    assert f"Perplexity: python eval_perplexity.py {folders}" in texts(page)


def test_damaged_log_and_rows(root, report):
    write_run(root, "second")
    (root / "out/second/train_log.jsonl").write_text("{\n")
    (root / "out/second/battle_rows.jsonl").write_text('{"a": 1}\n')
    out, page, _ = report()
    assert "train_log.jsonl" in out and "train_log.jsonl" in texts(page)
    assert "battle.json: its answers are not as the stage writes them" in texts(page)


def test_empty_folders(call, tmp_path):
    folders = ("--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    assert call("report", *folders)[0] == 0 and "bash quickstart.sh" in (tmp_path / "out/report.html").read_text()
    code, out, _ = call("report", *folders, "--status")
    assert code == 0 and "bash quickstart.sh" in out


# ------------------------------------------------------------------------------------------------------------ warnings


def test_warnings(root, report):
    results = root / "out" / "quickstart"
    rewrite(results / "win_rate.json", lambda s: s["run"].update(limit=4))
    rewrite(results / "train.json", lambda s: s.update(warning="likelihood displacement: both fell"))
    rewrite(results / "train.json", lambda s: s["data"]["train"]["dropped"].update(prompt_in_test_split_kept=3))
    rewrite(results / "train.json", lambda s: s["plan"].update(steps=4, steps_per_epoch=30))
    rewrite(results / "preflight.json", lambda s: s["truncation"].update(truncated_chosen=48))
    rewrite(results / "battle.json", lambda s: s["answers"]["tuned"]["truncated_share"].update(value=0.4, stderr=0.1))
    for part in ("share_chosen_longer", "p_chosen_longer_is_half"):
        rewrite(results / "perplexity.json", lambda s, p=part: s["length_bias"]["test"]["words"][p].update(value=0.01))
    _, page, _ = report()
    shown = texts(page)
    for words in (
        "a trial on --limit 4",
        "training ended after 4 of the 30 steps of one epoch (--max_steps)",
        "likelihood displacement: both fell",
        "3 prompts of the train data are also in the test split",
        "48 of 240 pairs have a truncated chosen (20%)",
        "40.0 ± 10.0% of the answers of tuned reached the token limit",
        "length bias of test (120 pairs)",
    ):
        assert words in shown, words


def test_overlap_with_training_data(root, report):
    """What --contamination counted, of a prompt set and of a harness's tasks."""
    results, data = root / "out" / "quickstart", {"training_data": "my/data"}
    counts = {"documents": 60, "removed": {"13": 2, "8": 5}}
    rewrite(results / "battle.json", lambda s: s.update(contamination=[{**data, **counts}]))
    tasks = {
        "a": {"documents": 10, "overlapping": {"13": 0, "8": 1}},
        "b": {"documents": 7, "overlapping": {"13": 0, "8": 2}},
    }
    rewrite(results / "lm_eval/quick/lm_eval.json", lambda s: s.update(contamination={**data, "tasks": tasks}))
    _, page, _ = report()
    shown = texts(page)
    assert "of 60 documents 2 share a 13-gram and 5 share an 8-gram of words with my/data" in shown
    assert "of 17 documents 3 share an 8-gram of words with my/data" in shown and "0 share" not in shown


def test_displacement_of_an_evaluation(root, report):
    """eval_win_rate.py does not store the warning; the report finds it from both intervals."""

    def fall(summary):
        for side in ("chosen", "rejected"):
            summary["metrics"][f"logps_{side}_difference"] |= {"value": -2.0, "ci95": [-3.0, -1.0]}
            summary["metrics"][f"p_logps_{side}_difference"]["value"] = 0.001

    rewrite(root / "out/quickstart/win_rate.json", fall)
    assert "likelihood displacement" in texts(report()[1])


@pytest.mark.parametrize(("passed", "words"), [(True, "audit passed"), (False, "audit failed"), (None, "no audit")])
def test_judge_audits(root, report, passed, words):
    folder = root / "out" / "quickstart" / "alpacaeval"
    folder.mkdir()
    metric = {"value": 40.0, "stderr": 2.0, "ci95": [36.0, 44.0], "n": 8}
    metrics = {f"{side}_{name}": metric for side in ("base", "tuned") for name in ("win_rate", "discrete_win_rate")}
    for side in ("base", "tuned"):
        for name in ("avg_length", "longer_win_rate", "random_win_rate", "n_total", "unparsed"):
            metrics[f"{side}_{name}"] = {**metric, "value": 0 if name == "unparsed" else 30}
    metrics |= {"difference_win_rate": metric, "p_difference_win_rate": {**metric, "value": 0.01}}
    of_judge = {key: {**metric, "value": 0.6, "ci95": [0.5, 0.7]} for key in (
        "agreement", "agreement_length_matched", "flip_rate", "prefers_longer", "parsed_share")}  # fmt: skip
    audit = None
    if passed is not None:
        ahead = {"difference": {**metric, "value": 0.1, "ci95": [0.01, 0.2]}, "p": {**metric, "value": 0.01}}
        audit = {"judge": "hf:x", "passed": passed, "verdict": "the verdict", "audits": {"hf:x": of_judge},
                 "against_longer": ahead}  # fmt: skip
    summary = {"stage": "alpacaeval", "model": {}, "metrics": metrics, "args": {"judge": "hf:x"},
               "run": {"limit": None}, "claim": "c", "text": "t", "audit": audit}  # fmt: skip
    (folder / "alpacaeval.json").write_text(json.dumps(summary))
    shown = texts(report()[1])
    judges = shown[shown.index("Judges") :]
    assert f"{words} AlpacaEval, hf:x:" in judges


# ----------------------------------------------------------------------------------------------- published and lineage


def test_published_rows_agree_with_the_other_files():
    """The comparison's rows repeat figures of other files of published results."""
    import yaml

    rows = read_comparison(str(ROOT / "configs/published/comparison.yaml"))["rows"]
    arena = yaml.safe_load((ROOT / "configs/published/arena_hard_gemma2.yaml").read_text())["rows"]
    for name, row in arena.items():
        assert (rows[name]["ah"], rows[name]["ah_length"]) == (row["score"], row["tokens"])
        averages = yaml.safe_load((ROOT / f"configs/lm_eval/reference/{name}.yaml").read_text())["averages"]
        assert (rows[name]["gsm8k"], rows[name]["mmlu"]) == (averages["GSM8K generated"], averages["MMLU generated"])
    alpaca = yaml.safe_load((ROOT / "configs/published/alpacaeval.yaml").read_text())["rows"]["gemma-2-9b-it"]
    first = rows["gemma-2-9b-it"]
    assert [first[k] for k in ("ae_lc", "ae_wr", "ae_length")] == [
        alpaca[k] for k in ("length_controlled_winrate", "win_rate", "avg_length")
    ]


def test_published_layout(root, report):
    """GSM8K of the suite `generated` is beside the published figures, marked as made in another way."""
    folder = root / "out/quickstart/lm_eval/generated"
    shutil.copytree(root / "out/quickstart/lm_eval/quick", folder)

    def generated(summary):
        figure = {"value": 12.5, "stderr": 1.5, "ci95": None, "n": None}
        summary["suite"]["name"] = "generated"
        summary["averages"] = {
            "GSM8K generated": {"base": figure, "tuned": {**figure, "value": 14.0}, "difference": figure, "p": 0.2}
        }
        summary["generated_characters"] = {side: {"gsm8k_cot_zeroshot": 321.0} for side in ("base", "tuned")}

    rewrite(folder / "lm_eval.json", generated)
    runs = read_all(root / "ck", root / "out")
    table = published_table(runs, read_comparison(str(ROOT / "configs/published/comparison.yaml")))
    lines = {line[0]: dict(zip([key for key, _, _ in COLUMNS], line[1:], strict=True)) for line in table.body[1:]
             if len(line) > 1}  # fmt: skip
    assert lines["gemma-2-9b-it-SimPO"]["gsm8k"] == "88.0" and lines["Gemma-2-9B-It-SPPO-Iter1"]["ah"] == "-"
    assert lines["quickstart: tuned"]["gsm8k"] == "≠ 14.0 ± 1.5" and lines["quickstart: base"]["ae_lc"] == "-"
    assert lines["quickstart: tuned"]["gsm8k_length"] == "≠ 321" and "lm-eval's prompts" in table.note
    assert "≠ 14.0 ± 1.5" in texts(report()[1])


def test_lineage(root, report):
    """base -> SFT -> pairs -> SPPO 1 -> pairs -> SPPO 2."""

    def training(name: str, stage: str, **args) -> None:
        results = write_run(root, name)
        for path in results.iterdir():
            if path.is_file() and path.name != "train.json":
                path.unlink()
        shutil.rmtree(results / "lm_eval")
        losses = {} if stage == "sft" else {"loss_type": ["sppo"]}
        for path in (results / "train.json", root / "ck" / name / "run.json"):
            rewrite(path, lambda s: s["args"].update(model_name_or_path="org/base", **losses, **args))
        rewrite(results / "train.json", lambda s: s.update(stage=stage, metrics={}))

    def pairs(name: str, adapter: str) -> None:
        (root / "out" / name).mkdir()
        args = {"model_name_or_path": "org/base", "adapter_path": adapter, "dataset_name": "prompts"}
        content = {"stage": "preference_pairs", "model": {}, "metrics": {}, "args": args, "run": {}, "claim": "c"}
        (root / "out" / name / "preference_pairs.json").write_text(json.dumps(content))

    training("sft", "sft", loss_on="responses")
    policy = "checkpoints/sft"
    for k in (1, 2):
        pairs(f"pairs{k}", policy)
        training(f"sppo{k}", "train", dataset_name=f"eval_out/pairs{k}", start_adapter=policy,
                 start_adapter_use="continue")  # fmt: skip
        policy = f"checkpoints/sppo{k}"
    _, page, markdown = report()
    order = [re.search(r"^( *)- (\w+)", line) for line in markdown.split("## Lineage")[1].split("##")[0].splitlines()]
    depths = {match[2]: len(match[1]) // 2 for match in order if match}
    expected = {"base": 0, "sft": 1, "pairs1": 2, "sppo1": 3, "pairs2": 4, "sppo2": 5}
    assert {name: depths[name] for name in expected} == expected
    assert re.search(r"base base → sft .*→ pairs1 .*→ sppo1 .*→ pairs2 .*→ sppo2", texts(page))
