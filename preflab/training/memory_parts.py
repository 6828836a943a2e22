"""What the memory of training is computed from, and what it consists of."""

from dataclasses import dataclass

# Bytes per weight of bitsandbytes: 4 or 8 bits, and a float32 scale per block of 64 (nested: 8 bits per block, with a
# float32 per 256 of them; Dettmers et al. 2023, arXiv 2305.14314, section 3). LLM.int8 has one scale per row.
QUANTISED_BYTES = {(4, False): 0.5 + 4 / 64, (4, True): 0.5 + 1 / 64 + 4 / (64 * 256), (8, False): 1.0, (8, True): 1.0}


@dataclass(frozen=True)
class Batch:
    """What one forward computes.

    Attributes:
        pairs: (prompt, *answers) tokens of pairs or lists in one packed row; () for padded sequences.
        rows: padded sequences; 0 for packed pairs.
        length: tokens of a padded sequence, and of the longest sequence of packed pairs.
        scored: positions whose log-probability is computed.
    """

    pairs: tuple[tuple[int, ...], ...] = ()
    rows: int = 0
    length: int = 0
    scored: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the layers compute."""
        return sum(map(sum, self.pairs)) or self.rows * self.length


def packed_rows(row: tuple[int, ...], budget: int, most: int) -> Batch:
    """As many copies of a pair or list as `budget` tokens hold, and at most `most`; at least one.

    The last one is shortened, since smaller rows would fill the budget.

    Args:
        row: tokens of the prompt and of each answer.
    """
    tokens = max(sum(row), min(budget, most * sum(row)))
    count, rest = divmod(tokens, sum(row))
    rows = [row] * count
    if rest:
        answers = [answer * rest // sum(row) for answer in row[1:]]
        rows.append((rest - sum(answers), *answers))
    return Batch(tuple(rows), 0, row[0] + max(row[1:]), sum(sum(answers) for _, *answers in rows))


@dataclass(frozen=True)
class Weights:
    """How a run stores and trains its weights.

    Attributes:
        config: the model's config of transformers.
        dtype: as loaded, torch's name.
        lora: PEFT's config of the trained adapter, None where every weight is trained.
        bits: 4 or 8 for a quantised base, else None.
        nested: whether the scales of the quantised base are quantised too.
        reference_beside: whether a second copy of the weights is loaded.
    """

    config: object
    dtype: str
    lora: object | None
    bits: int | None = None
    nested: bool = False
    reference_beside: bool = False

    @classmethod
    def of(cls, model_config, args, model_args) -> "Weights":
        """The weights of a run.

        Args:
            args: a RunConfig. model_args: TRL's ModelConfig.
        """
        from trl import get_peft_config

        lora = get_peft_config(model_args)
        if lora is not None and getattr(args, "disable_dropout", False):
            lora.lora_dropout = 0.0
        dtype = str(model_config.dtype or "float32") if model_args.dtype == "auto" else model_args.dtype
        return cls(
            model_config,
            dtype.removeprefix("torch."),
            lora,
            4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
            model_args.use_bnb_nested_quant,
            args.keeps_reference_model(model_args.use_peft),
        )


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, as numbers and bytes.

    Attributes:
        total, trained: numbers of all and of the trained parameters, the adapter's included.
        base_bytes: bytes of the base's weights and buffers.
        trained_bytes: bytes of the trained weights.
        adapter_bytes: bytes of the weights beside the base.
        largest_layer: the largest number of parameters of a decoder layer.
        outside_layers: parameters outside the decoder layers (embedding, output layer).
        largest_linear: the largest number of weights of a linear layer that can be quantised.
    """

    total: int
    trained: int
    base_bytes: float
    trained_bytes: float
    adapter_bytes: float
    largest_layer: int
    outside_layers: int
    largest_linear: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a training step.

    Attributes:
        weights: the base's weights and the adapter's.
        reference: the copy of the weights beside the policy.
        gradients: of the trained weights.
        buckets: copies of the gradients that DDP sends.
        optimizer: the optimizer's state.
        gathered: sharded layers while they are computed.
        activations: the most that forward and backward add.
        after_layers: the most that the end of the backward adds, when the activations are freed.
        accumulates: whether gradients exist during the forward.
        exact: whether the activations are those of the model's own code, instead of an order of magnitude.
        host: what offload moves to the host's memory.
        holes: on a CPU, free pieces between the activations in the heap, too small for what is allocated next.
        kernels: on a CPU, the code that its library compiles for products in 16 bits and keeps.
    """

    weights: float
    reference: float
    gradients: float
    buckets: float
    optimizer: float
    gathered: float
    activations: float
    after_layers: float
    accumulates: bool
    exact: bool = True
    host: float = 0.0
    holes: float = 0.0
    kernels: float = 0.0

    @property
    def total(self) -> float:
        """The peak."""
        resident = self.weights + self.reference + self.buckets + self.optimizer + self.gathered + self.kernels
        # Gradients grow as activations are freed, so the peak is where the backward begins or where it ends.
        begin = self.activations + (self.gradients if self.accumulates else 0)
        # The heap does not shrink when it is emptied.
        return resident + self.holes + max(begin, self.gradients + self.after_layers)
