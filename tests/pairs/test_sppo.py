"""run_online_iteration.sh and run_sppo_iteration.sh: an iteration starts from the one before, its reference."""

import os
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, assert_one_line, make_pairs, write_jsonl
from processes import run_script

from utils.artifacts import RowFile, read_json


def iteration(number, *flags, script="run_sppo_iteration.sh", **env) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / script), str(number), *map(str, flags)]
    env = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=600)


def commands_of(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The two printed commands, without the interpreter."""
    commands = [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert [command[0] for command in commands] == ["generate_preference_pairs.py", "dpo_train_human_preference.py"]
    return commands


@pytest.fixture
def stub(tmp_path):
    """A Python that does nothing, and has no package that it is asked for."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\n[ "$1" != -c ]\n')
    path.chmod(0o755)
    return path


def forked(stub, number, *flags, script="run_sppo_iteration.sh") -> subprocess.CompletedProcess:
    """The last result of an iteration whose printed commands are forks: two starts of Python take 16 s."""
    printed = iteration(number, *flags, script=script, PYTHON=str(stub))
    assert printed.returncode == 0, printed.stderr
    for command in commands_of(printed):
        done = run_script(*command)
        if done.returncode:
            break
    return done


@pytest.fixture
def recipe(tiny, tmp_path):
    """The shipped toy recipe on a tiny model: eight prompts per iteration, six tokens per answer, two steps."""
    configs = tmp_path / "configs"
    (configs / "pairs").mkdir(parents=True)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in make_pairs(16)])
    sampling = yaml.safe_load((ROOT / "configs/pairs/quickstart-sppo.yaml").read_text())
    sampling |= {"dataset_name": str(prompts), "parts": 2, "test_prompts": 2, "max_new_tokens": 6, "temperature": 1.5}
    (configs / "pairs/toy.yaml").write_text(yaml.safe_dump({**sampling, "scorer": "longer", "also_score": []}))
    for t in (1, 2):
        training = yaml.safe_load((ROOT / f"configs/quickstart-sppo-iter{t}.yaml").read_text())
        training |= {"model_name_or_path": str(tiny), "output_dir": str(tmp_path / "ck"), "sample_prompts": 0}
        training |= {"eval_out": str(tmp_path / "out"), "dataset_name": str(tmp_path / f"out/toy-iter{t}-pairs")}
        training |= {"max_steps": 2, "global_batch_size": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        training |= {"start_adapter": str(tmp_path / "ck/toy-iter1")} if t > 1 else {}
        (configs / f"toy-iter{t}.yaml").write_text(yaml.safe_dump({**training, "disable_tqdm": True}))
    return ("--name", "toy", "--configs", configs)


def test_iterations_use_their_start_as_reference(recipe, stub, tmp_path):
    done = iteration(1, *recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    # Both commands are printed before they run.
    assert commands_of(done)
    done = forked(stub, 2, *recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out"
    first, second = (RowFile(out / f"toy-iter{t}/heldout_rows.jsonl").read() for t in (1, 2))
    assert read_json(out / "toy-iter2/preflight.json")["step0"]["largest_margin"] <= 1e-3
    assert read_json(out / "toy-iter2/train.json")["start"]["use"] == "continue"
    sampled = [read_json(out / f"toy-iter{t}-pairs/preference_pairs.json") for t in (1, 2)]
    before, after = (s["model"]["policy"] for s in sampled)
    assert before["adapter_sha256"] is None
    adapter = read_json(out / "toy-iter2/train.json")["start"]["adapter_sha256"]
    assert after["adapter_sha256"] == adapter, "the second iteration samples from the first one's model"
    prompts = [{r["prompt_id"] for r in RowFile(out / f"toy-iter{t}-pairs/samples.jsonl").read()} for t in (1, 2)]
    assert not prompts[0] & prompts[1] and len(prompts[0]) == len(prompts[1]) == 8
    assert first and second

    # A second call generates and trains nothing.
    done = forked(stub, 2, *recipe)
    assert done.returncode == 0 and "nothing to train" in done.stdout, done.stderr[-2000:]
    # A finished run is not reused for pairs that it was not trained on.
    done = forked(stub, 2, *recipe, "--pairs", "--scorer shorter --overwrite")
    assert done.returncode == 2 and "error: " in done.stderr and "pairs" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("launch", "options"),
    [
        ("deepspeed_zero3", "configs/accelerate/multi_gpu.yaml --num_processes 8"),
        ("cpu_2proc", "configs/accelerate/cpu_2proc.yaml --num_processes 2"),
    ],
)
def test_pairs_use_as_many_processes_as_training(launch, options, recipe, stub):
    launch = f"configs/accelerate/{launch}.yaml"
    done = iteration(1, *recipe, "--launch", launch, PYTHON=str(stub))
    sampling, training = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert f"--config_file {options} generate_preference_pairs.py" in sampling
    assert f"--config_file {launch} dpo_train_human_preference.py" in training


def test_help_and_missing_start_adapter(recipe, tmp_path):
    done = iteration("--help")
    assert done.returncode == 0 and "--launch YAML" in done.stdout and "set -euo" not in done.stdout
    done = iteration(2, *recipe)
    assert done.returncode == 2 and "toy-iter1" in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def online(number, *flags, **env) -> subprocess.CompletedProcess:
    return iteration(number, *flags, script="run_online_iteration.sh", **env)


def test_without_a_loss_both_scripts_run_the_same_commands(recipe, stub):
    old, new = (run(2, *recipe, PYTHON=str(stub)) for run in (iteration, online))
    assert old.returncode == new.returncode == 0 and old.stdout == new.stdout
    # The recipe's loss named again changes nothing.
    assert online(2, *recipe, "--loss", "sppo", PYTHON=str(stub)).stdout == old.stdout


@pytest.mark.parametrize(
    ("flags", "run"),
    [
        (("--loss", "simpo"), "toy-simpo"),
        (("--loss=sigmoid sft",), "toy-sigmoid-sft"),
        (("--loss", "sigmoid", "--run_name", "mine"), "mine"),
        (("--scorer", "longer", "--run_name=by length"), "by length"),
    ],
)
def test_other_losses_and_scorers_have_their_folders(flags, run, recipe, stub, tmp_path):
    done = online(2, *recipe, *flags, PYTHON=str(stub))
    assert done.returncode == 0, done.stderr
    pairs, training = commands_of(done)
    value = {word: after for command in (pairs, training) for word, after in zip(command, command[1:], strict=False)}
    assert pairs[pairs.index("--run_name") + 1] == f"{run}-iter2-pairs"
    assert value["--eval_out"] == str(tmp_path / "out")
    assert value["--dataset_name"] == str(tmp_path / f"out/{run}-iter2-pairs")
    # Both halves continue from the run's own first iteration, not from the recipe's.
    assert value["--adapter_path"] == value["--start_adapter"] == str(tmp_path / f"ck/{run}-iter1")
    assert training[training.index("--run_name") + 1] == f"{run}-iter2"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--loss", "dpo"), ("--loss dpo", "sigmoid")),
        (("--loss", "sigmoid", "--train", "--loss_type ipo"), ("--loss_type", "--loss")),
        (("--loss", "sigmoid", "--train", "--run_name x"), ("--run_name",)),
        (("--scorer", "longer", "--pairs", "--scorer shorter"), ("--scorer",)),
        (("--run_name", "a/b"), ("--run_name", "a/b")),
    ],
)
def test_contradictions_are_refused_before_sampling(flags, words, recipe):
    done = online(1, *recipe, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, *words)


def test_a_recipe_without_the_run_before_is_refused(recipe):
    path = recipe[-1] / "toy-iter2.yaml"
    path.write_text(path.read_text().replace("/toy-iter1", "/elsewhere"))
    done = online(2, *recipe, "--loss", "sigmoid")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "toy-iter2.yaml", "start_adapter", "toy-sigmoid-iter1")


@pytest.mark.slow
def test_dpo_iterations_with_another_scorer(recipe, stub, tmp_path):
    flags = (*recipe, "--loss", "sigmoid", "--scorer", "shorter")
    for number in (1, 2):
        done = forked(stub, number, *flags, script="run_online_iteration.sh")
        assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out"
    assert read_json(out / "toy-sigmoid-iter2/preflight.json")["step0"]["largest_margin"] <= 1e-3
    assert not (out / "toy-iter1").exists()
    pairs = read_json(out / "toy-sigmoid-iter2-pairs/preference_pairs.json")
    start = read_json(out / "toy-sigmoid-iter2/train.json")["start"]
    assert pairs["model"]["policy"]["adapter_sha256"] == start["adapter_sha256"]
    assert pairs["model"]["scorers"][0]["name"] == "shorter", pairs["model"]["scorers"]
    done = forked(stub, 2, *flags, script="run_online_iteration.sh")
    assert done.returncode == 0 and "nothing to train" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_trait_grows_only_with_true_scores(tmp_path):
    """Three iterations of the toy recipe on SmolLM2 over three seeds, evaluated on held-out prompts."""
    command = [
        sys.executable,
        "benchmarks/sppo_trait.py",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "x.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = read_json(tmp_path / "x.json")["metrics"]
    for t in (1, 2, 3):
        assert max(metrics[f"scored_change_{t}_by_seed"]) < 0, t
        assert metrics[f"scored_minus_shuffled_{t}"]["ci95"][1] < 0, t
        assert metrics[f"scored_change_{t}"]["ci95"][1] < 0 and metrics[f"p_scored_change_{t}"]["value"] < 0.05, t
        low, high = metrics[f"shuffled_change_{t}"]["ci95"]
        assert low < 0 < high or metrics[f"p_shuffled_change_{t}"]["value"] > 0.05 / 3, t
