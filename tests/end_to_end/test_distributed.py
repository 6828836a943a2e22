"""Two CPU processes (DDP, FSDP2, files of `accelerate config`) with LoRA: one process's losses at the same batch."""

import importlib.util
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from conftest import ROOT, assert_one_line, made_once, train_args, write_jsonl
from helpers import ACCELERATE, CPU, instructions, kill_after
from processes import launch_environment, run_processes, run_script, run_two_processes, start_processes
from trl import ModelConfig

from preflab.evaluation.runs import checkpoints, is_complete
from preflab.training.run_config import RunConfig, unsharded_base
from utils.artifacts import RowFile, read_json

SCRIPT = "dpo_train_human_preference.py"


def launch(config: Path, *args) -> subprocess.CompletedProcess:
    """Train under accelerate's launcher, which takes 13 s of CPU time more than `run_two_processes`."""
    command = [*ACCELERATE, "--config_file", str(config), SCRIPT, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)


def rows(folder, split):
    return [r for r in RowFile(folder / "out/r/train_log.jsonl").read() if r["split"] == split]


@pytest.fixture(scope="session")
def single(tiny, prefs, tmp_path_factory):
    """The single-process run: global batch 4."""

    def make(folder):
        done = run_script(SCRIPT, *train_args(tiny, prefs, folder, *SAME_BATCH))
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "single", make)


SAME_BATCH = ("--global_batch_size", 4, "--eval_strategy", "steps", "--eval_steps", 4)


# multi_gpu launches as cpu_2proc does.
@pytest.mark.parametrize("name", ["cpu_2proc", pytest.param("multi_gpu", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tiny, prefs, tmp_path, single, shipped_config, name):
    done = launch(shipped_config(name), *train_args(tiny, prefs, tmp_path, *SAME_BATCH))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equals_one(tmp_path, single, sharded=False)


QUANTISED = ("--load_in_4bit", "--load_in_8bit")
NO_PINNED_MEMORY = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="FSDP pins offloaded parameters, which needs an accelerator"
)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("fsdp2_offload", marks=[pytest.mark.slow, NO_PINNED_MEMORY])])
def test_shards_equal_one_process(tiny, prefs, tmp_path, single, shipped_config, name):
    args = train_args(tiny, prefs, tmp_path, *SAME_BATCH)
    done = run_two_processes(SCRIPT, *args, config=shipped_config(name))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equals_one(tmp_path, single, sharded=True)


def test_offload_differs_from_fsdp2_in_one_key():
    folder = ROOT / "configs" / "accelerate"
    plain, offload = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("fsdp2", "fsdp2_offload"))
    assert offload["fsdp_config"].pop("fsdp_offload_params") and not plain["fsdp_config"].pop("fsdp_offload_params")
    assert offload == plain


@pytest.mark.slow
def test_qlora_under_fsdp2_equals_one_process(tiny, prefs, tmp_path, shipped_config):
    args = (*SAME_BATCH, "--load_in_4bit", "--bnb_4bit_quant_storage", "float32")
    done = run_script(SCRIPT, *train_args(tiny, prefs, tmp_path / "one", *args))
    assert done.returncode == 0, done.stderr[-3000:]
    done = run_two_processes(SCRIPT, *train_args(tiny, prefs, tmp_path, *args), config=shipped_config("fsdp2"))
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(rows(tmp_path, "train"), rows(tmp_path / "one", "train"), strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        *((flag, ("ZeRO-3", "fsdp2.yaml", "--bnb_4bit_quant_storage bfloat16")) for flag in QUANTISED),
        ("--compile_layers", ("sharded model",)),
    ],
)
def test_refused_under_zero3(train, tiny, prefs, tmp_path, monkeypatch, flag, words):
    """Before a model is loaded; tests/end_to_end/test_deepspeed.py launches it."""
    monkeypatch.setattr(RunConfig, "sharding", "DeepSpeed ZeRO-3")
    code, _, err = train(*train_args(tiny, prefs, tmp_path, flag))
    assert code == 2 and not (tmp_path / "ck").exists()
    assert_one_line(err, flag, *words)


@pytest.mark.parametrize(("storage", "noted"), [(None, True), ("uint8", True), ("bfloat16", False)])
def test_unsharded_base_is_noted(storage, noted):
    config = SimpleNamespace(sharding="FSDP", dtype_name="bfloat16")
    notes = unsharded_base(config, ModelConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage))
    assert bool(notes) == noted and all("--bnb_4bit_quant_storage bfloat16" in note for note in notes)
    assert not unsharded_base(SimpleNamespace(sharding=None), ModelConfig(load_in_4bit=True))


# As `accelerate config` writes them, with its own defaults, and answers that contradict the run's settings.
FSDP_MADE = dict(
    fsdp_version=2, fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP", fsdp_activation_checkpointing=False,
    fsdp_cpu_ram_efficient_loading=True, fsdp_offload_params=False, fsdp_reshard_after_forward=True,
    fsdp_state_dict_type="SHARDED_STATE_DICT",
)  # fmt: skip
DEEPSPEED_MADE = dict(
    deepspeed_multinode_launcher="standard", zero_stage=3, offload_optimizer_device="none", offload_param_device="none",
    zero3_init_flag=False, zero3_save_16bit_model=False, gradient_accumulation_steps=8, gradient_clipping=0.1,
)  # fmt: skip
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")
MADE = [
    pytest.param("MULTI_GPU", {}, (), marks=pytest.mark.slow),
    pytest.param("FSDP", {"fsdp_config": FSDP_MADE}, ("fsdp_state_dict_type SHARDED_STATE_DICT",)),
    pytest.param(
        "DEEPSPEED",
        {"deepspeed_config": DEEPSPEED_MADE},
        ("gradient_accumulation_steps 8", "gradient_clipping 0.1", "zero3_save_16bit_model false"),
        marks=[pytest.mark.slow, needs_deepspeed],
    ),
]


def made_file(folder: Path, kind: str, **section) -> Path:
    ClusterConfig(
        compute_environment="LOCAL_MACHINE", distributed_type=kind, mixed_precision="bf16", use_cpu=True, debug=False,
        num_processes=2, **section,
    ).to_yaml_file(str(folder / "made.yaml"))  # fmt: skip
    return folder / "made.yaml"


@pytest.mark.parametrize(("kind", "section", "words"), MADE)
def test_files_of_accelerate_config(tiny, prefs, tmp_path, single, kind, section, words):
    path = made_file(tmp_path, kind, **section)
    done = run_two_processes(SCRIPT, *train_args(tiny, prefs, tmp_path, *SAME_BATCH), config=path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equals_one(tmp_path, single, sharded=kind != "MULTI_GPU")
    notes = "\n".join(read_json(tmp_path / "out/r/preflight.json")["notes"])
    for word in ("mixed_precision bf16", *words):
        assert word in notes


def test_files_of_multi_cpu_start_one_process(train, tiny, prefs, tmp_path, monkeypatch):
    """accelerate's launcher starts the script once, without a warning; the run says so."""
    for name, value in launch_environment(made_file(tmp_path, "MULTI_CPU")).items():
        monkeypatch.setenv(name, value)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *SAME_BATCH, "--preflight_only"))
    assert code == 0, err
    preflight = read_json(tmp_path / "out/r/preflight.json")
    (note,) = [line for line in preflight["notes"] if "num_processes" in line]
    assert "single process" in note and "cpu_2proc.yaml" in note and note in " ".join(out.split())
    assert preflight["plan"]["batch"]["processes"] == 1 and preflight["plan"]["global_batch_size"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("fsdp2", 3), ("multi_gpu", 1)])
def test_resumes_on_one_or_three_processes(tiny, prefs, tmp_path, shipped_config, name, processes):
    """After kill -9 on two: the checkpoint is whole; FSDP's is refused without FSDP."""
    config, batch = shipped_config(name), ("--global_batch_size", 6, "--max_steps", 8, "--save_steps", 2)
    done = run_script(SCRIPT, *train_args(tiny, prefs, tmp_path / "one", *batch))
    assert done.returncode == 0, done.stderr[-3000:]
    args = train_args(tiny, prefs, tmp_path, *batch)
    kill_after(start_processes(2, SCRIPT, *args, config=config), tmp_path / "ck/r/checkpoint-2")
    if name == "fsdp2":
        done = run_two_processes(SCRIPT, *args)
        assert done.returncode == 2
        assert_one_line(done.stderr, "FSDP on 2 processes", "no sharding on 2 processes", "--overwrite")
    done = run_processes(processes, SCRIPT, *args, config=config)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-3000:]
    for a, b in zip(rows(tmp_path, "train"), rows(tmp_path / "one", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]


@pytest.mark.slow
def test_sft_under_fsdp_has_base_figures(tiny, tmp_path, shipped_config):
    write_jsonl(tmp_path / "rows/train.jsonl", instructions(24))
    metrics = {}
    for name, config in (("one", None), ("two", shipped_config("fsdp2"))):
        args = train_args(tiny, tmp_path / "rows", tmp_path / name, "--global_batch_size", 4, "--test_rows", 8)
        done = run_processes(
            1 + (name == "two"), "sft_train_instruction.py", *args, "--lora_dropout", "0", config=config
        )
        assert done.returncode == 0, done.stderr[-3000:]
        metrics[name] = read_json(tmp_path / name / "out/r/train.json")["metrics"]
    for key in ("heldout_ppl_base", "heldout_ppl_tuned", "heldout_ppl_ratio"):
        assert metrics["two"][key]["value"] == pytest.approx(metrics["one"][key]["value"], rel=1e-4), key


def assert_equals_one(tmp_path, single, sharded: bool):
    """The run in `tmp_path` on two processes has the figures of the single process's."""
    summary = read_json(tmp_path / "out/r/train.json")
    assert summary["run"]["world_size"] == 2 and summary["plan"]["batch"]["processes"] == 2
    assert summary["plan"]["global_batch_size"] == 4
    for split in ("train", "eval"):
        for a, b in zip(rows(tmp_path, split), rows(single, split), strict=True):
            for key in ("loss", "rewards/margins", "logps/chosen", "num_tokens"):
                if split == "train" or key != "num_tokens":
                    assert a[key] == pytest.approx(b[key], abs=1e-4), (split, a["step"], key)
    alone = read_json(single / "out/r/train.json")
    for key in ("reward_accuracy", "reward_margin", "logps_chosen_tuned", "logps_chosen_base"):
        assert summary["metrics"][key]["value"] == pytest.approx(alone["metrics"][key]["value"], abs=1e-4), key
    assert (tmp_path / "ck/r/adapter_model.safetensors").exists()
    step0 = read_json(tmp_path / "out/r/preflight.json")["step0"]
    assert step0["largest_reward"] <= 1e-3
    assert ("first micro-batch" in step0["checked"]) == sharded


def test_changed_global_batch_is_noted(tiny, prefs, tmp_path):
    done = run_two_processes(SCRIPT, *train_args(tiny, prefs, tmp_path, "--max_steps", 1))
    assert done.returncode == 0, done.stderr[-3000:]
    (note,) = read_json(tmp_path / "out/r/preflight.json")["notes"]
    assert note in done.stdout and {"8", "4"} <= set(re.findall(r"\d+", note))


def test_precomputed_reference_is_shared(tiny, prefs, tmp_path, single):
    args = train_args(tiny, prefs, tmp_path, "--global_batch_size", 4, "--precompute_ref_log_probs", "true")
    done = run_two_processes(SCRIPT, *args, "--sample_prompts", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(rows(tmp_path, "train"), rows(single, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert (tmp_path / "out/r/samples.md").exists()


def test_error_is_printed_once(tiny, prefs, tmp_path):
    (tmp_path / "ck/r").mkdir(parents=True)
    (tmp_path / "ck/r/thesis.txt").write_text("mine")
    done = launch(CPU, *train_args(tiny, prefs, tmp_path))
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "run.json" in done.stderr


def test_indivisible_global_batch_is_refused(tiny, prefs, tmp_path):
    done = run_two_processes(SCRIPT, *train_args(tiny, prefs, tmp_path, "--global_batch_size", 3))
    assert done.returncode != 0 and "error: --global_batch_size 3:" in done.stderr


def test_ctrl_c_under_the_launcher(tiny, prefs, tmp_path):
    """The terminal sends Ctrl-C to launcher and processes, and the launcher forwards it to the processes again."""
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 40)
    command = [*ACCELERATE, "--config_file", str(CPU), SCRIPT, *args]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = RowFile(tmp_path / "out/r/train_log.jsonl")
    start = time.monotonic()
    while len(log.read()) < 3 and process.poll() is None and time.monotonic() - start < 120:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    (checkpoint,) = checkpoints(tmp_path / "ck/r")
    assert is_complete(checkpoint), err[-2000:]
    done = run_two_processes(SCRIPT, *args)
    assert done.returncode == 0 and str(checkpoint) in done.stdout, done.stderr[-2000:]
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 41))
