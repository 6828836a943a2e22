"""The keys that every evaluation has: which two models, on which data. Nothing heavy is imported here."""

from dataclasses import dataclass

from utils.cli import option
from utils.errors import UserError

DEFAULT_RUN = "quickstart"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


@dataclass
class ComparisonArguments:
    """Which two models, on which data. What is left out comes from the run that trained the tuned model."""

    run_name: str | None = option(f"A run below --checkpoints (default: {DEFAULT_RUN}, where no model is named).")
    checkpoints: str = option("Where training wrote its runs.", "checkpoints")
    base_model: str | None = option("Hub id, folder or builtin model (default: what the tuned one was trained from).")
    adapter_path: str | None = option("LoRA folder: the tuned model is the base with this adapter.")
    tuned_model: str | None = option("Hub id or folder of a tuned model of its own.")
    base_adapter: str | None = option(
        "LoRA folder on the base's side too, or none (default: the frozen reference of an adapter trained further)."
    )
    base_revision: str | None = option("Hub revision of the base model.")
    tuned_revision: str | None = option("Hub revision of --tuned_model.")
    allow_other_base: bool = option("Accept an adapter that names another base model.", False)
    dtype: str | None = option(
        "Precision of the weights (default: as trained, else bfloat16 on a GPU and float32 on a CPU).",
        choices=["float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = option("sdpa, eager or flash_attention_2.")
    load_in_4bit: bool | None = option("Quantise the base to nf4 (default: as trained).")
    trust_remote_code: bool = option("Run model code from the hub.", False)
    dataset_name: str | None = option(f"Hub id, file or folder (default: the run's, else {ULTRAFEEDBACK}).")
    dataset_config: str | None = option("Configuration of a hub dataset.")
    dataset_revision: str | None = option("Revision of a hub dataset.")
    split: str | None = option("Split to evaluate on (default: the run's test split, else test_prefs or test).")
    prompt_format: str | None = option("Plain-text pairs: auto or chat (default: the run's).", choices=["auto", "chat"])
    chat_template_path: str | None = option("Jinja file that replaces the chat template.")
    max_length: int | None = option("Longest sequence in tokens (default: the run's, else 1024).")
    max_prompt_length: int | None = option("In longer pairs the prompt is cut to this (default: as trained, or half).")
    shared_prompt: bool = option("Compute what two answers to one prompt share once; no figure changes.", True)
    batch_size: int | None = option("Most sequences a batch, below the token budget (default: no limit).")
    batch_tokens: int | None = option("Padded tokens a batch (default: 16384 on a GPU, 2048 on a CPU).")
    limit: int | None = option("Use only the first rows; marks every file name.")
    seed: int = option("Seed of the resampling and of sampled answers.", 42)
    eval_out: str = option("Results go to <eval_out>/<run_name>/.", "eval_out")
    output_dir: str | None = option("Folder of the results, if another.")
    output_json: str | None = option("Path of the summary, if another; rows and picture land beside it.")
    overwrite: bool = option("Compute everything again, whatever an earlier call kept.", False)


@dataclass
class GenerationArguments:
    """How models answer prompts."""

    max_new_tokens: int = option("Longest answer in tokens.", 256)
    temperature: float = option("0 decodes greedily, above 0 samples with --seed.", 0.0)
    top_p: float = option("Nucleus of sampled answers.", 1.0)

    def check(self) -> None:
        """Raise UserError for numbers that nothing can be answered with."""
        if not self.max_new_tokens > 0:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be above 0")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be at least 0, --top_p in (0, 1]")

    def sampling(self, seed: int) -> dict:
        """The settings that decide an answer."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
        }


@dataclass
class JudgeArguments(GenerationArguments):
    """How models answer prompts, and the judge that compares the answers."""

    judge: str = option(
        "hf:MODEL, vllm:MODEL, openai:MODEL@BASE_URL, rm:MODEL, longer or random.", "hf:builtin:smollm2-135m-instruct"
    )
    judge_dtype: str | None = option(
        "Precision of a local judge (default: bfloat16 on a GPU, else float32).",
        choices=["float32", "bfloat16", "float16"],
    )
    judge_attempts: int = option("Further attempts where an endpoint fails or answers nonsense.", 4)
    judge_timeout: float = option("Seconds that an endpoint has for one answer.", 120.0)
    judge_concurrency: int = option("Questions that an endpoint gets at once.", 8)

    def check(self) -> None:
        """Raise UserError for numbers that nothing can be answered or judged with."""
        super().check()
        for key in ("judge_timeout", "judge_concurrency"):
            if not getattr(self, key) > 0:
                raise UserError(f"--{key} {getattr(self, key)}: must be above 0")
        if self.judge_attempts < 0:
            raise UserError(f"--judge_attempts {self.judge_attempts}: must be at least 0")

    def judge_options(self, comparison: ComparisonArguments) -> dict:
        """What `preflab.judging.judges.make_judge` needs to know."""
        # Not at the top: --help imports this module, and models.loading imports torch.
        from preflab.models.loading import default_dtype

        return {
            "dtype": self.judge_dtype or default_dtype(),
            "batch_tokens": comparison.batch_tokens,
            "batch_size": comparison.batch_size,
            "attn_implementation": comparison.attn_implementation,
            "seed": comparison.seed,
            "trust_remote_code": comparison.trust_remote_code,
            **{key: getattr(self, f"judge_{key}") for key in ("attempts", "timeout", "concurrency")},
        }
