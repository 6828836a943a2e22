"""Memory of a training step's forward and backward, from running the model's own code on tensors without data.

The model is built from its config alone, with a few of its layers, and trained on torch's fake tensors: they have shape
and dtype but no memory, on a machine of any size. A dispatch mode adds up what is alive at every operation, so that
attention, norms, LoRA, autocast's casts and checkpointing count as they are written, for every architecture. The layers
are alike, so the peak of all of them follows from the peaks of few.

Three parts are written down instead of run, since they branch on data or need a GPU: the output layer (fused_head),
FlexAttention, and the dequantised weight of a quantised layer (`preflab.training.memory`).
"""

import copy
import logging
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations import deepspeed
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from preflab.models.fast import fused_head, fused_lora, fused_norm, shared_prompt
from preflab.models.logprobs import without_adapter_shell
from preflab.training.memory_parts import QUANTISED_BYTES, Batch, Counts, Weights
from utils.machine import HEAP_LIMIT

# Layers that are run. The first is unlike the others where the embedding is frozen: no gradient leaves it.
FEW, MORE = 2, 3
# The name of `_fused_attention` in transformers' registry.
TRACED = "traced_flex_attention"
# Tile of TRL's output layer on a GPU (trl.kernels): positions, vocabulary entries.
GPU_TILE = (4096, 32768)
# For products in these precisions a CPU's library compiles a kernel per shape.
HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


@dataclass(frozen=True)
class Step:
    """How a step is computed.

    Attributes:
        dtype: of the weights as loaded, torch's name.
        autocast: whether matrix products run in 16 bits.
        lora: LoRA of the trained adapter, None where every weight is trained.
        checkpointing: whether activations are computed twice.
        reference: whether a forward of the reference follows the policy's in every step.
        cuda: whether training runs on a GPU, with TRL's output layer and FlexAttention.
        fused_lora: whether LoRA is added in place.
    """

    dtype: str
    autocast: bool
    lora: LoraConfig | None
    checkpointing: bool = False
    reference: bool = False
    cuda: bool = False
    fused_lora: bool = True


@dataclass
class Traced:
    """Bytes beside weights, gradients of weights and optimizer state.

    Attributes:
        peak: the highest during forward and backward.
        last: the highest once the gradient has passed all layers, the embedding's own gradient included.
        exact: whether the model's own code was run.
        heap: of `peak`, what is in tensors that a C library's heap holds (`HEAP_LIMIT`).
        products: different shapes of matrix products in 16 bits.
        embedding: of `last`, what becomes the gradient of the embedding; 0 where it is frozen.
    """

    peak: float
    last: float
    exact: bool = True
    heap: float = 0.0
    products: int = 0
    embedding: float = 0.0


class Live(TorchDispatchMode):
    """Adds up the bytes of all storages that operations have made and that are still alive; notes products in 16 bits.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes = weakref.WeakKeyDictionary({tensor.untyped_storage(): 0 for tensor in known})
        self.now = self.peak = 0
        # Of both what is in tensors below HEAP_LIMIT.
        self.heap = self.heap_at_peak = 0
        self.products: set[tuple] = set()

    def _freed(self, size: int) -> None:
        self.now -= size
        self.heap -= size * (size < HEAP_LIMIT)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            factors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
            if factors[-1].dtype in HALF:
                # Strides: a transposed factor takes another kernel.
                self.products.add((function, *((tensor.shape, tensor.stride()) for tensor in factors)))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage) -> None:
        # Views share their storage, which counts once.
        if storage not in self.sizes:
            size = storage.nbytes()
            self.sizes[storage] = size
            self.now += size
            self.heap += size * (size < HEAP_LIMIT)
            if self.now > self.peak:
                self.peak, self.heap_at_peak = self.now, self.heap
            weakref.finalize(storage, self._freed, size)


class OutputLayer(torch.autograd.Function):
    """The tensors of the output layer: those of fused_head.TargetLogps on a CPU, of TRL's kernel on a GPU.

    Shapes: hidden (positions, width), weight (vocabulary, width); returns (positions,).
    """

    @staticmethod
    def forward(ctx, hidden, weight, dtype, cuda):
        frozen = not cuda and not ctx.needs_input_grad[1]
        slope = torch.zeros(hidden.shape, dtype=torch.float32) if frozen and ctx.needs_input_grad[0] else None
        # Alive together with the activations of all layers until this function returns.
        workspace = _tiles(hidden, weight, dtype, cuda, passes=2)
        ctx.save_for_backward(slope) if slope is not None else ctx.save_for_backward(hidden, weight)
        ctx.frozen, ctx.hidden_dtype, ctx.dtype, ctx.cuda = slope is not None, hidden.dtype, dtype, cuda
        result = torch.empty(len(hidden), dtype=torch.float32)
        del workspace
        return result

    @staticmethod
    def backward(ctx, grad):
        if ctx.frozen:
            return (grad[:, None] * ctx.saved_tensors[0]).to(ctx.hidden_dtype), None, None, None
        hidden, weight = ctx.saved_tensors
        to_hidden = torch.empty(hidden.shape, dtype=torch.float32)
        to_weight = torch.empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        workspace = _tiles(hidden, weight, ctx.dtype, ctx.cuda, passes=1)
        to_weight = None if to_weight is None else to_weight.to(weight.dtype)
        del workspace
        return to_hidden.to(ctx.hidden_dtype), to_weight, None, None


class FusedAttention(torch.autograd.Function):
    """The tensors of FlexAttention, in which packed pairs are computed on a GPU. Shapes: (1, heads, tokens, dim)."""

    @staticmethod
    def forward(ctx, query, key, value):
        output, normaliser = torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused_attention(module, query, key, value, *_, **__):
    """transformers' attention interface."""
    return FusedAttention.apply(query, key, value).transpose(1, 2), None


def _tiles(hidden, weight, dtype, cuda: bool, passes: int) -> list:
    """The buffers of one tile of logits. `passes`: buffers of a tile's size."""
    positions, vocabulary = GPU_TILE if cuda else (fused_head.TOKENS, fused_head.VOCABULARY)
    inputs, rows = hidden[:positions].to(dtype), weight[:vocabulary].to(dtype)
    if cuda:
        return [inputs, rows, torch.empty(len(inputs), len(rows), dtype=dtype)]
    buffers = [torch.empty(len(inputs), len(rows), dtype=torch.float32) for _ in range(passes)]
    return [inputs, rows, inputs.float(), rows.float(), *buffers]


def traced(config, step: Step, batch: Batch) -> Traced:
    """The memory of one forward and backward through all layers of a model.

    Args:
        config: the model's config of transformers.
    """
    layers = config.get_text_config().num_hidden_layers
    try:
        return _traced(config, step, batch, layers)
    # Code of other people's models: whatever cannot run without data (routers of experts, mostly) raises anything.
    except Exception:
        return _written_down(config, step, batch, layers)


def _written_down(config, step: Step, batch: Batch, layers: int) -> Traced:
    """An order of magnitude, where the model cannot be run without data.

    Per layer and token about 16 values of the model's width and 6 of its feed-forward's (after Korthikanti et al. 2022,
    arXiv 2205.05198, whose 34 values of the width assume a feed-forward of 4 widths and no gate). With checkpointing
    one value of the width per layer, and one layer's values.
    """
    text = config.get_text_config()
    # GPT-2's config, for example, has no intermediate_size; its feed-forward has 4 widths.
    feed_forward = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    of_layer = 16 * text.hidden_size + 6 * feed_forward
    values = layers * text.hidden_size + of_layer if step.checkpointing else layers * of_layer
    return Traced(batch.tokens * values * (2 if step.autocast or step.dtype != "float32" else 4), 0.0, exact=False)


def _traced(config, step: Step, batch: Batch, layers: int) -> Traced:
    key = (_identity(config), repr(step), batch)
    if layers <= MORE:
        return _trace(config, step, batch, layers, key)
    few, more = (_trace(config, step, batch, count, key) for count in (FEW, MORE))

    def all_layers(a: float, b: float) -> float:
        return a + (b - a) * (layers - FEW) / (MORE - FEW)

    heap = all_layers(few.heap, more.heap)
    last = all_layers(few.last, more.last)
    return Traced(all_layers(few.peak, more.peak), last, True, heap, more.products, more.embedding)


def _identity(config) -> tuple[str, str]:
    """A config as part of a cache's key: trainers change its `use_cache` and attention, which changes no figure here.

    As text, since configs and LoraConfigs are not hashable.
    """
    return repr({**config.to_dict(), "use_cache": None}), _attention_of(config)


def _attention_of(config) -> str:
    """The attention that a skeleton of this config has; "" for transformers' default."""
    attention = (config._attn_implementation or "").removeprefix("packed_")
    # Flash attention, which may not be installed here, keeps the tensors that torch's own attention keeps.
    return attention if attention in ("", "eager", "sdpa") else "sdpa"


_results: dict = {}


def _trace(config, step: Step, batch: Batch, layers: int, key: tuple) -> Traced:
    """`traced` with the first `layers` layers only; cached by `key`."""
    if (key, layers) not in _results:
        # What cannot run without data is logged with its traceback; `traced` has an answer for it.
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _results[key, layers] = _run(config, step, batch, layers)
        finally:
            logger.setLevel(level)
    return _results[key, layers]


def _run(config, step: Step, batch: Batch, layers: int) -> Traced:
    model = skeleton(config, step.dtype, step.lora, layers)
    if step.lora and step.fused_lora:
        fused_lora.attach(model)
    if step.fused_lora and not step.cuda:
        fused_norm.attach(model)
    if batch.pairs:
        shared_prompt.attach(model)
        if step.cuda:
            # Under another name than that of real models, which may be trained in this process.
            AttentionInterface.register(TRACED, _fused_attention)
            AttentionMaskInterface.register(TRACED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
            without_adapter_shell(model).base_model.config._attn_implementation = TRACED
    model.train()
    if step.checkpointing:
        without_adapter_shell(model).gradient_checkpointing_enable({"use_reentrant": False})
        if step.lora:
            # Checkpoints need an input that requires a gradient, which a frozen embedding does not give.
            model.enable_input_require_grads()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        embedded: list[tuple[float, float]] = []
        live = Live([*model.parameters(), *model.buffers()])

        def passed(gradient):
            # The gradient has passed all layers: from here a new peak counts.
            embedded.append((live.peak, live.heap_at_peak))
            live.peak, live.heap_at_peak = live.now, live.heap

        for parameter in model.parameters():
            if parameter.requires_grad:
                # Gradients of weights are counted by `memory.needed`, which knows how long they live.
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def watch(module, inputs, output):
            # Without a result: a hook's result would replace the output.
            if output.requires_grad:
                output.register_hook(passed)

        model.get_input_embeddings().register_forward_hook(watch)
        inputs = _inputs(batch)
        with live:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.autocast):
                loss = _scores(model, inputs, batch, step)
                if step.reference:
                    with torch.no_grad():
                        _scores(model, inputs, batch, step)
            loss.backward()
    # With a frozen embedding no gradient reaches it: the last layer that is passed ends the backward.
    if not embedded:
        return Traced(live.peak, 0.0, True, live.heap_at_peak, len(live.products))
    weight = model.get_input_embeddings().weight
    own = weight.nbytes if weight.requires_grad else 0
    return Traced(embedded[0][0], live.peak, True, embedded[0][1], len(live.products), own)


def skeleton(config, dtype: str, lora: LoraConfig | None, layers: int | None = None):
    """The model with its adapter on torch's device `meta`: every shape, no memory.

    Args:
        layers: of its layers only the first so many.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    if layers is not None and layers != count:
        for name, value in vars(text).items():
            # Lists with one entry per layer, such as layer_types.
            if isinstance(value, list) and len(value) == count:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    attention = _attention_of(config)
    if attention:
        config._attn_implementation = attention
    with _without_zero3():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        return get_peft_model(model, copy.deepcopy(lora)) if lora else model


@contextmanager
def _without_zero3():
    """Make models as without DeepSpeed: under ZeRO-3 transformers shards them and initialises tensors on `meta`."""
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def _make_fake(model) -> None:
    """Put fake CPU tensors in the place of parameters and buffers on `meta`. Tied weights stay tied."""
    # The originals stay alive here, so that no id is used twice.
    fake: dict[int, tuple] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fake:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    new = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    fake[id(tensor)] = tensor, new
                tensors[name] = fake[id(tensor)][1]


def _inputs(batch: Batch) -> dict:
    """The arguments of the backbone's forward."""
    if not batch.pairs:
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        # As transformers makes it from a padded batch: shape (rows, 1, queries, keys).
        mask = torch.ones(batch.rows, 1, batch.length, batch.length, dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": mask}
    ids = torch.zeros(1, batch.tokens, dtype=torch.long)
    return {
        "packed_ids": ids,
        "packed_positions": torch.zeros_like(ids),
        "packed_lengths": batch.pairs,
        "unpack": torch.zeros(sum(len(answers) for _, *answers in batch.pairs), batch.length, dtype=torch.long),
    }


def _scores(model, inputs: dict, batch: Batch, step: Step):
    """The sum of the scored positions' log-probabilities, with the tensors of TRL's forward."""
    shell = without_adapter_shell(model)
    hidden = shell.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    # Shapes (rows, length - 1, width) -> (scored, width), as by TRL's mask, whose size depends on data.
    places = torch.zeros(batch.scored, dtype=torch.long)
    dtype = torch.bfloat16 if step.autocast else hidden.dtype
    weight = shell.get_output_embeddings().weight
    return OutputLayer.apply(hidden[places, places], weight, dtype, step.cuda).sum()


_counts: dict = {}


def counts_of(weights: Weights) -> Counts:
    """Parameters and bytes of a run's model, from its config; cached."""
    # Not repr(weights), which names the config as it is now.
    parts = {field.name: getattr(weights, field.name) for field in fields(weights) if field.name != "config"}
    key = (_identity(weights.config), repr(parts))
    if key not in _counts:
        _counts[key] = _count(weights)
    return _counts[key]


def _count(weights: Weights) -> Counts:
    base = skeleton(weights.config, weights.dtype, None)
    head = base.get_output_embeddings()
    linear = [m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    base_bytes = _bytes([*base.parameters(), *base.buffers()])
    if weights.bits:
        size = getattr(torch, weights.dtype).itemsize
        base_bytes += sum(linear) * (QUANTISED_BYTES[weights.bits, weights.nested] - size)
    layers = max((m for m in base.modules() if isinstance(m, torch.nn.ModuleList)), key=len, default=())
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    total = sum(p.numel() for p in base.parameters())
    trained, adapter = list(base.parameters()), 0
    if weights.lora:
        model = skeleton(weights.config, weights.dtype, weights.lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        if weights.bits:
            # ResumableMixin.set_up trains them in float32.
            trained = [p.float() for p in trained]
        adapter = sum(p.numel() for p in trained)
    return Counts(
        total=total + adapter,
        trained=sum(p.numel() for p in trained),
        base_bytes=base_bytes,
        trained_bytes=_bytes(trained),
        adapter_bytes=_bytes(trained) if weights.lora else 0,
        largest_layer=max(sizes, default=0),
        outside_layers=total - sum(sizes),
        largest_linear=max(linear, default=0),
    )


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
