"""--plan: hardware, options in order of cost, the printed command, and nothing but the plan written."""

import json
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import assert_one_line, train_args
from helpers import sft_args

from preflab.training import planner
from preflab.training.planner_report import command_with, shortened, without_flags
from preflab.training.sharding import Shards
from utils.errors import UserError


def plan_of(folder):
    return json.loads((folder / "out" / "r_plan.json").read_text())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x24GB", (1, 1, 24.0, False)),
        ("2x8x80gb", (2, 8, 80.0, False)),
        ("cpu:7.5GiB", (1, 1, 7.5, True)),
    ],
)
def test_hardware(text, expected):
    hardware = planner.Hardware.parse(text, 100.0, "bf16")
    assert (hardware.nodes, hardware.gpus, hardware.gib, hardware.cpu) == expected
    assert hardware.rate == 100e12 and hardware.processes == expected[0] * expected[1]


@pytest.mark.parametrize("text", ["24GB", "0x24GB", "1x24", "8x80GB!", "gpu:24GB", "1x0GB"])
def test_other_hardware_is_one_line(text, train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--plan", text))
    assert code == 2
    assert_one_line(err, "--plan", text)


def test_plan_reads_no_weights_and_trains_nothing(train, tiny, prefs, tmp_path):
    config_only = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(config_only.glob("*.safetensors"))
    code, out, err = train(*train_args(config_only, prefs, tmp_path, "--plan", "cpu:8GB", "--plan_tflops", 1))
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100 and "fits as it is" in out
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["r_plan.json"]
    plan = plan_of(tmp_path)
    assert plan["stage"] == "plan" and {"model", "metrics", "args", "run", "claim"} <= plan.keys()
    assert plan["metrics"]["memory_gib"]["value"] * 2**30 == plan["plan"]["options"][-1]["bytes"]["total"]
    rows = plan["plan"]["rows"]
    assert rows["count"] == 24 and "24 pairs" in out


def test_options_come_in_order_of_cost_and_the_command_runs(train, tiny, prefs, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "PROCESS", {"cpu": 0, "gpu": 0})
    args = train_args(tiny, prefs, tmp_path, "--per_device_train_batch_size", 4)
    at = args.index("--gradient_checkpointing")
    del args[at : at + 2]
    code, out, err = train(*args, "--plan", "1x1GB")
    assert code == 0, err
    whole = plan_of(tmp_path)["plan"]["options"][0]["bytes"]["total"] / 2**30
    monkeypatch.setattr(sys, "argv", ["dpo_train_human_preference.py", *map(str, args)])
    # Less than the command needs as it is, in steps: the options that are tried grow, the one that fits gets slower.
    speeds, sizes = [], []
    for share in (1.2, 0.9, 0.6):
        code, out, err = train(*args, "--plan", f"1x{share * whole:.6f}GB")
        assert code == 0, err
        plan = plan_of(tmp_path)["plan"]
        if not plan["fits"]:
            assert "No option fits" in out
            continue
        assert [option["fits"] for option in plan["options"]] == [False] * (len(plan["options"]) - 1) + [True]
        speeds.append(plan["options"][-1]["tokens_per_second"])
        sizes.append(len(plan["options"]))
        words = shlex.split(plan["command"].replace("\\\n", " "))
        assert words[0] == "python" and "--plan" not in words
    assert len(sizes) >= 2 and sizes == sorted(sizes) and speeds == sorted(speeds, reverse=True)
    code, _, err = train(*words[2:], "--preflight_only")
    assert code == 0, err


def test_sft_on_two_nodes(call, tiny, tmp_path):
    args = sft_args(tiny, tmp_path / "no_rows.jsonl", tmp_path, "--plan", "2x8x80GB")
    code, out, err = call("sft_train_instruction", *args)
    assert code == 0, err
    text = " ".join(out.split())
    assert "rows were not read" in text and "60,000 conversations" in text
    assert "--num_processes 16" in text and "--num_machines 2" in text


def test_flags_are_replaced_in_the_command(monkeypatch):
    words = [
        "--config",
        "a.yaml",
        "--plan=1x24GB",
        "--lora-r",
        "8",
        "--no_bf16",
        "--columns",
        "a=b",
        "c=d",
        "--beta",
        "-1",
    ]
    assert without_flags(words, {"plan", "lora_r", "bf16", "columns"}) == ["--config", "a.yaml", "--beta", "-1"]
    monkeypatch.setattr(sys, "argv", ["/x/train.py", *words])
    option = SimpleNamespace(flags={"lora_r": 4}, shards=Shards("zero3", 16, True))
    command = command_with(option, SimpleNamespace(processes=16, nodes=2))
    assert "configs/accelerate/deepspeed_zero3_offload.yaml" in command and command.endswith("--lora_r 4")
    assert max(map(len, command.splitlines())) <= 100


def test_printed_options_are_the_largest_and_the_smallest():
    names = [("a", 9), ("a, batch 4", 7), ("a, batch 2", 8), ("b", 3)]
    options = [SimpleNamespace(name=name, total=total) for name, total in names]
    assert [option.name for option in shortened(options)] == ["a", "a, batch 4", "b"]


def test_time_by_hand():
    plan = object.__new__(planner.Planner)
    plan.pairs, plan.config = True, SimpleNamespace(precision="bf16")
    plan.hardware = planner.Hardware("", 1, 2, 80, False, 100e12, "")
    plan.rows = planner.Rows(1000, 500.0, (), 0, "")
    config = SimpleNamespace(
        per_device_train_batch_size=5, gradient_accumulation_steps=1, max_steps=-1, num_train_epochs=2,
        reference_in_step=lambda: False,
    )  # fmt: skip
    time = plan._time(config, SimpleNamespace(total=10**9), True, planner.Option("", checkpointing=True))
    # 29.1% of 2 x 100 TFLOP/s; 4 + 2 operations per parameter and token in a step, 2 for the cached reference.
    rate = 0.291 * 200e12
    assert time["tokens_per_second"] == pytest.approx(rate / 6e9)
    assert time["hours"] == pytest.approx((6e9 * 1_000_000 + 2e9 * 500_000) / rate / 3600)


def test_unknown_card_speed_must_be_positive():
    with pytest.raises(UserError, match="plan_tflops"):
        planner.Hardware.parse("1x24GB", -3.0, "bf16")
