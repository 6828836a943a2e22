"""Every script of the repository with the arguments of a small call, for the tests that run over all stages."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT, eval_args, train_args
from helpers import alpaca_args, pair_args, reward_args, sft_args


@dataclass
class Inputs:
    """Models, data and a finished run that small calls read."""

    tiny: Path
    trained: Path
    prefs: Path
    conversations: Path
    prompts: Path
    reference: Path


# The arguments of a small call, given the inputs and a folder for its output.
STAGES = {
    "dpo_train_human_preference.py": lambda i, folder: train_args(i.tiny, i.prefs, folder),
    "train_reward_model.py": lambda i, folder: reward_args(i.tiny, i.prefs, folder),
    "sft_train_instruction.py": lambda i, folder: sft_args(i.tiny, i.conversations, folder),
    "generate_preference_pairs.py": lambda i, folder: pair_args(i.tiny, i.prompts, folder / "out"),
    "merge_adapter.py": lambda i, folder: eval_args(i.trained, folder / "out", "--merged_dir", folder / "merged"),
    "export_gguf.py": lambda i, folder: eval_args(i.trained, folder / "out", "--gguf_dir", folder / "gguf"),
    "eval_reward_model.py": lambda i, folder: [
        *("--scorer", f"judge:hf:{i.tiny}", "--dataset_name", i.prefs, "--eval_out", folder / "out", "--run_name", "r")
    ],
    "eval_win_rate.py": lambda i, folder: eval_args(i.trained, folder / "out"),
    "eval_win_rate.py --battle": lambda i, folder: eval_args(i.trained, folder / "out", "--battle"),
    "eval_perplexity.py": lambda i, folder: eval_args(i.trained, folder / "out"),
    "run_alpacaeval_local.py": lambda i, folder: alpaca_args(i.trained, folder, i.reference, i.tiny),
    "human_eval.py": lambda i, folder: eval_args(i.trained, folder / "out", "--prompts", i.prompts),
    "chat.py": lambda i, folder: eval_args(i.trained, folder / "out", "--prompt", "Hi", "--max_new_tokens", 4),
    "run_lm_eval.sh": lambda i, folder: ["--checkpoints", i.trained / "ck", "--eval-out", folder / "out"],
    "run_online_iteration.sh": lambda i, folder: [],
    "run_sppo_iteration.sh": lambda i, folder: [],
    "release.py": lambda i, folder: [
        *eval_args(i.trained, i.trained / "out", "--release_dir", folder / "release", "--base_hub_id", "me/tiny"),
        *("--license", "mit", "--language", "en"),
    ],
    "report.py": lambda i, folder: [
        *("--checkpoints", i.trained / "ck", "--eval_out", i.trained / "out", "--output_dir", folder / "out")
    ],
}


def _of(*names: str):
    """The named classes, `module:class` each, imported when called."""
    return lambda: tuple(getattr(importlib.import_module(m), c) for m, c in (name.split(":") for name in names))


COMPARISON = "preflab.evaluation.arguments:ComparisonArguments"
# The dataclasses of each script's flags.
ARGUMENTS = {
    "dpo_train_human_preference.py": _of(
        "preflab.data.preferences:DataArguments", "preflab.training.dpo_config:DPORunConfig", "trl:ModelConfig"
    ),
    "sft_train_instruction.py": _of(
        "preflab.data.conversations:SFTArguments", "preflab.training.sft_config:SFTRunConfig", "trl:ModelConfig"
    ),
    "train_reward_model.py": _of(
        "preflab.data.preferences:PairFilters", "preflab.training.reward_config:RewardRunConfig", "trl:ModelConfig"
    ),
    "generate_preference_pairs.py": _of("generate_preference_pairs:PairArguments"),
    "merge_adapter.py": _of(COMPARISON, "merge_adapter:MergeArguments"),
    "export_gguf.py": _of(COMPARISON, "export_gguf:GgufArguments"),
    "eval_reward_model.py": _of("eval_reward_model:RewardEvalArguments"),
    "eval_win_rate.py": _of(COMPARISON, "eval_win_rate:WinRateArguments"),
    "eval_perplexity.py": _of(COMPARISON, "eval_perplexity:PerplexityArguments"),
    "run_alpacaeval_local.py": _of(COMPARISON, "run_alpacaeval_local:AlpacaEvalArguments"),
    "human_eval.py": _of(COMPARISON, "human_eval:HumanEvalArguments"),
    "chat.py": _of(COMPARISON, "chat:ChatArguments"),
    "run_lm_eval.sh": _of("preflab.harness.arguments:HarnessArguments"),
    "release.py": _of("preflab.release.arguments:ReleaseArguments"),
    "report.py": _of("preflab.reporting.arguments:ReportArguments"),
}
# Shell scripts that run two other stages.
ITERATIONS = ("run_online_iteration.sh", "run_sppo_iteration.sh")
NO_STAGES = {"quickstart.sh", "run_tests.sh", "doctor.sh", "install_gguf.sh", "install_vllm.sh"}
SCRIPTS = sorted({stage.split()[0] for stage in STAGES})


def assert_covers_all_scripts(table, without: dict[str, str] | None = None) -> None:
    """Each script has an entry in a test's table, or a reason in `without` for having none."""
    scripts = {p.name for pattern in ("*.py", "*.sh") for p in ROOT.glob(pattern)} - NO_STAGES
    assert scripts == set(SCRIPTS), "tests/stages.py: STAGES has every script"
    covered = {stage.split()[0] for stage in table}
    assert covered | set(without or ()) == scripts and not covered & set(without or ())


def run_stage(call, stage: str, *args) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a stage: Python scripts in this process, the scripts of iterations as commands."""
    script = stage.split()[0]
    if script in ITERATIONS:
        command = ["bash", str(ROOT / script), *map(str, args)]
        env = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout, done.stderr
    # run_lm_eval.sh chooses a Python and calls this module.
    return call("preflab.harness.run" if script == "run_lm_eval.sh" else script.removesuffix(".py"), *args)
