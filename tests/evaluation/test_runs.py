"""Runs on disk: the latest, the list with states and figures, renamed and moved runs, one run against another."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, eval_args, train_args
from filelock import FileLock

from preflab.evaluation.arguments import ULTRAFEEDBACK, ComparisonArguments, ContaminationArguments
from preflab.evaluation.comparison import held_out_sources
from preflab.evaluation.contamination import TrainingText
from preflab.evaluation.run_list import disk, list_of_runs
from preflab.evaluation.runs import TIME_FORMAT, latest_run, lock_path, read_run
from preflab.training.run_folder import write_manifest
from utils.artifacts import metric, read_json, write_json, write_rows
from utils.errors import UserError
from utils.tables import duration

LORA = {"loss_type": ["sigmoid"], "use_peft": True, "model_name_or_path": "org/base-1b", "limit": None}


def make_run(root: Path, name: str, finished: bool = True, args: dict = LORA, **figures) -> Path:
    """The files of a run with one saved step of three, without weights that could be loaded; its weights' folder."""
    weights, results = root / "ck" / name, root / "out" / name
    (weights / "checkpoint-1").mkdir(parents=True)
    write_manifest(weights / "checkpoint-1", step=1, seconds=70.0)
    write_json(results / "preflight.json", {"plan": {"steps": 3}})
    write_rows(results / "train_log.jsonl", [{"split": "train", "step": step} for step in (1, 2)])
    manifest = {"args": args, "finished": finished}
    if finished:
        (weights / "adapter_config.json").write_text("{}")
        metrics = {name: metric(value, None, (value - 0.1, value + 0.1), 8) for name, value in figures.items()}
        write_json(results / "train.json", {"metrics": metrics, "training": {"seconds": 150.0}})
        manifest["finished_utc"] = time.strftime(TIME_FORMAT, time.gmtime(1000))
    write_json(weights / "run.json", manifest)
    return weights


def listed(root: Path) -> str:
    text = list_of_runs(root / "ck", root / "out")
    assert max(map(len, text.replace(str(root), "").splitlines())) <= 100
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------- the latest


def test_latest_run_finished_last(tmp_path):
    with pytest.raises(UserError, match=r"bash quickstart\.sh"):
        latest_run(tmp_path)
    for age, (name, finished) in enumerate([("newest", False), ("b", True), ("a", True)]):
        write_json(tmp_path / name / "run.json", {"args": {}, "finished": finished})
        os.utime(tmp_path / name / "run.json", (1000 - age, 1000 - age))
    assert latest_run(tmp_path) == "b"


def test_latest_run_does_not_depend_on_file_times(tmp_path):
    """Copying a folder gives its files new times; the recorded end of training decides."""
    for name, seconds in (("older", 1000), ("newer", 2000)):
        ended = time.strftime(TIME_FORMAT, time.gmtime(seconds))
        write_json(tmp_path / name / "run.json", {"args": {}, "finished": True, "finished_utc": ended})
    os.utime(tmp_path / "newer" / "run.json", (500, 500))
    assert latest_run(tmp_path) == "newer"


def test_unfinished_runs_are_named_where_none_is_finished(tmp_path):
    make_run(tmp_path, "half", finished=False)
    with pytest.raises(UserError, match=r"half: not finished"):
        latest_run(tmp_path / "ck")


def test_damaged_run_does_not_hide_the_latest(tmp_path, capsys):
    make_run(tmp_path, "whole")
    (tmp_path / "ck" / "broken").mkdir()
    (tmp_path / "ck" / "broken" / "run.json").write_text("{")
    assert latest_run(tmp_path / "ck") == "whole"
    assert "broken/run.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ the list


def test_states(tmp_path):
    make_run(tmp_path, "done", reward_accuracy=0.7)
    trial = make_run(tmp_path, "done_LIMIT16", args={**LORA, "limit": 16})
    half = make_run(tmp_path, "half", finished=False, args={**LORA, "load_in_4bit": True})
    (make_run(tmp_path, "gone") / "adapter_config.json").unlink()
    (tmp_path / "out" / "gone" / "train.json").write_text('{"metrics"')
    (make_run(tmp_path, "broken") / "run.json").write_text("{")
    write_json(tmp_path / "ck" / "checked" / "run.json", {"args": {"loss_on": "answers"}, "finished": False})
    write_json(tmp_path / "out" / "checked" / "preflight.json", {"plan": {"steps": 3}})
    write_json(tmp_path / "ck" / "started" / "run.json", {"args": LORA, "finished": False})
    write_json(tmp_path / "ck" / "merged" / "merged_from.json", {})
    write_json(tmp_path / "out" / "pairs" / "manifest.json", {})

    def state(name):
        return read_run(tmp_path / "ck" / name, tmp_path / "out" / name)

    assert state("done").state == "finished" and state("done").seconds == 150.0 and state("done").base == "base-1b"
    assert state(trial.name).state == "finished, trial of 16 rows"
    assert state("half").state == "interrupted at step 2 of 3, saved at 1" and state("half").seconds == 70.0
    assert state("half").trains == "DPO sigmoid, QLoRA" and state("checked").trains == "SFT, full"
    assert state("gone").state == "finished, weights missing, train.json damaged"
    assert state("broken").state == "damaged: run.json cannot be read"
    assert state("checked").state == "preflight only"
    assert state("started").state == "failed before its first step"
    assert state("merged").state == "merged model" and state("pairs").state == "preference pairs"
    with FileLock(lock_path(half)):
        assert state("half").state == "running at step 2 of 3"
    files = [p for folder in ("ck", "out") for p in (tmp_path / folder / "done").rglob("*") if p.is_file()]
    assert state("done").size == sum(p.stat().st_size for p in files)


def test_list_shows_figures_and_names_damaged_ones(tmp_path):
    make_run(tmp_path, "one", reward_accuracy=0.7, reward_margin=0.2)
    make_run(tmp_path, "two", reward_accuracy=0.6)
    write_json(tmp_path / "out/one/perplexity.json", {"metrics": {"text_ppl_tuned": {"value": None}}})
    (tmp_path / "out/two/win_rate.json").write_text("")
    write_json(tmp_path / "out/two/battle.json", {"stage": "battle"})
    averages = {"average/tuned": metric(0.5), "task/acc,none/tuned": metric(0.1)}
    write_json(tmp_path / "out/one/lm_eval/nous/lm_eval.json", {"metrics": averages})
    text = listed(tmp_path)
    assert "70.0 [60.0, 80.0] 8 train.json two 60.0 [50.0, 70.0] 8 train.json" in text
    assert "lm-eval nous, average one" in text and "0.1" not in text.split("lm-eval")[1].split("nous/")[0]
    assert "two not valid JSON win_rate.json" in text and "two no metrics battle.json" in text
    # A figure without a value is a dash, or named as damaged; never 0.
    assert "plain text one damaged perplexity.json" in text or "plain text one - perplexity.json" in text


def test_list_without_runs_says_how_to_make_one(tmp_path):
    assert "bash quickstart.sh" in list_of_runs(tmp_path / "ck", tmp_path / "out")


def test_units():
    assert [duration(s) for s in (None, 45.4, 720, 9000)] == ["-", "45 s", "12 min", "2.5 h"]
    assert [disk(b) for b in (1, 25 * 2**20, 3 * 2**30)] == ["1 KiB", "25 MiB", "3.0 GiB"]


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("eval_win_rate.py", "--checkpoints"),
        ("eval_perplexity.py", "--checkpoints"),
        ("run_alpacaeval_local.py", "--checkpoints"),
        ("human_eval.py", "--checkpoints"),
        ("merge_adapter.py", "--checkpoints"),
        ("generate_preference_pairs.py", "--checkpoints"),
        ("run_lm_eval.sh", "--checkpoints"),
        ("dpo_train_human_preference.py", "--output_dir"),
        ("sft_train_instruction.py", "--output-dir"),
        ("train_reward_model.py", "--output_dir"),
        ("eval_reward_model.py", "--checkpoints"),
    ],
)
def test_every_script_lists_runs_at_once(script, flag, tmp_path):
    make_run(tmp_path, "one", reward_accuracy=0.7)
    # A torch that cannot be imported shows that the list does not need it.
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    command = [*(["bash"] if script.endswith(".sh") else [sys.executable]), str(ROOT / script)]
    done = subprocess.run(
        [*command, "--list", flag, "ck", "--eval-out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "70.0 [60.0, 80.0]" in done.stdout and "evaluations use one" in done.stdout


def test_list_takes_no_other_flags(call):
    code, _, err = call("eval_win_rate", "--list", "--beta", "0.1")
    assert code == 2
    assert_one_line(err, "--beta 0.1", "--list")


# ----------------------------------------------------------------------------------------------- evaluating the latest


def test_every_evaluation_takes_the_latest_run(call, trained, tmp_path):
    """`trained` has one finished run, `r`; an unfinished one beside it is newer."""
    shutil.copytree(trained / "ck", tmp_path / "ck")
    write_json(tmp_path / "ck" / "newer" / "run.json", {"args": {}, "finished": False})
    folders = ("--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    for script, extra in (("eval_win_rate", ()), ("eval_perplexity", ()), ("merge_adapter", ())):
        code, _, err = call(script, *folders, *extra)
        assert code == 0 and "run: r (latest; --run_name chooses)" in err, err
    assert {"win_rate.json", "perplexity.json", "merge.json"} <= {p.name for p in (tmp_path / "out" / "r").iterdir()}


@pytest.mark.parametrize(
    ("script", "flags"),
    [("run_alpacaeval_local", ()), ("human_eval", ()), ("preflab.harness.run", ()), ("eval_win_rate", ("--battle",))],
)
def test_without_a_run_the_error_says_how_to_make_one(script, flags, call, tmp_path):
    code, _, err = call(script, "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out", *flags)
    assert code == 2
    assert_one_line(err, "bash quickstart.sh", "--adapter_path", str(tmp_path / "ck"))


def test_unknown_run_suggests_similar_and_unfinished_ones(call, tmp_path):
    make_run(tmp_path, "quickstart")
    make_run(tmp_path, "half", finished=False)
    for name, words in (
        ("quikstart", ("did you mean quickstart?", "--list")),
        ("half", ("not finished", "half/checkpoint-1")),
    ):
        code, _, err = call("eval_win_rate", "--checkpoints", tmp_path / "ck", "--run_name", name)
        assert code == 2
        assert_one_line(err, *words)


# --------------------------------------------------------------------------------------------------- renamed and moved


def test_renamed_run_evaluates_and_resumes(call, trained, tiny, prefs, tmp_path):
    """Both folders are renamed, as docs/runs.md says: stored results print, and the same settings continue."""
    assert call("eval_win_rate", *eval_args(trained, tmp_path / "eval"))[0] == 0
    before = read_json(tmp_path / "eval/r/win_rate.json")["metrics"]
    shutil.copytree(trained / "ck/r", tmp_path / "ck/renamed")
    shutil.copytree(trained / "out/r", tmp_path / "out/renamed")
    shutil.copytree(tmp_path / "eval/r", tmp_path / "eval/renamed")
    args = ("--run_name", "renamed", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "eval")
    code, _, err = call("eval_win_rate", *args)
    assert code == 0, err
    assert read_json(tmp_path / "eval/renamed/win_rate.json")["metrics"] == before
    # Nothing of the run names its old place.
    code, _, err = call("merge_adapter", *args)
    assert code == 0 and (tmp_path / "ck/renamed-merged/config.json").exists(), err
    extra = ("--eval_strategy", "steps", "--eval_steps", 2, "--per_device_eval_batch_size", 3, "--save_steps", 2)
    flags = [*train_args(tiny, prefs, tmp_path, *extra), "--run_name", "renamed"]
    at = flags.index("r")
    flags = [*flags[: at - 1], *flags[at + 1 :]]
    code, out, err = call("dpo_train_human_preference", *flags)
    assert code == 0 and "is finished, nothing to train" in out, err
    assert "python eval_win_rate.py --run_name renamed" in out
    # Interrupted after step 2: the weights and the log's end are removed, and training continues from the checkpoint.
    write_json(tmp_path / "ck/renamed/run.json", {**read_json(tmp_path / "ck/renamed/run.json"), "finished": False})
    shutil.rmtree(tmp_path / "ck/renamed/checkpoint-4")
    code, out, err = call("dpo_train_human_preference", *flags)
    assert code == 0 and "resuming from" in out and "checkpoint-2" in out, err
    losses = [
        [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
        for folder in (trained / "out/r", tmp_path / "out/renamed")
    ]
    assert losses[0] == losses[1]


def test_run_elsewhere_evaluates_by_its_path(call, trained, tmp_path):
    shutil.copytree(trained / "ck/r", tmp_path / "elsewhere/mine")
    code, _, err = call("eval_win_rate", "--adapter_path", tmp_path / "elsewhere/mine", "--eval_out", tmp_path)
    assert code == 0 and (tmp_path / "mine/win_rate.json").exists(), err


# ------------------------------------------------------------------------------------------------- one run and another


def test_run_against_another_run(call, trained, tmp_path):
    """--base_run puts the other run's adapter in the base's place, with results in a folder of both names."""
    shutil.copytree(trained / "ck/r", tmp_path / "ck/new")
    shutil.copytree(trained / "ck/r/checkpoint-2", tmp_path / "ck/old")
    folders = ("--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out", "--run_name", "new")
    code, _, err = call("eval_win_rate", *folders, "--base_run", "old")
    assert code == 0, err
    by_name = read_json(tmp_path / "out/new-vs-old/win_rate.json")
    code, _, err = call(
        "eval_win_rate", *folders, "--base_adapter", tmp_path / "ck/old", "--output_dir", tmp_path / "other"
    )
    assert code == 0, err
    assert by_name["metrics"] == read_json(tmp_path / "other/win_rate.json")["metrics"]
    assert by_name["model"]["base"]["name"].endswith("ck/old")
    code, _, err = call("eval_perplexity", *folders, "--base_run", "old", "--skip_kl")
    assert code == 0 and (tmp_path / "out/new-vs-old/perplexity.json").exists(), err
    short = ("--base_run", "old", "--limit", 3, "--max_new_tokens", 4)
    for script, extra, file in (
        ("eval_win_rate", ("--battle", "--judge", "longer"), "battle_LIMIT3.json"),
        ("human_eval", (), "human_eval_key_LIMIT3.json"),
    ):
        code, _, err = call(script, *folders, *short, *extra)
        assert code == 0 and (tmp_path / "out/new-vs-old" / file).exists(), err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--base_run", "r"), ("the tuned run itself",)),
        (("--base_run", "x", "--base_model", "y"), ("--base_run", "--base_model")),
        (("--base_run", "x"), ("x contains no trained model",)),
        (("--base_run", "full"), ("merge_adapter.py --run_name r",)),
    ],
)
def test_wrong_base_run(flags, words, call, trained, tmp_path):
    shutil.copytree(trained / "ck/r", tmp_path / "ck/r")
    write_json(tmp_path / "ck/full/config.json", {})
    code, _, err = call("eval_win_rate", "--checkpoints", tmp_path / "ck", "--run_name", "r", *flags)
    assert code == 2
    assert_one_line(err, *words)


def test_default_pairs_of_a_run_without_pairs_are_named(capsys):
    """An SFT run was trained on conversations, so its evaluation reads the project's default pairs."""
    args = ComparisonArguments(run_name="sg", dataset_name=ULTRAFEEDBACK, split="test_prefs")
    sources, own = held_out_sources(args, {})
    assert not own and sources[0]["name"] == ULTRAFEEDBACK
    err = capsys.readouterr().err
    assert "run sg was not trained on pairs" in err and ULTRAFEEDBACK in err and "--dataset_name" in err
    held_out_sources(args, {"dataset_name": ULTRAFEEDBACK})
    assert not capsys.readouterr().err


@pytest.mark.parametrize("content", [[], {"args": None}, {"args": 3}])
def test_edited_manifest_is_one_line(call, tmp_path, content):
    weights = make_run(tmp_path, "edited")
    write_json(weights / "run.json", content)
    common = ("--base_model", "org/base-1b", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    code, _, err = call("eval_win_rate", "--adapter_path", weights, *common)
    assert code == 2
    assert_one_line(err, "run.json", "damaged")
    with pytest.raises(UserError, match="run.json: damaged"):
        TrainingText.read(ContaminationArguments("edited"), str(tmp_path / "ck"))
