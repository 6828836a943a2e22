"""Keys that every training stage has beside TRL's own, their checks, and what is derived from them."""

import importlib.util
import os
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from trl import ModelConfig

from preflab.models.fast.compiled_layers import missing_compiler
from preflab.training.decisions import REFUSED, check_decisions
from preflab.training.keys import TOPICS
from preflab.training.lora_targets import as_names
from preflab.training.memory import needed, reason_for_checkpointing
from preflab.training.memory_parts import Memory, Weights
from utils.errors import UserError

# Keys of ModelConfig that only LoRA reads.
KEYS_OF_LORA = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip
# Arguments that must be above 0 where they are given.
POSITIVE = (
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "global_batch_size", "max_length",
)  # fmt: skip
# Trackers of --report_to in requirements/tracking.txt; the others of transformers are passed on unchecked.
TRACKERS = ("tensorboard", "trackio", "wandb")
# Maximum tokens of an answer in samples.md.
SAMPLE_TOKENS = 64


@dataclass
class RunConfig:
    """Keys of this project that every training stage has beside TRL's own. Put before TRL's config in the bases."""

    # PEFT's type of the trained model.
    task_type = "CAUSAL_LM"
    # Both of all dataclasses of a training stage, for --help_all and `check_decisions`.
    topics, unsupported = TOPICS, REFUSED

    output_dir: str = field(default="checkpoints", metadata={"help": "Weights go to <output_dir>/<run_name>/."})
    eval_out: str = field(default="eval_out", metadata={"help": "Results go to <eval_out>/<run_name>/."})
    start_adapter: str | None = field(
        default=None, metadata={"help": "LoRA folder or hub id that the model starts from, on top of its base."}
    )
    start_adapter_use: str | None = field(
        default=None,
        metadata={
            "help": "merge: merge it into the base and train a new adapter; continue: train that adapter further.",
            "choices": ["merge", "continue"],
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per optimizer step over all processes; gradient accumulation is derived from it."},
    )
    resume: str = field(default="auto", metadata={"help": "auto, never, or the path of a checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run of this name wrote."})
    preflight_only: bool = field(default=False, metadata={"help": "Stop after the preflight."})
    plan: str | None = field(
        default=None,
        metadata={
            "help": "Only plan the run on this hardware (1x24GB, 8x80GB, 2x8x80GB, cpu:24GB): memory, time, disk."
        },
    )
    plan_tflops: float | None = field(
        default=None,
        metadata={"help": "TFLOP/s of matrix products per GPU of --plan (default: of a usual card of that memory)."},
    )
    allow_fatal: bool = field(
        default=False, metadata={"help": "Train even if the preflight finds the run useless (lines marked fatal)."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations instead of storing them (default: only if memory requires it)."},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "Compile the decoder layers: faster steps after a first one of a minute or more."},
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "Date that a chat template prints, as YYYY-MM-DD (default: the day the run began)."},
    )
    sample_prompts: int = field(default=4, metadata={"help": "Test prompts answered by base and tuned at the end."})
    published: str | None = field(
        default=None, metadata={"help": "YAML of published results, shown in the model card beside the run's own."}
    )
    base_hub_id: str | None = field(
        default=None, metadata={"help": "Hub id of a base model that is a local folder, for the model card."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two log rows."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "tensorboard, trackio, wandb or none."})
    # transformers' default (true) replaces a NaN loss by the mean of the earlier ones, which hides a diverged run.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Replace NaN losses in the log."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest are deleted."})

    def __post_init__(self):
        # Read before super().__post_init__ copies one of the two names to the other.
        self.checkpointing_is_open = self.gradient_checkpointing is None and self.activation_checkpointing is None
        # transformers checks use_cpu before it allows bf16 on a CPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # None would make it depend on transformers' log level, which the scripts set to ERROR.
        self.disable_tqdm = bool(self.disable_tqdm)
        self.precision_is_open = self.bf16 is None and not self.fp16
        if self.precision_is_open:
            # TRL defaults to bf16 on every device; here CPU runs default to float32.
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()

    def adapt_data(self, data_args) -> None:
        """Set the data arguments that the objective decides; called before the run's arguments are recorded."""

    def keeps_reference_model(self, use_peft: bool) -> bool:
        """Whether a second copy of the weights is loaded as the reference."""
        return False

    def reference_in_step(self) -> bool:
        """Whether every step computes the reference's forward."""
        return False

    def memory(
        self,
        weights: Weights,
        row: tuple[int, ...],
        longest: int,
        *,
        checkpointing: bool,
        cuda: bool | None = None,
        shards=None,
        alike: bool = False,
    ) -> Memory:
        """The memory of a training step of one process.

        Args:
            row: the tokens of the largest row of the data (`largest_row`).
            longest: tokens of the longest sequence in the data.
            checkpointing: whether activations are computed twice.
            cuda: whether training runs on a GPU (default: as this process).
            shards: how training is divided over processes, None for one process.
            alike: whether all batches have the same lengths.
        """
        batch, accumulates = self.largest_batch(row, longest, weights.config)
        return needed(
            weights, self, batch, accumulates, checkpointing=checkpointing, reference_in_step=self.reference_in_step(),
            cuda=not self.use_cpu if cuda is None else cuda, shards=shards, alike=alike,
        )  # fmt: skip

    def fit_memory(self, weights: Weights, row: tuple[int, ...], longest: int, free: float, shards=None) -> str | None:
        """Turn on gradient checkpointing if memory requires it and neither YAML nor command line set it.

        All processes choose the same: if one of them is short of memory, all recompute their activations.

        Args:
            free: bytes that this process may use.
            row, longest, shards: as for `memory`.

        Returns:
            The reason as a sentence, or None where nothing was turned on.
        """
        if not self.checkpointing_is_open:
            return None
        without = self.memory(weights, row, longest, checkpointing=False, shards=shards).total
        reason = reason_for_checkpointing(without, free)
        if self.world_size > 1:
            # The first process that is short of memory gives the reason for all.
            reason = next((r for r in gather_object([reason]) if r), None)
        # transformers renames the first to the second; both are set, so that every reader finds the same value.
        self.gradient_checkpointing = self.activation_checkpointing = reason is not None
        return reason

    @property
    def sharding(self) -> str | None:
        """What spreads parameters or optimizer state over processes, as an error names it; None without sharding."""
        plugin = self.deepspeed_plugin
        if plugin is not None:
            return f"DeepSpeed ZeRO-{plugin.zero_stage}"
        if PartialState().distributed_type == DistributedType.NO:
            # A single CPU process, where accelerate ignores FSDP.
            return None
        return "FSDP" if self.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else None

    @property
    def precision(self) -> str:
        """The precision of the forward pass: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dtype_name(self) -> str:
        """torch's name of that precision."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.precision]


def check_positive(*holders_and_keys: tuple[object, tuple[str, ...]]) -> None:
    """Raise UserError for a number that is given and not above 0."""
    for holder, keys in holders_and_keys:
        for key in keys:
            value = getattr(holder, key)
            if value is not None and not value > 0:
                raise UserError(f"--{key} {value}: must be above 0")


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker of --report_to that transformers does not know, or that is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name}: unknown; choose from none, all, {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: the package is not installed: pip install -r requirements/tracking.txt"
            )


def check_run_config(config: RunConfig, model) -> None:
    """Raise UserError for keys that do not fit together in any training stage; bring LoRA's targets into one form.

    Args:
        model: TRL's ModelConfig.
    """
    check_positive((config, POSITIVE), (model, ("lora_r", "lora_alpha")))
    # transformers' default for max_steps is -1, no limit. `not > 0` also refuses NaN.
    if config.max_steps <= 0 and not config.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs {config.num_train_epochs}: must be above 0 (or give --max_steps)")
    if model.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: a hub id, a folder, or builtin:smollm2-135m-instruct")
    if (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        raise UserError("--load_in_4bit and --load_in_8bit need --use_peft: quantised weights cannot be trained")
    if (model.load_in_4bit or model.load_in_8bit) and config.sharding == "DeepSpeed ZeRO-3":
        raise UserError(
            "--load_in_4bit and --load_in_8bit: DeepSpeed ZeRO-3 cannot shard quantised weights; launch with"
            " configs/accelerate/fsdp2.yaml and --bnb_4bit_quant_storage bfloat16"
        )
    model.lora_target_modules = as_names(model.lora_target_modules)
    for key in () if model.use_peft else KEYS_OF_LORA:
        if getattr(model, key) != ModelConfig.__dataclass_fields__[key].default:
            raise UserError(
                f"--{key}: has no effect without --use_peft, since all weights are trained; add or remove it"
            )
    check_decisions(config, model)
    check_trackers(config.report_to)
    _check_compiler(config, model)
    model.lora_task_type = config.task_type
    if (config.start_adapter is None) != (config.start_adapter_use is None):
        raise UserError(
            "--start_adapter and --start_adapter_use must be given together: merge puts the adapter into the base and"
            " trains a new one, continue trains that adapter further"
        )
    if config.start_adapter_use == "continue" and not model.use_peft:
        raise UserError("--start_adapter_use continue needs --use_peft: it trains an adapter further")


def _check_compiler(config: RunConfig, model) -> None:
    """Raise UserError where --compile_layers cannot work."""
    if not config.compile_layers:
        return
    if model.load_in_4bit or model.load_in_8bit:
        raise UserError("--compile_layers: not with quantised weights, whose layers are not compiled; remove it")
    if config.sharding is not None:
        raise UserError("--compile_layers: not with a sharded model (FSDP, DeepSpeed); remove it")
    reason = missing_compiler(config.use_cpu)
    if reason:
        raise UserError(f"--compile_layers: {reason}; install g++ or remove it")


def unsharded_base(config: RunConfig, model) -> list[str]:
    """Return a note where accelerate leaves the quantised base unsharded under FSDP: its warning is silenced."""
    if config.sharding != "FSDP" or not model.load_in_4bit or model.bnb_4bit_quant_storage not in (None, "uint8"):
        return []
    return [
        "FSDP does not shard 4-bit weights in their default storage: every process holds the whole base;"
        f" --bnb_4bit_quant_storage {config.dtype_name} shards them"
    ]


def fit_global_batch(config: RunConfig, processes: int | None = None) -> list[str]:
    """Derive the gradient accumulation (and, where needed, the per-device batch) from `global_batch_size`.

    Args:
        processes: default: those of this run.

    Returns:
        Notes for the preflight: how the batch changed with the number of processes.

    Raises:
        UserError: the global batch is not a multiple of the number of processes.
    """
    # Invariant: per-device batch x accumulation x processes = global batch.
    world, global_batch = processes or config.world_size, config.global_batch_size
    before = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if global_batch is None:
        single = before[0] * before[1]
        if world == 1:
            return []
        return [f"global batch is {single * world} on {world} processes; on one process it is {single}"]
    if global_batch % world:
        raise UserError(f"--global_batch_size {global_batch}: not divisible by {world} processes; choose a multiple")
    share = global_batch // world
    # The largest per-device batch up to the configured one that divides this process's share.
    config.per_device_train_batch_size = next(n for n in range(min(before[0], share), 0, -1) if share % n == 0)
    config.gradient_accumulation_steps = share // config.per_device_train_batch_size
    after = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if after == before:
        return []
    return [
        f"batch {before[0]} × {before[1]} became {after[0]} × {after[1]} on {world} processes: the global batch stays"
        f" {global_batch}"
    ]
