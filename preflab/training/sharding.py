"""What each process keeps when training is divided over several: copies (DDP), DeepSpeed ZeRO, FSDP2, offload."""

from dataclasses import dataclass, replace

from preflab.training.memory_parts import Counts, Memory, Weights

# DeepSpeed's defaults: elements of the bucket in which ZeRO-2 reduces gradients, and parameters that ZeRO-3 keeps
# gathered (reduce_bucket_size, stage3_max_live_parameters).
ZERO2_BUCKET, ZERO3_LIVE = 5e8, 1e9
# FSDP2 gathers the next layer while one is computed.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Shards:
    """How training is divided.

    Attributes:
        kind: ddp, zero2, zero3 or fsdp2.
        processes: of all machines.
        offload: whether optimizer state, and with zero3 and fsdp2 the weights, are in the host's memory.
    """

    kind: str
    processes: int
    offload: bool = False

    @classmethod
    def of_run(cls, args) -> "Shards | None":
        """How the training of this launch is divided; None for one process.

        Args:
            args: a RunConfig. Accelerate's own state knows of FSDP only once the trainer is made, which is too late for
                the choice of gradient checkpointing.
        """
        from accelerate.utils import parse_flag_from_env

        if args.world_size == 1:
            return None
        plugin = args.deepspeed_plugin
        if plugin is not None:
            device = getattr(plugin, "offload_optimizer_device", None)
            return cls(f"zero{min(plugin.zero_stage, 3)}", args.world_size, device not in (None, "none"))
        if args.sharding is not None:
            # The run's own --fsdp_config, or the launcher's.
            offload = (args.fsdp_plugin_args or {}).get("cpu_offload") or parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
            return cls("fsdp2", args.world_size, offload)
        return cls("ddp", args.world_size)

    @property
    def parameters(self) -> bool:
        """Whether weights are sharded."""
        return self.kind in ("zero3", "fsdp2")

    def of(self, memory: Memory, counts: Counts, weights: Weights, args) -> Memory:
        """One process's memory, from that of a run with one process.

        Args:
            args: a RunConfig.
        """
        half = args.precision != "fp32"
        if self.kind == "ddp":
            return replace(memory, buckets=memory.gradients)
        if self.kind in ("zero2", "zero3"):
            # DeepSpeed's engine holds 16-bit weights, and master weights in float32 beside Adam's moments
            # (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes).
            size, optimizer = (2, memory.optimizer + 4 * counts.trained) if half else (4, memory.optimizer)
            base = memory.weights if weights.bits else counts.total * size
            gradients, buckets = counts.trained * size, min(counts.trained, ZERO2_BUCKET) * size
        else:
            # accelerate casts trained weights to float32 under mixed precision.
            size = 2 if half else 4
            grown = 4 * counts.trained - memory.gradients if half else 0
            base, gradients = memory.weights + grown, memory.gradients + grown
            optimizer, buckets = memory.optimizer * (gradients / memory.gradients), 0.0
        n = self.processes
        gathered = 0.0
        if self.kind == "zero3":
            gathered, buckets = min(counts.total, ZERO3_LIVE) * size, 0.0
        elif self.kind == "fsdp2":
            # The root module holds embedding and output layer.
            gathered = (GATHERED_LAYERS * counts.largest_layer + counts.outside_layers) * size
        whole = 1 if not self.parameters else n
        resident = 0 if self.offload and self.parameters else 1
        moved = optimizer / n + (1 - resident) * ((base + memory.reference) / whole + gradients / n)
        return replace(
            memory,
            weights=resident * base / whole,
            reference=resident * memory.reference / whole,
            gradients=resident * gradients / n,
            buckets=buckets,
            optimizer=0 if self.offload else optimizer / n,
            gathered=gathered,
            host=moved if self.offload else 0.0,
        )
