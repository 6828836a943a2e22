"""The commands that evaluate, compare and continue a finished run, printed at its end."""

import shlex
from pathlib import Path


def next_commands(weights: Path, results: Path, *, stage: str, held_out: bool, lora: bool) -> str:
    """The commands of `commands_for` under the heading `next:`, each with what it is for. Arguments as there."""
    commands = commands_for(weights, results, stage=stage, held_out=held_out, lora=lora)
    width = max(len(command) for command, _ in commands)
    if width + max(len(purpose) for _, purpose in commands) + 6 <= 100:
        return "\n".join(["next:", *(f"  {command.ljust(width)}  # {purpose}" for command, purpose in commands)])
    # With long names, the purpose is above its command.
    return "\n".join(["next:", *(f"  # {purpose}\n  {command}" for command, purpose in commands)])


def commands_for(weights: Path, results: Path, *, stage: str, held_out: bool, lora: bool) -> list[tuple[str, str]]:
    """(command, what it is for) of everything that can follow a finished run.

    Args:
        weights, results: the run's folders.
        stage: the stage that trained it: train, sft or reward_model.
        held_out: whether it held rows out.
        lora: whether its weights are an adapter.
    """
    name = shlex.quote(weights.name)
    # Folders that are not the evaluations' defaults must be named in every command.
    folders = f" --checkpoints {shlex.quote(str(weights.parent))}" if str(weights.parent) != "checkpoints" else ""
    folders += f" --eval_out {shlex.quote(str(results.parent))}" if str(results.parent) != "eval_out" else ""
    run = f"--run_name {name}{folders}"
    if stage == "reward_model":
        return reward_commands(weights, folders)
    commands = []
    if stage == "train" and held_out:
        commands += [
            (f"python eval_win_rate.py {run}", "held-out pairs ranked by rewards"),
            (f"python eval_win_rate.py --battle {run}", "a judge compares the answers of base and tuned"),
            (f"python eval_perplexity.py {run}", "what changed in the model's language"),
        ]
    commands += [(f"python human_eval.py {run}", "a page on which people compare the answers, blind")]
    commands += [(f"bash run_lm_eval.sh {run}", "knowledge and reasoning")]
    if lora:
        commands += [(f"python merge_adapter.py {run}", "one plain model folder")]
        if stage == "sft":
            adapter = shlex.quote(str(weights))
            continued = f"--config FILE.yaml --start_adapter {adapter} --start_adapter_use continue"
            commands += [(f"python dpo_train_human_preference.py {continued}", "preference training on top")]
    commands += [(f"python export_gguf.py {run}", "GGUF files for llama.cpp and Ollama, verified")]
    commands += [(f"python report.py{folders}", "one page of all results")]
    commands += [(f"python release.py {run}", "one folder for the hub, with a model card")]
    return [*commands, (f"python eval_win_rate.py --list{folders}", "all runs with their figures")]


def reward_commands(weights: Path, folders: str) -> list[tuple[str, str]]:
    """(command, what it is for) of what can follow a reward model's training. `folders`: flags of other folders."""
    scorer = f"rm:{shlex.quote(str(weights))}"
    return [
        (f"python eval_win_rate.py --battle --judge {scorer}", "as the judge of the latest run's answers, audited"),
        (f"python eval_win_rate.py --list{folders}", "all runs with their figures"),
    ]
