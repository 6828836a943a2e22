"""DeepSpeed on two CPU processes (gloo): the figures and weights of one process without it, and exact resume."""

import importlib.util

import pytest
from conftest import assert_one_line, make_pairs, train_args, write_jsonl
from helpers import instructions, kill_after
from processes import run_processes, run_script, start_processes
from safetensors.torch import load_file

from utils.artifacts import RowFile, read_json

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="no deepspeed: docs/install.md has the commands"
)
DPO, SFT = "dpo_train_human_preference.py", "sft_train_instruction.py"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs with SPPO's win probabilities, and conversations."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, offset in (("train", 24, 0), ("test", 8, 100)):
        rows = [{**row, "win_chosen": 0.9, "win_rejected": 0.2} for row in make_pairs(count, offset)]
        write_jsonl(folder / "pairs" / f"{name}.jsonl", rows)
        write_jsonl(folder / "conversations" / f"{name}.jsonl", instructions(count, offset))
    return folder


CONVERSATIONS = ("--dataset_test_split", "test")
FULL = ("--use_peft", "false", "--learning_rate", "1e-3")
# Dropout is off in DPO; in SFT it would draw other random numbers on two processes.
CASES = {
    "dpo-lora": (DPO, "pairs", ()),
    "dpo-full": (DPO, "pairs", FULL),
    "sppo-lora": (DPO, "pairs", ("--loss_type", "sppo", "--beta", "0.5")),
    "sft-lora": (SFT, "conversations", (*CONVERSATIONS, "--lora_dropout", "0")),
    "sft-full": (SFT, "conversations", (*CONVERSATIONS, *FULL)),
}
SLOW = [
    *(("deepspeed_zero3", case) for case in CASES if case != "dpo-lora"),
    *((config, case) for config in ("deepspeed_zero2", "deepspeed_zero3_offload") for case in ("dpo-lora", "dpo-full")),
]


def arguments(case, tiny, data, folder, *extra):
    script, rows, own = CASES[case]
    return [script, *train_args(tiny, data / rows, folder, "--global_batch_size", 4, *own, *extra)]


def log(folder):
    return RowFile(folder / "out/r/train_log.jsonl").read()


def assert_same(folder, single):
    """Losses, gradient norms, held-out figures and saved weights are those of `single`, within 1e-5."""
    weights = [load_file(*(f / "ck/r").glob("*model.safetensors")) for f in (folder, single)]
    # torch adds the squares of a float32 gradient in float32, DeepSpeed in float64: 131,072 of them differ by 2e-5.
    largest = max(tensor.numel() for tensor in weights[0].values())
    tolerance = {"grad_norm": 5e-5 if largest > 1e5 else 1e-5}
    for a, b in zip(log(folder), log(single), strict=True):
        for key in {"loss", "grad_norm", "rewards/margins"} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=tolerance.get(key, 1e-5)), (a["step"], key)
    a, b = (read_json(f / "out/r/train.json")["metrics"] for f in (folder, single))
    assert a.keys() == b.keys() and a
    for key in a:
        if key.startswith(("logps_", "heldout_ppl_", "reward_margin")):
            assert a[key]["value"] == pytest.approx(b[key]["value"], rel=1e-4), key
    a, b = weights
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and (a[name] - b[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize(
    ("config", "case"),
    [("deepspeed_zero3", "dpo-lora"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)],
)
def test_equals_one_process(tiny, data, tmp_path, shipped_config, config, case):
    done = run_script(*arguments(case, tiny, data, tmp_path / "one"))
    assert done.returncode == 0, done.stderr[-3000:]
    done = run_processes(2, *arguments(case, tiny, data, tmp_path / "two"), config=shipped_config(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "processes"), [("dpo-lora", 2), ("sft-full", 2), ("dpo-lora", 1)])
def test_resumes_after_kill_9(tiny, data, tmp_path, shipped_config, case, processes):
    """Also on another number of processes, for which ZeRO-3's checkpoint is converted."""
    config, extra = shipped_config("deepspeed_zero3"), ("--max_steps", 6, "--save_steps", 2)
    done = run_processes(2, *arguments(case, tiny, data, tmp_path / "unbroken", *extra), config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    args = arguments(case, tiny, data, tmp_path / "killed", *extra)
    kill_after(start_processes(2, *args, config=config), tmp_path / "killed/ck/r/checkpoint-2")
    done = run_processes(processes, *args, config=config)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-3000:]
    assert ("is converted for" in done.stdout) == (processes != 2)
    assert_same(tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.slow
def test_checkpoints_of_another_launch_are_refused(tiny, data, tmp_path, shipped_config):
    config = shipped_config("deepspeed_zero2")
    args = arguments("dpo-lora", tiny, data, tmp_path, "--save_steps", 2)
    kill_after(start_processes(2, *args, config=config), tmp_path / "ck/r/checkpoint-2")
    # Neither another number of processes, nor another stage, nor an unsharded run can read ZeRO-2's optimizer state.
    for count, other in ((1, config), (2, shipped_config("deepspeed_zero3")), (2, None)):
        done = run_processes(count, *args, config=other)
        assert done.returncode == 2
        assert_one_line(done.stderr, "DeepSpeed ZeRO-2 on 2 processes", "--num_processes", "--overwrite")


@pytest.mark.slow
def test_quantised_weights_are_refused(tiny, data, tmp_path, shipped_config):
    args = arguments("dpo-lora", tiny, data, tmp_path, "--load_in_4bit")
    done = run_processes(2, *args, config=shipped_config("deepspeed_zero3"))
    assert done.returncode == 2 and not (tmp_path / "ck").exists()
    assert_one_line(done.stderr, "--load_in_4bit", "ZeRO-3", "fsdp2.yaml")
