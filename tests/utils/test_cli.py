"""Command lines: strict YAML, strict flags, a fast help page."""

import pytest
from conftest import ROOT, assert_one_line, command

from utils.cli import parse
from utils.errors import UserError


def parsed(tmp_path, yaml: str, *flags):
    from trl import ModelConfig

    from preflab.data.preferences import DataArguments
    from preflab.training.dpo_config import DPORunConfig

    (tmp_path / "x.yaml").write_text(yaml)
    return parse((DataArguments, DPORunConfig, ModelConfig), ["--config", str(tmp_path / "x.yaml"), *flags])


def test_flags_override_yaml(tmp_path):
    data, args, model = parsed(
        tmp_path, "beta: 0.3\nlearning_rate: 5e-7\nmax_steps: 7\nuse_peft: true\nloss_type: ipo\n", "--beta", "0.2"
    )
    assert (args.beta, args.learning_rate, args.max_steps, args.loss_type) == (0.2, 5e-7, 7, ["ipo"])
    assert model.use_peft and not args.bf16
    assert parsed(tmp_path, "beta: 0.3", "--max-steps=3")[1].max_steps == 3


@pytest.mark.parametrize(
    "line",
    ["max_steps: 1.5", "max_steps: [1]", "beta: true", "beta:", "use_peft: 1", "run_name: 7", "loss_type: 3",
     "train_test_overlap: dropp", "dtype: floatt", "prompt_format: chatt", "max_steps: many", "use_peft: 'yes'",
     "lora_target_modules: 5", "report_to: true"],
)  # fmt: skip
def test_wrong_types_in_yaml(tmp_path, line):
    with pytest.raises(UserError) as error:
        parsed(tmp_path, line)
    assert "x.yaml" in str(error.value) and line.split(":")[0] in str(error.value)


@pytest.mark.parametrize(
    ("yaml", "flags", "words"),
    [
        ("learning_rat: 1", (), ("x.yaml", "'learning_rat'", "learning_rate")),
        ("beta: 1\nbeta: 2", (), ("line 2", "beta")),
        ("- a", (), ("x.yaml",)),
        ("a: [", (), ("x.yaml", "YAML")),
        ("beta: 0.1", ("--bet", "1"), ("--bet", "--beta")),
        ("beta: 0.1", ("--beta", "x"), ("--beta", "'x'")),
        ("beta: 0.1", ("stray",), ("stray",)),
        ("beta: 0.1", ("--config", "y.yaml"), ("--config",)),
        ("datasets: 3", (), ("'datasets'",)),
    ],
)
def test_unknown_and_malformed_input(tmp_path, yaml, flags, words):
    with pytest.raises(UserError) as error:
        parsed(tmp_path, yaml, *flags)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_config_file():
    with pytest.raises(UserError, match="none.yaml"):
        parse((), ["--config", "none.yaml"])


def test_help_all(train):
    code, out, _ = train("--help_all")
    assert code == 0 and "--adam_beta1" in out and "--max_prompt_length" in out


def test_missing_model_and_data(train):
    for flags, word in ((("--beta", "1"), "--model_name_or_path"), (("--model_name_or_path", "x"), "--dataset_name")):
        code, _, err = train(*flags)
        assert code == 2
        assert_one_line(err, word)


def test_training_configs_parse():
    from trl import ModelConfig

    from preflab.data.conversations import SFTArguments
    from preflab.data.preferences import DataArguments
    from preflab.training.dpo_config import DPORunConfig
    from preflab.training.sft_config import SFTRunConfig

    texts = {path: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
    configs = [path for path, text in texts.items() if "\nmodel_name_or_path:" in text]
    # Configs of evaluations are tested with their scripts, in test_evaluations.py and test_alpacaeval.py.
    assert {path.stem for path in set(texts) - set(configs)} == {"battle_arena_hard", "alpacaeval"}
    assert len(configs) >= 2
    for config in configs:
        stage = (SFTArguments, SFTRunConfig) if "sft" in config.stem else (DataArguments, DPORunConfig)
        data, args, model = parse((*stage, ModelConfig), ["--config", str(config), "--bf16", "false"])
        assert model.model_name_or_path and data.dataset_name, config


def test_imports_have_no_side_effects():
    """Importing the packages and the scripts reads no arguments, starts no device and prints nothing."""
    packages = [p.relative_to(ROOT).with_suffix("") for d in ("utils", "preflab") for p in (ROOT / d).rglob("*.py")]
    modules = [".".join(p.parts) for p in packages] + [p.stem for p in ROOT.glob("*.py")]
    code = f"import importlib; [importlib.import_module(m) for m in {modules!r}]"
    done = command("-c", code)
    assert done.returncode == 0 and done.stdout == ""
    assert "error" not in done.stderr.lower(), done.stderr
