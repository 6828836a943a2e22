"""The steps of benchmarks/gpu_acceptance.py: their commands, their figures, and when they are skipped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds between two looks at a run that is to be killed.
POLL = 0.2
# Optimizer steps of a training step here, and the step after whose checkpoint the killed run ends.
STEPS, KILLED_AFTER = 6, 2
# Rows of a training run and of an evaluation, prompts of generated pairs. Names of runs and files say such limits.
TRAINED_ROWS, EVALUATED_ROWS, PROMPTS = 48, 16, 8
# Tokens per forward of the random models.
SHAPE_TOKENS = 4096
# Largest difference of two losses that are computed twice in the same way, by precision.
SAME_LOSS = {"bf16": 2e-2, "fp32": 1e-4}


@dataclass
class Machine:
    """What the steps run on.

    Attributes:
        device: "cuda" or "cpu".
        gib: memory of the first GPU in GiB; 0 without one.
        folder: where the runs go; deleted at the end.
    """

    device: str
    gib: float
    folder: Path

    @property
    def precision(self) -> list[str]:
        """Flags of the training scripts."""
        return ["--use_cpu", "true", "--bf16", "false"] if self.device == "cpu" else ["--bf16", "true"]

    @property
    def dtype(self) -> str:
        """Precision of the evaluations."""
        return "float32" if self.device == "cpu" else "bfloat16"

    def folders(self) -> list[str]:
        """Flags that make a training script write to `folder`."""
        return ["--output_dir", str(self.folder / "checkpoints"), "--eval_out", str(self.folder / "eval_out")]

    def summary(self, run_name: str, name: str) -> dict:
        """A summary that a stage wrote for a run. `run_name`: the name of its folder."""
        return json.loads((self.folder / "eval_out" / run_name / f"{name}.json").read_text())


@dataclass
class Step:
    """One step.

    Attributes:
        name: for --only.
        says: what it shows.
        command: arguments of a Python interpreter, given the machine.
        read: the figures of the page, given the machine and the command's standard output.
        skip: why it cannot run on a machine, or None.
        needs: the step whose run it reads.
        do: in place of the command, for steps of several processes: (machine, seconds left) to standard output.
    """

    name: str
    says: str
    command: Callable[[Machine], list] | None = None
    read: Callable[[Machine, str], dict] = lambda machine, output: {}
    skip: Callable[[Machine], str | None] = lambda machine: None
    needs: str | None = None
    do: Callable[[Machine, float], str] | None = None


class StepFailed(Exception):
    """A command failed, or its figures are wrong; the message is one line."""


@contextmanager
def started(command: list, output: int = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """A command in its own process group, which is killed at the end of the context if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=output,
        stderr=output,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )
    try:
        yield process
    finally:
        # Also on Ctrl-C: nothing of a step continues.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def execute(command: list, seconds: float) -> str:
    """Run a command; its standard output.

    Raises:
        StepFailed: it failed, or did not end within `seconds`.
    """
    with started(command) as process:
        try:
            output, errors = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            raise StepFailed(f"not finished after {seconds:.0f} s") from None
    if process.returncode:
        lines = [line for line in (errors or output).splitlines() if line.strip()]
        raise StepFailed(f"exit code {process.returncode}: {lines[-1] if lines else 'no message'}")
    return output


# ----------------------------------------------------------------------------------------------- commands of the steps


def folder_of(run_name: str, rows: int = TRAINED_ROWS) -> str:
    """The name of the folders of a run that is limited to `rows`."""
    return f"{run_name}_LIMIT{rows}"


def training(script: str, name: str, *flags, config: str = "configs/quickstart.yaml") -> Callable[[Machine], list]:
    """A short training run of the quickstart's recipe."""

    def command(machine: Machine) -> list:
        return [
            *(
                script,
                "--config",
                config,
                "--run_name",
                name,
                "--limit",
                TRAINED_ROWS,
                "--max_steps",
                STEPS,
                "--save_steps",
                2,
            ),
            *("--sample_prompts", 2, *machine.folders(), *machine.precision, *flags),
        ]

    return command


def evaluation(script: str, *flags) -> Callable[[Machine], list]:
    """An evaluation of the first run."""

    def command(machine: Machine) -> list:
        return [
            *(script, "--run_name", folder_of("dpo_lora"), "--checkpoints", machine.folder / "checkpoints"),
            *("--eval_out", machine.folder / "eval_out", "--limit", EVALUATED_ROWS, "--dtype", machine.dtype, *flags),
        ]

    return command


def pairs(machine: Machine) -> list:
    """Preference pairs from the model's own answers, ranked by their words."""
    return [
        *("generate_preference_pairs.py", "--config", "configs/pairs/quickstart-sppo.yaml", "--limit", PROMPTS),
        *("--base_model", "builtin:smollm2-135m-instruct", "--run_name", "pairs", "--test_prompts", 2),
        *("--eval_out", machine.folder / "eval_out", "--dtype", machine.dtype),
    ]


def throughput(model: str, *flags, way: str | None = None) -> Callable[[Machine], list]:
    """The training benchmark: stock TRL and this project, or one of them (`way`)."""

    def command(machine: Machine) -> list:
        figures = [] if way else ["--json", machine.folder / f"{model.replace(':', '-')}.json"]
        return [
            *("benchmarks/train_throughput.py", "--model", model, "--device", machine.device, "--dtype", "bfloat16"),
            *("--steps", 2, "--draws", 1, *figures, *(("--way", way) if way else ()), *flags),
        ]

    return command


# ------------------------------------------------------------------------------------------------------------ figures


def training_figures(run_name: str) -> Callable[[Machine, str], dict]:
    """Losses, speed and memory from a run's artifacts."""

    def read(machine: Machine, _: str) -> dict:
        summary, losses = machine.summary(folder_of(run_name), "train"), losses_of(machine, run_name)
        if not all(abs(loss) < 100 for loss in losses):
            raise StepFailed(f"losses {losses}: not finite")
        peak = summary["run"]["peak_memory_gib"]
        return {"first and last loss": f"{losses[0]:.3f}, {losses[-1]:.3f}", "peak GiB": max(peak.values())}

    return read


def losses_of(machine: Machine, run_name: str) -> list[float]:
    """The loss of every step of a run."""
    log = machine.folder / "eval_out" / folder_of(run_name) / "train_log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row["loss"] for row in rows if row.get("split") == "train" and "loss" in row]


def claim_of(run_name: str, name: str) -> Callable[[Machine, str], dict]:
    """The verdict of an evaluation."""
    return lambda machine, _: {"verdict": machine.summary(run_name, name)["claim"]}


def evaluated(name: str) -> Callable[[Machine, str], dict]:
    """The verdict of an evaluation of the first run."""
    return claim_of(folder_of("dpo_lora"), f"{name}_LIMIT{EVALUATED_ROWS}")


def ratio(model: str) -> Callable[[Machine, str], dict]:
    """Speed beside stock TRL, from the benchmark's JSON."""

    def read(machine: Machine, _: str) -> dict:
        figures = json.loads((machine.folder / f"{model.replace(':', '-')}.json").read_text())
        return {
            "ratio to stock": round(figures["ratio"], 2),
            "pairs/s here": round(figures["ways"]["ours"]["pairs_per_second"], 2),
            "MFU here": f"{figures['ways']['ours']['mfu']:.1%}",
            "largest difference of a loss": float(f"{figures['max_loss_difference']:.2g}"),
        }

    return read


def one_way(machine: Machine, output: str) -> dict:
    """Speed and memory of this project's trainer alone."""
    figures = json.loads(output.strip().splitlines()[-1])
    return {
        "pairs/s": round(figures["pairs"] / figures["seconds"], 2),
        "peak GiB": max(figures["peak_memory_gib"].values()),
        "micro-batch tokens": figures["micro_batch_tokens"],
    }


def kill_and_resume(machine: Machine, seconds: float) -> str:
    """Kill -9 a run after its first checkpoint, continue it, and compare its losses with those of the unbroken run.

    Raises:
        StepFailed: the run ended before it could be killed, or the losses differ.
    """
    command = training("dpo_train_human_preference.py", "killed")(machine)
    checkpoint = machine.folder / "checkpoints" / folder_of("killed") / f"checkpoint-{KILLED_AFTER}"
    deadline = time.monotonic() + seconds
    # A pipe that nobody reads would block the run once it is full.
    with started(command, output=subprocess.DEVNULL) as process:
        while process.poll() is None and not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(POLL)
        # Leaving the context kills it.
        ended = process.poll() is not None
    if ended or not checkpoint.exists():
        raise StepFailed("the run ended, or ran out of time, before its first checkpoint was there to kill it")
    execute(command, deadline - time.monotonic())
    unbroken, continued = losses_of(machine, "dpo_lora"), losses_of(machine, "killed")
    difference = max(abs(a - b) for a, b in zip(unbroken, continued, strict=True))
    limit = SAME_LOSS["fp32" if machine.device == "cpu" else "bf16"]
    if difference > limit:
        raise StepFailed(f"losses differ by {difference:.2g} (limit {limit:g}) from the unbroken run: {continued}")
    return json.dumps({"largest difference of a loss": float(f"{difference:.2g}"), "steps": len(continued)})


def planned_and_measured(shape: str) -> Callable[[Machine, float], str]:
    """A training step of a shape with random weights: its peak memory beside the one that --plan computes."""

    def do(machine: Machine, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        limit = ("--micro_batch_tokens", SHAPE_TOKENS)
        output = execute(throughput(f"shape:{shape}", *limit, way="ours")(machine), seconds)
        measured = json.loads(output.strip().splitlines()[-1])
        planned = plan_of(shape, machine, deadline - time.monotonic())
        peak = measured["peak_memory_gib"].get("gpu", measured["peak_memory_gib"]["host"])
        return json.dumps({
            "pairs/s": round(measured["pairs"] / measured["seconds"], 2),
            "peak GiB": peak,
            "planned GiB": round(planned, 2),
            "planned over measured": round(planned / peak, 2),
        })  # fmt: skip

    return do


def plan_of(shape: str, machine: Machine, seconds: float) -> float:
    """GiB that --plan computes for `planned_and_measured`, without the context of the device, as it is measured."""
    from benchmarks.shapes import config_of
    from preflab.models.loading import load_tokenizer

    folder = machine.folder / shape
    config_of(shape, architectures=None).save_pretrained(folder)
    load_tokenizer("builtin:smollm2-135m-instruct").save_pretrained(folder)
    command = training(
        *("dpo_train_human_preference.py", shape, "--model_name_or_path", folder, "--dtype", "bfloat16"),
        *("--micro_batch_tokens", SHAPE_TOKENS, "--plan", f"1x{max(1, int(machine.gib))}GB"),
    )(machine)
    execute(command, seconds)
    # The name also says that --limit was given.
    (file,) = (machine.folder / "eval_out").glob(f"{shape}*_plan.json")
    plan = json.loads(file.read_text())["plan"]
    parts = plan["options"][0]["bytes"]
    return (parts["total"] - parts["process"]) / 2**30


def last_json(machine: Machine, output: str) -> dict:
    """The figures that a step printed as its last line."""
    return json.loads(output.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ what is skipped


def without(module: str) -> Callable[[Machine], str | None]:
    """Skip where a package is not installed."""
    return lambda machine: None if find_spec(module) else f"{module} is not installed"


def needs_gpu(gib: float = 0) -> Callable[[Machine], str | None]:
    """Skip on a CPU, and on a GPU with less memory."""

    def skip(machine: Machine) -> str | None:
        if machine.device == "cpu":
            return "for a GPU"
        return None if machine.gib >= gib else f"needs about {gib} GiB of GPU memory; this one has {machine.gib:.0f}"

    return skip


def flash_attention(machine: Machine) -> str | None:
    return needs_gpu()(machine) or without("flash_attn")(machine)


DPO, SFT = "dpo_train_human_preference.py", "sft_train_instruction.py"
SHAPES = {"qwen2.5-0.5b": 8, "gemma-2b": 20, "llama-3-8b": 40}
STEPS_OF_PAGE = [
    Step(
        "shared_prompts",
        "log-probabilities and gradients of shared prompts against float64, ten architectures",
        lambda machine: ["benchmarks/shared_prompt_check.py", "--device", machine.device],
        last_json,
    ),
    Step("dpo_lora", "DPO with LoRA", training(DPO, "dpo_lora"), training_figures("dpo_lora")),
    Step("kill_and_resume", "kill -9 and the same command again", read=last_json, needs="dpo_lora", do=kill_and_resume),
    Step(
        "dpo_qlora",
        "DPO with QLoRA (nf4)",
        training(DPO, "dpo_qlora", "--load_in_4bit", "true"),
        training_figures("dpo_qlora"),
        without("bitsandbytes"),
    ),
    Step(
        "dpo_full",
        "DPO of all parameters",
        training(DPO, "dpo_full", "--use_peft", "false", "--learning_rate", 1e-6),
        training_figures("dpo_full"),
    ),
    Step(
        "sft",
        "SFT with LoRA, packed rows",
        training(SFT, "sft", config="configs/quickstart-sft.yaml"),
        training_figures("sft"),
    ),
    Step(
        "pairs",
        "answers of the model, sampled and ranked",
        pairs,
        claim_of(folder_of("pairs", PROMPTS), "preference_pairs"),
    ),
    Step(
        "sppo",
        "SPPO on these pairs",
        lambda machine: training(
            *(DPO, "sppo", "--loss_type", "sppo", "--beta", 0.001),
            *("--dataset_name", machine.folder / "eval_out" / folder_of("pairs", PROMPTS), "--allow_fatal"),
        )(machine),
        training_figures("sppo"),
        needs="pairs",
    ),
    Step("win_rate", "win rate by rewards", evaluation("eval_win_rate.py"), evaluated("win_rate")),
    Step(
        "perplexity",
        "perplexity and KL",
        evaluation("eval_perplexity.py"),
        evaluated("perplexity"),
    ),
    Step(
        "battle",
        "greedy answers of base and tuned, compared by length",
        evaluation("eval_win_rate.py", "--battle", "--judge", "longer", "--max_new_tokens", 64),
        evaluated("battle"),
    ),
    Step(
        "merge",
        "merging the adapter, log-probabilities compared",
        evaluation("merge_adapter.py"),
        evaluated("merge"),
    ),
    Step(
        "flash_attention",
        "DPO with flash attention",
        training(DPO, "flash_attention", "--attn_implementation", "flash_attention_2"),
        training_figures("flash_attention"),
        flash_attention,
    ),
    Step(
        "throughput_gemma_2b",
        "training speed beside stock TRL, gemma-2b's shape with random weights",
        throughput("shape:gemma-2b"),
        ratio("shape:gemma-2b"),
        needs_gpu(SHAPES["gemma-2b"]),
    ),
    *(
        Step(
            f"shape_{name.replace('-', '_').replace('.', '_')}",
            f"LoRA DPO of {name}'s shape with random weights, beside the planned memory",
            read=last_json,
            skip=needs_gpu(gib),
            do=planned_and_measured(name),
        )
        for name, gib in SHAPES.items()
    ),
    Step(
        "throughput_compiled",
        "the same with compiled layers",
        throughput("shape:gemma-2b", way="compiled"),
        one_way,
        needs_gpu(SHAPES["gemma-2b"]),
    ),
]
