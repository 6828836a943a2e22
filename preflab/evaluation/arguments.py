"""Arguments that stages share: the two models, the data, generation and judge.

Scripts import this for --help, so it imports neither torch nor transformers.
"""

from dataclasses import dataclass

from preflab.models.vllm_environment import parse_args
from utils.cli import option
from utils.errors import UserError

ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
DEFAULT_JUDGE = "hf:builtin:smollm2-135m-instruct"

HELP_OF_PLAN = (
    "Print prompts against detectable difference and time, then stop: from a pilot of this many prompts, which are"
    " judged first, or from the JSON of an earlier result."
)

HELP_OF_ENGINE = (
    "Engine that generates answers: hf (transformers), vllm, or auto: vLLM where it is installed and there is a GPU."
)
HELP_OF_VLLM_ARGS = (
    "Settings of vLLM's engine, KEY=VALUE each, such as tensor_parallel_size=2 (GPUs of one engine) or"
    " max_model_len=4096."
)


# Topics of `--help_all`: {topic: regular expression of names}; what none names is the script's own.
TOPICS = {
    "models": "(base|tuned)_(model|revision|adapter)|model_.*|adapter_path|allow_(other_base|identical)|checkpoints"
    "|dtype|load_in_4bit|attn_implementation|chat_template_path|template_date|trust_remote_code",
    "data": "contamination.*|dataset_.*|split|prompt_format|max_(prompt_)?length|limit",
    "answers": "max_new_tokens|temperature|top_p|engine|vllm_args|sampling_seeds|server_.*",
    "judge": "judge.*|audit_.*",
    "batches": "batch_.*|shared_prompt",
    "run": "run_name|output_.*|eval_out|overwrite|seed",
}


@dataclass
class ModelArguments:
    """How a model is loaded and batched, in every stage that loads one."""

    attn_implementation: str | None = option("sdpa, eager or flash_attention_2.")
    chat_template_path: str | None = option("Jinja file that replaces the chat template.")
    template_date: str | None = option(
        "Date that a chat template prints, as YYYY-MM-DD (default: the run's, else today's)."
    )
    trust_remote_code: bool = option("Run model code from the hub.", False)
    batch_size: int | None = option("Maximum sequences per batch (default: limited by --batch_tokens only).")
    batch_tokens: int | None = option("Padded tokens per batch (default: 16384 on a GPU, 2048 on a CPU).")


@dataclass
class DatasetArguments:
    """Which version of a hub dataset is read, and how its rows are."""

    dataset_config: str | None = option("Configuration of a hub dataset.")
    dataset_revision: str | None = option("Revision of a hub dataset.")
    columns: list[str] | None = option("Columns under other names: chosen=output_a rejected=output_b prompt=task.")
    on_bad_row: str | None = option(
        "Rows that cannot be read: refuse (the default) or skip and count them.", choices=["refuse", "skip"]
    )


@dataclass
class OutputArguments:
    """Where results go."""

    topics = TOPICS

    eval_out: str = option("Results go to <eval_out>/<run_name>/.", "eval_out")
    overwrite: bool = option("Recompute everything and replace existing results.", False)


@dataclass
class ComparisonArguments(ModelArguments, DatasetArguments, OutputArguments):
    """Which two models, on which data. Defaults come from the run that trained the tuned model."""

    run_name: str | None = option("A run in --checkpoints (default: the latest finished one; --list shows all).")
    checkpoints: str = option("Folder of the training runs.", "checkpoints")
    base_model: str | None = option(
        "Hub id, folder or builtin model (default: the model that the run started from); openai:MODEL@URL where only"
        " answers are compared."
    )
    adapter_path: str | None = option("LoRA folder: the tuned model is the base with this adapter.")
    tuned_model: str | None = option(
        "Hub id or folder of a fully tuned model; openai:MODEL@URL where only answers are compared."
    )
    base_adapter: str | None = option(
        "LoRA folder on the base model, or none (default: the frozen reference adapter of the run, if it has one)."
    )
    base_run: str | None = option("Another run in --checkpoints that takes the base's place in the comparison.")
    base_revision: str | None = option("Hub revision of the base model.")
    tuned_revision: str | None = option("Hub revision of --tuned_model.")
    allow_other_base: bool = option("Accept an adapter that was trained on another base model.", False)
    allow_identical: bool = option("Report two models that give identical results, instead of stopping.", False)
    dtype: str | None = option(
        "Precision of the weights (default: as trained, else bfloat16 on a GPU and float32 on a CPU).",
        choices=["float32", "bfloat16", "float16"],
    )
    load_in_4bit: bool | None = option("Quantise the base to nf4 (default: as trained).")
    dataset_name: str | None = option(f"Hub id, file or folder (default: the run's, else {ULTRAFEEDBACK}).")
    split: str | None = option("Split to evaluate on (default: the run's test split, else test_prefs or test).")
    prompt_format: str | None = option(
        "Text prompts: auto, chat or text (default: the run's).", choices=["auto", "chat", "text"]
    )
    max_length: int | None = option("Maximum sequence length in tokens (default: the run's, else 1024).")
    max_prompt_length: int | None = option(
        "Prompts of longer pairs are truncated to this (default: as trained, or half)."
    )
    shared_prompt: bool = option("Compute the shared prompt of two answers once; results do not change.", True)
    limit: int | None = option("Use only the first rows; adds LIMIT to every file name.")
    seed: int = option("Seed of bootstrap resampling and of sampled answers.", 42)
    output_dir: str | None = option("Folder of the results, instead of <eval_out>/<run_name>/.")
    output_json: str | None = option("Path of the summary; rows and picture are written next to it.")

    def refuse_output_json(self) -> None:
        """Raise UserError for --output_json, which names one file, in a script that writes several."""
        if self.output_json:
            raise UserError("--output_json: this script writes several files; set their folder with --output_dir")


@dataclass
class ContaminationArguments:
    """Which training data the evaluated documents are compared with."""

    contamination: str | None = option(
        "A run in --checkpoints, or a dataset: count the documents that share an n-gram of words with its rows, and"
        " print the figures without them."
    )
    contamination_split: str | None = option(
        f"Split of --contamination (default: train; train_prefs of {ULTRAFEEDBACK})."
    )


@dataclass
class ServerArguments:
    """How models behind an OpenAI-compatible server are asked for answers."""

    server_timeout: float = option("Timeout per answer of a model behind a server, in seconds.", 600.0)
    server_concurrency: int = option("Concurrent requests to a server whose model answers.", 8)

    def check_server(self) -> None:
        """Raise UserError for values outside their range."""
        for key in ("server_timeout", "server_concurrency"):
            # `not x > 0` instead of `x <= 0`: it is also true for NaN.
            if not getattr(self, key) > 0:
                raise UserError(f"--{key} {getattr(self, key)}: must be above 0")


@dataclass
class GenerationArguments(ServerArguments):
    """How models answer prompts."""

    max_new_tokens: int = option("Maximum tokens per answer.", 256)
    temperature: float = option("0 decodes greedily; above 0 samples with --seed.", 0.0)
    top_p: float = option("Top-p (nucleus) threshold of sampled answers.", 1.0)

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        self.check_server()
        if not self.max_new_tokens > 0:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be above 0")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be in (0, 1]")

    def sampling(self, seed: int) -> dict:
        """The settings that determine an answer."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
        }


@dataclass
class JudgeArguments(GenerationArguments):
    """How models answer prompts, and the judge that compares the answers."""

    judge: list[str] = option(
        "hf:MODEL, vllm:MODEL, openai:MODEL@BASE_URL, rm:MODEL, pair:MODEL, implicit:RUN, longer or random;"
        " several are a panel, of which each is audited.",
        [DEFAULT_JUDGE],
    )
    judge_dtype: str | None = option(
        "Precision of a local judge (default: bfloat16 on a GPU, else float32).",
        choices=["float32", "bfloat16", "float16"],
    )
    judge_attempts: int = option("Retries when an endpoint fails or its answer cannot be parsed.", 4)
    judge_timeout: float = option("Timeout per request to an endpoint, in seconds.", 120.0)
    judge_concurrency: int = option("Concurrent requests to an endpoint.", 8)
    vllm_args: list[str] | None = option(HELP_OF_VLLM_ARGS)
    judge_max_new_tokens: int | None = option(
        "Maximum tokens of the judge's reply, thoughts included (default: the judge prompt's). With a prompt that"
        " compares label probabilities, the judge may think, and its reply is read."
    )

    def __post_init__(self):
        # One judge is a text in artifacts, as before panels.
        if isinstance(self.judge, list) and len(self.judge) == 1:
            (self.judge,) = self.judge

    @property
    def judges(self) -> list[str]:
        """The judges of --judge."""
        return [self.judge] if isinstance(self.judge, str) else self.judge or []

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        super().check()
        twice = [spec for spec in self.judges if self.judges.count(spec) > 1]
        if twice:
            raise UserError(f"--judge {twice[0]}: given twice; a panel is made of different judges")
        parse_args(self.vllm_args)
        for key in ("judge_timeout", "judge_concurrency"):
            if not getattr(self, key) > 0:
                raise UserError(f"--{key} {getattr(self, key)}: must be above 0")
        if self.judge_attempts < 0:
            raise UserError(f"--judge_attempts {self.judge_attempts}: must be at least 0")
        if self.judge_max_new_tokens is not None and self.judge_max_new_tokens < 1:
            raise UserError(f"--judge_max_new_tokens {self.judge_max_new_tokens}: must be above 0")

    def judge_options(self, comparison: ComparisonArguments) -> dict:
        """The options of `preflab.judging.judges.make_judge`."""
        # Not at the top: --help imports this module, and models.loading imports torch.
        from preflab.models.loading import default_dtype

        return {
            # The judge's precision is independent of the models': it must not change with --dtype.
            "dtype": self.judge_dtype or default_dtype(),
            "batch_tokens": comparison.batch_tokens,
            "batch_size": comparison.batch_size,
            "attn_implementation": comparison.attn_implementation,
            "seed": comparison.seed,
            "trust_remote_code": comparison.trust_remote_code,
            "checkpoints": comparison.checkpoints,
            "eval_out": comparison.eval_out,
            "vllm_args": self.vllm_args,
            **{key: getattr(self, f"judge_{key}") for key in ("attempts", "timeout", "concurrency", "max_new_tokens")},
        }


@dataclass
class AuditedJudgeArguments(JudgeArguments):
    """A judge, and the labelled pairs on which it is audited."""

    audit_dataset: str | None = option("Labelled pairs for the judge audit (default: the run's held-out pairs).")
    audit_split: str = option("Split of --audit_dataset.", "test")
    audit_limit: int = option("Maximum labelled pairs for the judge audit; 0 skips the audit.", 200)

    def check(self) -> None:
        """Raise UserError for values outside their range."""
        super().check()
        if self.audit_limit < 0:
            raise UserError(f"--audit_limit {self.audit_limit}: must be at least 0")
