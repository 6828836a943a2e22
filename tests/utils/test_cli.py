"""Command lines: strict YAML, strict flags, a fast help page."""

import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
import yaml
from conftest import ROOT, assert_one_line, command
from stages import ARGUMENTS

from utils.cli import check_name, normalised, option, parse, run_name
from utils.errors import UserError
from utils.keys import keys_of


def training_types() -> tuple:
    return ARGUMENTS["dpo_train_human_preference.py"]()


def parsed(tmp_path, yaml: str, *flags):
    (tmp_path / "x.yaml").write_text(yaml)
    return parse(training_types(), ["--config", str(tmp_path / "x.yaml"), *flags])


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


@dataclass
class Small:
    """A few keys of every kind."""

    fast: bool = option("A switch.", False)
    safe: bool = option("Another switch.", True)
    automatic: bool | None = option("A switch that may stay open.")
    color: str = option("A choice.", "red", choices=["red", "green"])
    learning_rate: float = option("A number.", 0.5)
    names: list[str] = field(default_factory=list)
    max_length: int | None = option("An integer.")

    topics = {"colours": "color"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--fast --automatic", (True, True, True)),
        ("--fast true --safe FALSE --automatic no", (True, False, False)),
        ("--fast=yes --safe=false --automatic=1", (True, False, True)),
        ("--no_safe --no-automatic --no_fast", (False, False, False)),
        ("--fast --no_fast", (False, True, None)),
        ("--fast --color green", (True, True, None)),
    ],
)
def test_switches(flags, expected, tmp_path):
    (args,) = parse((Small,), flags.split())
    assert (args.fast, args.safe, args.automatic) == expected
    # The command line wins over YAML in both directions.
    (tmp_path / "x.yaml").write_text("fast: true\nsafe: true\nautomatic: true\n")
    (args,) = parse(
        (Small,), ["--config", str(tmp_path / "x.yaml"), "--no_fast", "--safe=false", "--automatic", "false"]
    )
    assert (args.fast, args.safe, args.automatic) == (False, False, False)


def test_every_switch_of_every_stage():
    """Also TRL's and transformers' own, where the type is Optional[bool]."""
    for script, types in ARGUMENTS.items():
        keys = keys_of(types())
        switches = [name for name, key in keys.items() if key.is_switch]
        assert switches, script
        for name in switches:
            for form, value in ((f"--{name}", "true"), (f"--no-{name.replace('_', '-')}", "false")):
                assert normalised([form, "--seed", "1"], keys)[0] == f"--{name}={value}", (script, form)
    config, model = parse(
        training_types(), ["--bf16", "--use_peft", "--tf32=false", "--load-in-4bit", "--no_logging_nan_inf_filter"]
    )[1:]
    assert config.bf16 and model.use_peft and model.load_in_4bit and config.tf32 is False


def test_values():
    (args,) = parse((Small,), ["--learning-rate", "-1e-5", "--names", "a", "b", "--max_length=8"])
    assert (args.learning_rate, args.names, args.max_length) == (-1e-5, ["a", "b"], 8)
    assert parse((Small,), ["--names", "a"])[0].names == parse((Small,), ["--names=a"])[0].names == ["a"]
    assert parse(training_types(), ["--include_num_input_tokens_seen", "all"])[1].include_num_input_tokens_seen == "all"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--fast yess", ("'yess'", "--fast", "true, false")),
        ("--fast=yess", ("--fast=yess", "true or false")),
        ("--no_safe true", ("--no_safe", "takes no value")),
        ("--no_color", ("--no_color", "--color")),
        ("--no_safe stray", ("'stray'", "--no_safe")),
        ("stray", ("'stray'",)),
        ("colour", ("'colour'", "--color")),
        ("--color red blue", ("'blue'", "--color", "one value")),
        ("--color bleu", ("--color bleu", "red, green")),
        ("--color gren", ("--color gren", "did you mean green")),
        ("--color", ("--color", "needs a value", "red|green")),
        ("--color --fast", ("--color", "needs a value")),
        ("--names", ("--names", "needs a value")),
        ("-color red", ("'-color'", "two hyphens", "--color")),
        ("—color red", ("two hyphens", "--color")),
        ("color=red", ("'color=red'", "--color red")),
        ("lr=1", ("'lr=1'", "--learning_rate 1")),
        ("configs/quickstart.yaml", ("--config configs/quickstart.yaml",)),
        ("--config configs/quickstart.yaml more.yaml", ("'more.yaml'", "one file")),
        ("--config configs/quickstart.yaml stray", ("'stray'", "follows no flag")),
        ("--config", ("--config", "needs a file")),
        ("--Color red", ("--Color", "did you mean --color")),
        ("--", ("'--'",)),
    ],
)
def test_what_is_not_understood(flags, words):
    with pytest.raises(UserError) as error:
        normalised(flags.split(), keys_of((Small,)))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("short", "key"),
    [
        ("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch_size", "per_device_train_batch_size"),
        ("model", "model_name_or_path"), ("base-model", "model_name_or_path"), ("dataset", "dataset_name"),
        ("output", "output_dir"), ("rank", "lora_r"), ("loss", "loss_type"), ("max_seq_length", "max_length"),
        ("lora", "use_peft"), ("learning_rat", "learning_rate"), ("LR", "learning_rate"),
    ],
)  # fmt: skip
def test_short_names(short, key, tmp_path):
    with pytest.raises(UserError, match=rf"--{short}; did you mean --{key}\?"):
        normalised([f"--{short}", "1"], keys_of(training_types()))
    with pytest.raises(UserError, match=rf"x.yaml: unknown key '{short}'; did you mean '{key}'\?"):
        parsed(tmp_path, f"{short}: 1")


@pytest.mark.parametrize(
    ("line", "meant"),
    [("dtype: floatt", "float"), ("lr_scheduler_type: cosin", "cosine"), ("prompt_format: chatt", "chat")],
)
def test_near_choices_in_yaml(tmp_path, line, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        parsed(tmp_path, line)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.yaml", ("none.yaml", "configs/", "quickstart")),
        ("quickstart", ("did you mean configs/quickstart.yaml?",)),
        ("config/quickstart.yml", ("did you mean configs/quickstart.yaml?",)),
        ("configs/gemma-2b-dpo.yaml", ("did you mean configs/gemma-2b-it-dpo.yaml?",)),
        ("configs", ("Is a directory",)),
    ],
)
def test_missing_config_file(path, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        parse((), ["--config", path])
    assert all(word in str(error.value) for word in words), error.value


def test_help_all(train):
    code, out, _ = train("--help_all")
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 100
    listed = [match[1] for line in lines if (match := re.match(r"  --(\w+)", line))]
    assert sorted(listed) == sorted(keys_of(training_types())), "every key once"
    topics = [line for line in lines[2:] if line and not line.startswith(" ")]
    assert {"model", "data", "LoRA and quantisation", "optimisation", "loss", "evaluation", "saving"} <= set(topics)
    # Those that training refuses come last, with the reason.
    assert out.index("  --adam_beta1") < out.index("\nnot supported, and why\n") < out.index("  --save_only_model")
    # A new key of a library must get a topic.
    assert "this script" not in topics and "other" not in topics
    assert "  --adam_beta1 X [0.9] " in out and "  --lora_r N [16] " in out


def test_help_all_searches(train):
    code, out, _ = train("--help_all", "lora")
    listed = re.findall(r"^  --(\w+)", out, flags=re.M)
    assert code == 0 and {"lora_r", "lora_dropout", "use_peft", "start_adapter"} <= set(listed) and len(listed) < 20
    assert max(map(len, out.splitlines())) <= 100
    # One key: all choices, and the complete description.
    code, out, _ = train("--help_all", "lr_scheduler_type", "--beta", "1")
    assert code == 0 and "warmup_stable_decay" in out and len(out.splitlines()) < 12
    code, _, err = train("--help_all", "learning_raet")
    assert code == 2
    assert_one_line(err, "learning_raet", "did you mean learning_rate")


def test_keys_of_a_stage_have_topics():
    from utils.help_all import all_keys_page

    page = all_keys_page(keys_of((Small,)), (Small,), [])
    assert (
        page.index("this script") < page.index("--fast") < page.index("colours") < page.index("--color red|green [red]")
    )


def test_version(call):
    code, out, _ = call("eval_win_rate", "--version", "--no_such_flag")
    first, second = out.splitlines()
    number = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert code == 0 and re.fullmatch(rf"PreferenceLab {number}( \(commit [0-9a-f]{{40}}(-dirty)?\))?", first)
    for name in ("torch", "transformers", "trl", "peft"):
        assert f"{name} {version(name)}" in second


def test_missing_model_and_data(train):
    for flags, word in ((("--beta", "1"), "--model_name_or_path"), (("--model_name_or_path", "x"), "--dataset_name")):
        code, _, err = train(*flags)
        assert code == 2
        assert_one_line(err, word)


def test_training_configs_parse():
    texts = {path: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
    configs = [path for path, text in texts.items() if "\nmodel_name_or_path:" in text]
    # Configs of evaluations are tested with their scripts, in test_evaluations.py and test_alpacaeval.py.
    assert {path.stem for path in set(texts) - set(configs)} == {"battle_arena_hard", "alpacaeval"}
    assert len(configs) >= 2
    for config in configs:
        kinds = {"sft": "sft_train_instruction.py", "rm": "train_reward_model.py"}
        parts = config.stem.split("-")
        script = next((kinds[part] for part in parts if part in kinds), "dpo_train_human_preference.py")
        data, args, model = parse(ARGUMENTS[script](), ["--config", str(config), "--no_bf16"])
        assert model.model_name_or_path and data.dataset_name, config


def test_imports_have_no_side_effects():
    """Importing the packages and the scripts reads no arguments, starts no device and prints nothing."""
    packages = [p.relative_to(ROOT).with_suffix("") for d in ("utils", "preflab") for p in (ROOT / d).rglob("*.py")]
    modules = [".".join(p.parts) for p in packages] + [p.stem for p in ROOT.glob("*.py")]
    code = f"import importlib; [importlib.import_module(m) for m in {modules!r}]"
    done = command("-c", code)
    assert done.returncode == 0 and done.stdout == ""
    assert "error" not in done.stderr.lower(), done.stderr


# ---- names of runs


@dataclass
class Named:
    run_name: str | None = option("A name.")


BAD_NAMES = ["a\nb", "\x1b[31mred", "<img src=x>", "x" * 300, "é" * 100, "../x", "/tmp/x", "a/b", "a\\b", "-x",
             "--flag", ".x", "~", "", "  ", "a.", "a\u202eb", "a\ud800", "`x`", "a|b", "a\x00b",
             'a"b', "a:b"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused(name, monkeypatch):
    with pytest.raises(UserError, match="--run_name") as refused:
        check_name(name)
    assert len(str(refused.value)) < 250 and str(refused.value).isprintable()
    with pytest.raises(UserError, match="--run_name"):
        parse((Named,), [f"--run_name={name}"])
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(UserError):
        run_name(name or None, name, "", None)


@pytest.mark.parametrize(
    "name", ["gemma-2b-it-dpo", "run_1.2", "x" * 150, "mine (2)", "größe", "実験", "a=1,b=2", "a+b@c"]
)
def test_good_names_are_accepted(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert run_name(name, "", "", None) == name and parse((Named,), ["--run_name", name])[0].run_name == name


def test_errors_are_wrapped_between_words_on_a_terminal(monkeypatch, capfd):
    """In a file they are one line."""
    import os
    import pty
    import sys
    import termios

    from utils.errors import for_terminal

    line = "error: " + "a word and another one " * 6 + "/a/path/that/is/longer/than/the/lines/of/this/terminal"
    assert for_terminal(line) == line
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        lines = for_terminal(line).split("\n")
    os.close(ours)
    assert " ".join(lines) == line and max(map(len, lines[:-1])) <= 40 and lines[-1].startswith("/a/path")


def test_lists_are_replaced_or_joined():
    """Of several flags the last counts; of `--judge`, whose flags make a panel, all do."""
    from preflab.evaluation.arguments import JudgeArguments
    from utils.cli import normalised
    from utils.keys import keys_of

    keys = keys_of((Small, JudgeArguments))
    assert normalised(["--names", "a", "b", "--names", "c"], keys) == ["--names", "c"]
    assert normalised(["--judge", "a", "--judge=b", "--judge", "c", "d"], keys) == ["--judge", "a", "b", "c", "d"]
    assert JudgeArguments(judge=["a"]).judge == "a" and JudgeArguments(judge=["a", "b"]).judges == ["a", "b"]
