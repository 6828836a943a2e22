"""--plan: does a run fit on other hardware, with which flags, how long does it take, what does it need on the disk.

Memory is computed from the model's config (`preflab.training.memory`), time from a measured share of the rate of matrix
products (docs/performance.md); no weights are read and no GPU is needed.
"""

import math
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, field, replace

from transformers import AutoConfig

from preflab.data import conversations, preferences, thumbs
from preflab.data.preferences import PairFilters
from preflab.data.prompt_format import PromptFormat
from preflab.models.checks import largest_and_longest
from preflab.models.loading import LOAD_ERRORS, load_error, load_tokenizer, locate
from preflab.training.lora_targets import check_targets
from preflab.training.memory import USABLE_SHARE, optimizer_bytes
from preflab.training.memory_parts import Memory, Weights
from preflab.training.plan import plan_training
from preflab.training.planner_report import command_with, render
from preflab.training.run_config import fit_global_batch
from preflab.training.sharding import Shards
from preflab.training.throughput import REFERENCE_OPERATIONS, STEP_OPERATIONS, matmul_rate
from preflab.training.token_figures import tokens_of_rows
from preflab.training.traced_memory import counts_of, skeleton
from utils.artifacts import check_writable, metric
from utils.errors import UserError, first_line
from utils.stage import Stage

GIB = 2**30
HARDWARE = re.compile(
    r"(?:(?:(?P<nodes>\d+)x)?(?P<gpus>\d+)x|(?P<cpu>cpu):)(?P<gib>\d+(?:\.\d+)?)\s*Gi?B", re.IGNORECASE
)
# Dense bfloat16 TFLOP/s of the data sheet of a usual card, by its GiB: (up to so many GiB, name, TFLOP/s).
CARDS = (
    (16, "RTX 4080", 97), (24, "RTX 4090", 165), (40, "A100 40GB", 312), (48, "L40S", 362), (80, "H100 SXM", 989),
    (144, "H200", 989), (math.inf, "B200", 2250),
)  # fmt: skip
# Measured (docs/performance.md). On an H200 matrix products ran at 79% of its data sheet's rate, and DPO training at
# 29.1% of that (gemma-2b's shape, LoRA, 8,192 tokens together); on two CPU cores training ran at 83.7% of their rate in
# float32, at 49.3% in bfloat16.
RATE_SHARE, GPU_MFU = 0.79, 0.291
CPU_MFU = {"fp32": 0.837, "bf16": 0.493, "fp16": 0.493}
# Of a training process without a model: resident memory on a CPU (measured by benchmarks/plan_check.py), and on a GPU
# the CUDA context with the workspaces of its libraries (assumed).
PROCESS = {"cpu": 0.9 * GIB, "gpu": 0.8 * GIB}
# Rows that are tokenised for the lengths.
SAMPLED_ROWS = 1000
# Where the rows cannot be read: UltraFeedback's number of pairs and mean tokens at max_length 1,024
# (docs/performance.md), for conversations two thirds of a pair; a third of the longest sequence is the prompt.
UNREAD_ROWS, UNREAD_TOKENS = 60_000, {"pairs": 740, "conversations": 490}


@dataclass(frozen=True)
class Hardware:
    """What a run is planned on.

    Attributes:
        nodes, gpus: machines, and GPUs of each; one process on a CPU.
        gib: memory of a GPU, or of the machine without one.
        rate: matrix products in FLOP/s of a process, and where the figure comes from.
    """

    text: str
    nodes: int
    gpus: int
    gib: float
    cpu: bool
    rate: float
    rate_source: str

    @property
    def processes(self) -> int:
        """Processes that train, one per GPU."""
        return self.nodes * self.gpus

    @classmethod
    def parse(cls, text: str, tflops: float | None, precision: str) -> "Hardware":
        """The hardware of `--plan`.

        Raises:
            UserError: another form, or a number that is 0.
        """
        match = HARDWARE.fullmatch(text.strip())
        if not match:
            raise UserError(f"--plan {text}: give GPUs and memory of each, e.g. 1x24GB, 8x80GB, 2x8x80GB (nodes first),"
                            " or cpu:24GB")  # fmt: skip
        nodes, gpus, gib = int(match["nodes"] or 1), int(match["gpus"] or 1), float(match["gib"])
        if not (nodes and gpus and gib):
            raise UserError(f"--plan {text}: numbers must be above 0")
        if tflops is not None and not tflops > 0:
            raise UserError(f"--plan_tflops {tflops}: must be above 0")
        cpu = match["cpu"] is not None
        if tflops is not None:
            return cls(text, nodes, gpus, gib, cpu, tflops * 1e12, "--plan_tflops")
        if cpu:
            dtype = "float32" if precision == "fp32" else "bfloat16"
            return cls(text, 1, 1, gib, True, matmul_rate(dtype, "cpu"), f"{dtype} on this machine, measured now")
        name, sheet = next((name, rate) for limit, name, rate in CARDS if gib <= limit)
        source = f"{RATE_SHARE:.0%} of {sheet} TFLOP/s, the data sheet's figure for {name}"
        return cls(text, nodes, gpus, gib, False, RATE_SHARE * sheet * 1e12, source)


@dataclass
class Rows:
    """What is trained on.

    Attributes:
        count: rows of the train split.
        mean: tokens of a row that a forward computes.
        largest: tokens of the largest row's parts (`RunConfig.largest_row`); longest: of the longest sequence.
        source: where the figures come from, as a sentence.
    """

    count: int
    mean: float
    largest: tuple[int, ...]
    longest: int
    source: str


@dataclass
class Option:
    """A way to run: the command's own settings with some flags changed.

    Attributes:
        name: what differs from the command.
        flags: {flag: value}. shards: how training is divided, None for one process.
        memory: of one process, in bytes; None before it is computed.
        process: bytes of a process without a model. checkpoint: bytes of a checkpoint on the disk.
        tokens_per_second, hours: over all processes.
    """

    name: str
    flags: dict = field(default_factory=dict)
    shards: Shards | None = None
    checkpointing: bool = False
    memory: Memory | None = None
    process: float = 0.0
    checkpoint: float = 0.0
    tokens_per_second: float = 0.0
    hours: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of one process at the peak, its CUDA context or libraries included."""
        return self.memory.total + self.process


class Planner:
    """Plans one run.

    Args:
        data_args, config, model_args: the run's arguments, with `config.plan`.
        rows: what is trained on (default: read from the data).
    """

    def __init__(self, data_args, config, model_args, rows: Rows | None = None):
        self.data_args, self.config, self.model_args = data_args, config, model_args
        self.pairs = isinstance(data_args, PairFilters)
        if config.precision_is_open and not config.plan.lower().startswith("cpu"):
            # The default on a GPU, which this machine may not have.
            config.bf16 = True
        self.hardware = Hardware.parse(config.plan, config.plan_tflops, config.precision)
        self.model_config = read_config(model_args, config.trust_remote_code)
        if model_args.use_peft:
            check_targets(skeleton(self.model_config, "float32", None), model_args)
        fit_global_batch(config, self.hardware.processes)
        self.rows = rows or read_rows(data_args, config, model_args)

    def options(self) -> Iterator[Option]:
        """Ways to run, the cheapest first."""
        config, model_args = self.config, self.model_args
        free = self._free_changes()
        own_checkpointing = bool(config.gradient_checkpointing)
        bases = [("as the command", {}, self._copies())]
        if free:
            bases.append((f"{flags_text(free)}", free, self._copies()))
        for checkpointing in [True] if own_checkpointing else [False, True]:
            for name, flags, shards in bases:
                yield from self._batches(name, flags, shards, checkpointing, own_checkpointing)
        best = {**free}
        if not self.hardware.cpu and not model_args.load_in_4bit:
            for kind, offload in (("fsdp2", False), ("zero3", False), ("zero3", True)):
                if self.hardware.processes == 1 and not offload:
                    continue
                shards = Shards(kind, self.hardware.processes, offload)
                name = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}[kind] + (" with offload" if offload else "")
                for checkpointing in [True] if own_checkpointing else [False, True]:
                    yield from self._batches(name, best, shards, checkpointing, own_checkpointing)
        if model_args.load_in_4bit or self.hardware.cpu:
            return
        quantised = {"load_in_4bit": "true", **({"use_peft": "true"} if not model_args.use_peft else {})}
        quantised |= {"dtype": "bfloat16"} if model_args.dtype == "float32" else {}
        name = "QLoRA (the base in 4 bits)" + ("" if model_args.use_peft else ": trains an adapter instead")
        for checkpointing in [True] if own_checkpointing else [False, True]:
            yield from self._batches(name, quantised, self._copies(), checkpointing, own_checkpointing)

    def _copies(self) -> Shards | None:
        return Shards("ddp", self.hardware.processes) if self.hardware.processes > 1 else None

    def _free_changes(self) -> dict:
        """Flags that save memory and cost neither time nor the result's meaning."""
        config, model_args = self.config, self.model_args
        changes = {}
        if model_args.use_peft and config.precision != "fp32" and model_args.dtype == "float32":
            # Products run in 16 bits anyway, so a frozen base loses nothing but the rounding of its stored weights.
            changes["dtype"] = config.dtype_name
        if config.keeps_reference_model(model_args.use_peft):
            changes["precompute_ref_log_probs"] = "true"
        return changes

    def _batches(self, name, flags: dict, shards, checkpointing: bool, own: bool) -> Iterator[Option]:
        """The option with the configured batch, then with smaller batches of the same global size."""
        changed = {**flags, **({"gradient_checkpointing": "true"} if checkpointing and not own else {})}
        named = name + (", checkpointing" if checkpointing and not own else "")
        batch, accumulation = self.config.per_device_train_batch_size, self.config.gradient_accumulation_steps
        sizes = [batch // 2**k for k in range(batch.bit_length()) if batch % 2**k == 0]
        for size in dict.fromkeys([*sizes, 1]):
            smaller = {}
            if size != batch:
                smaller = {
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": accumulation * batch // size,
                }
                if self.config.global_batch_size:
                    smaller.pop("gradient_accumulation_steps")
                if getattr(self.config, "micro_batch_tokens", None):
                    smaller["micro_batch_tokens"] = max(1, self.config.micro_batch_tokens * size // batch)
            text = f"{named}, batch {size}" if smaller else named
            yield Option(text, changed | smaller, shards, checkpointing)

    def evaluate(self, option: Option) -> Option:
        """Compute memory and time of an option."""
        config, model_args = copy(self.config), copy(self.model_args)
        for flag, value in option.flags.items():
            holder = model_args if hasattr(model_args, flag) else config
            setattr(holder, flag, {"true": True, "false": False}.get(value, value))
        batch = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        config.gradient_accumulation_steps = max(1, batch // config.per_device_train_batch_size)
        weights = Weights.of(self.model_config, config, model_args)
        cuda, largest, longest = not self.hardware.cpu, self.rows.largest, self.rows.longest
        if (
            hasattr(config, "choose_micro_batch_tokens")
            and cuda
            and option.flags.keys().isdisjoint({"per_device_train_batch_size"})
        ):
            config.gradient_checkpointing = option.checkpointing
            config.choose_micro_batch_tokens(weights, largest, longest, self.hardware.gib * GIB, option.shards)
        memory = config.memory(
            weights, largest, longest, checkpointing=option.checkpointing, cuda=cuda, shards=option.shards
        )
        counts = counts_of(weights)
        return replace(
            option,
            memory=memory,
            process=PROCESS["cpu" if self.hardware.cpu else "gpu"],
            checkpoint=(counts.adapter_bytes if weights.lora else counts.base_bytes) + optimizer_bytes(counts, config),
            **self._time(config, counts, bool(weights.lora), option),
        )

    @property
    def mfu(self) -> float:
        """The measured share of the rate of matrix products."""
        return CPU_MFU[self.config.precision] if self.hardware.cpu else GPU_MFU

    def _time(self, config, counts, lora: bool, option: Option) -> dict:
        """Tokens per second and hours, from the measured share of the rate of matrix products."""
        hardware = self.hardware
        plan = plan_training(config, self.rows.count, hardware.processes)
        rate = self.mfu * hardware.rate * hardware.processes
        # Without LoRA the gradients of the weights are products too.
        operations = STEP_OPERATIONS + (0 if lora else 2) + 2 * option.checkpointing
        sharded = option.shards is not None and option.shards.parameters
        uses_reference = self.pairs and not getattr(config, "reference_free", False)
        in_step = uses_reference and (config.reference_in_step() or sharded)
        speed = rate / counts.total / (operations + REFERENCE_OPERATIONS * in_step)
        seconds = plan["rows_seen"] * self.rows.mean / speed
        if uses_reference and not in_step:
            # Once, for every pair that the run reaches.
            reached = min(plan["rows_seen"], self.rows.count) * self.rows.mean
            seconds += REFERENCE_OPERATIONS * counts.total * reached / rate
        return {"tokens_per_second": speed, "hours": seconds / 3600}

    def choose(self, keep_method: bool = False) -> tuple[Option | None, list[Option]]:
        """(the first option that fits or None, all options that were tried).

        Args:
            keep_method: whether to leave out options that train an adapter where all weights were to be trained.
        """
        tried: list[Option] = []
        for option in self.options():
            if keep_method and "use_peft" in option.flags:
                continue
            tried.append(self.evaluate(option))
            if self.fits(tried[-1]):
                return tried[-1], tried
        return None, tried

    def fits(self, option: Option) -> bool:
        """Whether an option leaves a tenth of the memory free."""
        return option.total <= USABLE_SHARE * self.hardware.gib * GIB


def flags_text(flags: dict) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{flag} {value}" for flag, value in flags.items())


def read_config(model_args, trust_remote_code: bool):
    """transformers' config of the model; no weights are read.

    Raises:
        UserError: no such model, or not a causal LM.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        config = AutoConfig.from_pretrained(
            locate(name, revision), revision=revision, trust_remote_code=trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise load_error(f"config of {name}", error) from error
    if model_args.attn_implementation:
        config._attn_implementation = model_args.attn_implementation
    return config


def read_rows(data_args, config, model_args) -> Rows:
    """The rows of the train split: all are read, some of them tokenised; stated figures where they cannot be read."""
    try:
        return _sampled_rows(data_args, config, model_args)
    except UserError as error:
        longest = config.max_length or 1024
        reason = first_line(error)
    unit = "pairs" if isinstance(data_args, PairFilters) else "conversations"
    mean = min(UNREAD_TOKENS[unit], longest)
    largest = (
        (longest, longest)
        if unit == "conversations"
        else (longest // 3, longest - longest // 3, longest - longest // 3)
    )
    return Rows(
        UNREAD_ROWS, mean, largest, longest,
        f"the rows were not read ({reason}): {UNREAD_ROWS:,} {unit} of {mean} tokens are assumed, the largest of"
        f" {longest:,} tokens per sequence",
    )  # fmt: skip


def _sampled_rows(data_args, config, model_args) -> Rows:
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, model_args.model_revision,
        getattr(data_args, "chat_template_path", None) or getattr(config, "chat_template_path", None),
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    prompt_format = PromptFormat.of(data_args.prompt_format, tokenizer)
    sources, _ = data_args.sources()
    if isinstance(data_args, PairFilters):
        filters = data_args.drop_ties, data_args.min_score_margin, data_args.keep_duplicate_prompts
        if config.uses_thumbs:
            data = thumbs.load_thumbs(sources, prompt_format, data_args.limit)
        else:
            data = preferences.load_pairs(sources, *filters, prompt_format, data_args.limit)
        count, data.pairs = len(data.pairs), _spread(data.pairs)
        # A reward model's pairs are left out where they are too long, and not cut.
        cut = hasattr(config, "max_prompt_length")
        lengths = (config.max_length, config.max_prompt_length) if cut else (None, None)
        if config.uses_thumbs:
            ids, _ = thumbs.tokenize(data, tokenizer, *lengths, desc="train")
        else:
            ids, _ = preferences.tokenize(data, tokenizer, *lengths, desc="train", lists=config.uses_lists)
            ids = ids if cut else preferences.drop_longer(data, ids, config.max_length, "train")
        mean = float(tokens_of_rows(ids, shared_prompt=True).mean())
        answers = [
            name for name in ("chosen_ids", "rejected_ids", "others_ids", "completion_ids") if name in ids.column_names
        ]
        longest = largest_and_longest(ids, tuple(("prompt_ids", name) for name in answers))[1]
    else:
        data = conversations.load_conversations(sources, data_args.limit, prompt_format)
        count, data.conversations = len(data.conversations), _spread(data.conversations)
        ids, _ = conversations.tokenize(data, tokenizer, data_args.loss_on, config.max_length, desc="train")
        longest = config.largest_row(ids)[0]
        mean = sum(map(len, ids["input_ids"])) / len(ids)
    sampled = "all" if len(ids) == count else f"{len(ids):,}"
    unit = "pairs" if isinstance(data_args, PairFilters) else "conversations"
    return Rows(
        count, mean, config.largest_row(ids), longest,
        f"{count:,} {unit}, {mean:.0f} tokens on average and {longest:,} in the longest sequence of {sampled} of them",
    )  # fmt: skip


def _spread(items: list) -> list:
    """At most SAMPLED_ROWS items, evenly spread."""
    step = max(1, math.ceil(len(items) / SAMPLED_ROWS))
    return items[::step]


def publish_plan(stage: Stage, data_args, config, model_args, run_name: str) -> None:
    """Print the plan and write <eval_out>/<run_name>_plan.json, beside the folders of runs.

    Raises:
        UserError: hardware, model or flags that cannot be planned.
    """
    planner = Planner(data_args, config, model_args)
    chosen, tried = planner.choose()
    facts = {
        "hardware": asdict(planner.hardware),
        "rows": asdict(planner.rows),
        "options": [
            {"name": o.name, "flags": o.flags, "shards": o.shards and asdict(o.shards), "fits": planner.fits(o),
             "bytes": {**asdict(o.memory), "process": o.process, "total": o.total},
             "tokens_per_second": o.tokens_per_second, "hours": o.hours}
            for o in tried
        ],
        "fits": chosen is not None,
        "flags": chosen.flags if chosen else None,
        "command": command_with(chosen, planner.hardware) if chosen else None,
    }  # fmt: skip
    # A new checkpoint is complete before the oldest is deleted.
    facts["disk"] = {"checkpoint_bytes": tried[-1].checkpoint, "checkpoints": (config.save_total_limit or 0) + 1}
    shown = chosen or min(tried, key=lambda o: o.total)
    counts = counts_of(Weights.of(planner.model_config, config, model_args))
    facts["parameters"] = {"total": counts.total, "trained": counts.trained}
    report = render(planner, tried, chosen, shown, facts, run_name)
    metrics = {
        "memory_gib": metric(shown.total / GIB),
        "tokens_per_second": metric(shown.tokens_per_second),
        "hours": metric(shown.hours),
    }
    model = {"name": model_args.model_name_or_path, "architecture": planner.model_config.model_type}
    Stage("plan", stage.arguments, stage.started).publish(
        check_writable(config.eval_out, "--eval_out") / f"{run_name}_plan.json", model, metrics, report,
        run={"run_name": run_name, "limit": data_args.limit}, seed=config.seed, plan=facts,
    )  # fmt: skip
