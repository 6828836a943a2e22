"""Every published training recipe runs end to end, unchanged, with a tiny model, and its keys arrive."""

import json

import pytest
import yaml
from conftest import ROOT, make_pairs, write_jsonl

SPPO = tuple(f"gemma-2-9b-it-sppo-iter{t}" for t in (1, 2, 3))
ZEPHYR = ("zephyr-7b-dpo-lora", "zephyr-7b-dpo-qlora", "juanako-7b-v1-dpo-1", "juanako-7b-v1-dpo-2")
PREFERENCE = ("gemma-2b-it-dpo", "gemma-2-9b-it-dpo", "gemma-2-9b-it-simpo", *SPPO, *ZEPHYR)
SFT = ("llama3-8b-alpaca-sft",)
REWARD = ("llama-3-8b-rm", "llama-3.1-tulu-3-8b-rm-skywork")
# What a machine without the hub, a GPU or hours must change: model, data, precision, and the number of steps.
OVERRIDDEN = {
    "model_name_or_path", "start_adapter", "dataset_name", "dataset_train_split", "dataset_test_split", "bf16", "dtype",
    "load_in_4bit", "max_steps", "num_train_epochs",
}  # fmt: skip
# The product of these stays (global_batch_size), their split follows the number of processes.
DERIVED = {"gradient_accumulation_steps", "per_device_train_batch_size"}


@pytest.fixture(scope="module")
def wins(tmp_path_factory):
    """A folder of pairs with win probabilities, as generate_preference_pairs.py writes them."""
    folder = tmp_path_factory.mktemp("wins")
    for name, rows in (("train", make_pairs(24)), ("test", make_pairs(8, 100))):
        write_jsonl(folder / f"{name}.jsonl", [{**r, "win_chosen": 0.8, "win_rejected": 0.3} for r in rows])
    return folder


def assert_keys_arrived(recipe: dict, args: dict) -> None:
    """The run's arguments have every key of the YAML except those that a small machine must change."""
    for key in recipe.keys() - OVERRIDDEN - DERIVED:
        expected = [recipe[key]] if key == "loss_type" else recipe[key]
        assert args[key] == expected, key
    batch = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    assert batch == args["global_batch_size"] == recipe["global_batch_size"]


def run_recipe(run, name, model, data, folder, *more) -> dict:
    """The run's summary, once the recipe has run for one step."""
    code, out, err = run(
        *("--config", ROOT / "configs" / f"{name}.yaml", "--model_name_or_path", model, "--dataset_name", data),
        *("--dataset_train_split", "train", "--dtype", "float32", "--bf16", "false", "--load_in_4bit", "false"),
        # One step is less than their warm-up, which the preflight refuses.
        *(
            "--allow_fatal",
            "--max_steps",
            "1",
            "--run_name",
            "r",
            "--disable_tqdm",
            "true",
            "--sample_prompts",
            "0",
            *more,
        ),
        *("--output_dir", folder / "ck", "--eval_out", folder / "out"),
    )
    assert code == 0, err
    return json.loads((folder / "out" / "r" / "train.json").read_text())


@pytest.mark.parametrize("name", PREFERENCE)
def test_published_recipe_runs(name, train, tiny, tiny_gemma2, trained, prefs, wins, tmp_path):
    recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    model, data = (tiny_gemma2, wins if name in SPPO else prefs) if "gemma" in name else (tiny, prefs)
    more = ("--dataset_test_split", "test")
    more += ("--start_adapter", trained / "ck" / "r") if "start_adapter" in recipe else ()
    summary = run_recipe(train, name, model, data, tmp_path, *more)
    assert_keys_arrived(recipe, summary["args"])
    assert (summary["start"] is not None) == ("start_adapter" in recipe)
    card = (tmp_path / "ck" / "r" / "README.md").read_text()
    assert ("| 0.4853 | 0.62 | 200 | 0.4640 | -1.0787 |" in card) == (name == "juanako-7b-v1-dpo-2")
    if name == "juanako-7b-v1-dpo-2":
        assert "### As published" in card and "UNA" in card and "| - | 1.00 | 300 | 0.4594 |" in card


@pytest.mark.parametrize("name", SFT)
def test_published_sft_recipe_runs(name, call, tiny, tmp_path):
    rows = [{"instruction": f"Say {k}.", "input": "", "output": f"{k}, as you wish."} for k in range(240)]
    data = write_jsonl(tmp_path / "data" / "train.jsonl", rows).parent
    recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    summary = run_recipe(lambda *args: call("sft_train_instruction", *args), name, tiny, data, tmp_path)
    assert_keys_arrived(recipe, summary["args"])
    assert summary["data"]["test"]["conversations"] == 200 and summary["packing"]["rows"] >= 1
    assert "### Instruction:" in (tmp_path / "ck" / "r" / "chat_template.jinja").read_text()


@pytest.mark.parametrize("name", [REWARD[0], pytest.param(REWARD[1], marks=pytest.mark.slow)])
def test_published_reward_recipe_runs(name, call, tiny, tmp_path):
    data = write_jsonl(tmp_path / "data" / "train.jsonl", make_pairs(32)).parent
    recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert recipe.pop("test_rows") == 500  # too many for a test
    run = lambda *args: call("train_reward_model", *args)  # noqa: E731
    # The preflight traces the memory of a packed batch: a small one is quick.
    small = ("--test_rows", "8", "--micro_batch_tokens", "512")
    summary = run_recipe(run, name, tiny, data, tmp_path, *small)
    assert_keys_arrived(recipe, summary["args"])
    assert summary["data"]["test"]["pairs"] == summary["metrics"]["base_ranking_accuracy"]["n"] == 8


def test_sppo_pairs_recipe_keys_arrive():
    from generate_preference_pairs import PairArguments
    from utils.cli import parse

    path = ROOT / "configs" / "pairs" / "gemma-2-9b-it-sppo.yaml"
    training = ROOT / "configs" / "gemma-2-9b-it-sppo-iter2.yaml"
    (args,) = parse((PairArguments,), ["--config", str(path), "--training_config", str(training), "--part", "2"])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, key) == value, key

    from generate_preference_pairs import apply_training_config, check

    apply_training_config(args)
    check(args)
    assert args.model_name_or_path == "checkpoints/gemma-2-9b-it-sppo-iter1" and args.attn_implementation == "eager"
    assert (args.run_name, args.eval_out) == ("gemma-2-9b-it-sppo-iter2-pairs", "eval_out")


def test_sppo_iterations_differ_only_in_start():
    texts = [yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in SPPO]
    for t, config in enumerate(texts, 1):
        assert config.pop("dataset_name") == f"eval_out/gemma-2-9b-it-sppo-iter{t}-pairs"
        start = config.pop("model_name_or_path")
        assert start == ("google/gemma-2-9b-it" if t == 1 else f"checkpoints/gemma-2-9b-it-sppo-iter{t - 1}")
    assert texts[0] == texts[1] == texts[2]


def test_juanako_published_table_is_complete():
    from preflab.models.card import PREFERENCE_COLUMNS
    from utils.artifacts import read_published

    published = read_published(ROOT / "configs/published/juanako-7b-v1.yaml", list)
    assert [row["step"] for row in published["rows"]] == [50, 100, 150, 200, 250, 300, 300]
    for row in published["rows"]:
        assert set(row) >= {key for _, key in PREFERENCE_COLUMNS if key != "train_loss"}


@pytest.mark.parametrize("name", [*PREFERENCE, *SFT, *REWARD, "pairs/gemma-2-9b-it-sppo"])
def test_recipe_numbers_have_sources(name):
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]
    bare = [line for line in keys if "#" not in line]
    head = [line for line in lines if line.startswith("#")]
    assert any(line.startswith("# Source:") for line in head) and any("Hardware:" in line for line in head)
    assert len(bare) <= 3, bare
