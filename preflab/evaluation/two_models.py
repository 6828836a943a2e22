"""The two models of a comparison, loaded with one tokenizer."""

import gc
import sys
from contextlib import contextmanager, nullcontext

import torch
from accelerate import PartialState

from preflab.evaluation.arguments import ComparisonArguments
from preflab.evaluation.comparison import Comparison
from preflab.evaluation.servers import SERVER
from preflab.models.adapter_files import adapter_sha256
from preflab.models.fast import fused_lora, shared_prompt
from preflab.models.loading import (
    BUILTIN,
    adapter_errors,
    default_dtype,
    identify,
    load_model,
    load_tokenizer,
    quantization,
    tokenizer_home,
)
from preflab.models.logprobs import attach_head
from utils.errors import UserError, is_main_process

# PEFT's name of the LoRA adapter on the base model, if it has one.
BASE_ADAPTER = "base"


def _quantized(args: ComparisonArguments, trained: dict) -> dict | None:
    """The run's quantisation of the base, as keyword arguments of `models.loading.quantization`, or None."""
    # A --load_in_4bit that contradicts the run replaces its quantisation completely, 8 bits included.
    as_trained = args.load_in_4bit is None or args.load_in_4bit == bool(trained.get("load_in_4bit"))
    four = bool(trained.get("load_in_4bit")) if args.load_in_4bit is None else args.load_in_4bit
    eight = as_trained and bool(trained.get("load_in_8bit"))
    if not (four or eight):
        return None
    return {
        "load_in_4bit": four,
        "load_in_8bit": eight,
        "quant_type": trained.get("bnb_4bit_quant_type") or "nf4",
        "nested": bool(trained.get("use_bnb_nested_quant")),
        "storage": trained.get("bnb_4bit_quant_storage"),
    }


class TwoModels:
    """Base and tuned with one tokenizer: `with models.base() as model`, `with models.tuned() as model`.

    With an adapter there is one set of weights: the base is the tuned model with its adapter disabled.

    Attributes:
        tokenizer: makes the token ids that both models score.
        sides: base and tuned, or base alone.
        tokenizers: by side, for prompts that the models answer: a complete tuned model has its own chat template.

    Raises:
        UserError: the two models have different vocabularies, or a model cannot be read.
    """

    def __init__(self, comparison: Comparison):
        args, trained = comparison.args, comparison.trained
        self.comparison, self.sides = comparison, comparison.sides
        # A run that trained under autocast is evaluated under it, so that its own metrics are reproduced.
        own = trained.get("dtype") if trained.get("dtype") not in (None, "auto") else None
        compute = "bfloat16" if trained.get("bf16") else "float16" if trained.get("fp16") else None
        self.autocast = getattr(torch, compute) if compute and args.dtype is None else None
        self.dtype = args.dtype or own or ("float32" if trained else default_dtype())
        self.quantized = _quantized(args, trained)
        # The adapter's folder first, where it has a tokenizer: it brings the chat template of the training.
        # With two servers the tokenizer only counts tokens, so any one makes their answers' lengths comparable.
        base = BUILTIN if comparison.base.startswith(SERVER) else comparison.base
        revision = args.base_revision
        if "base" in comparison.servers:
            revision = args.tuned_revision if base == comparison.tuned else None
        home = tokenizer_home(base, revision, comparison.adapter)
        self.tokenizer = load_tokenizer(*home, args.chat_template_path, trust_remote_code=args.trust_remote_code)
        self.tokenizers = {side: self.tokenizer for side in self.sides}
        if comparison.tuned and not comparison.servers:
            self.tokenizers["tuned"] = self._tokenizer_of_tuned()
        self._base, self._tuned, self.shares_prompts = None, None, False

    def _tokenizer_of_tuned(self):
        """The tokenizer of a complete tuned model, whose template its users would prompt it with.

        Raises:
            UserError: the two models would read the same token ids as different text.
        """
        args = self.comparison.args
        tuned = load_tokenizer(
            self.comparison.tuned,
            args.tuned_revision,
            args.chat_template_path,
            trust_remote_code=args.trust_remote_code,
        )
        # One tokenizer makes the ids for both models, so every id must mean the same token in both.
        if tuned.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"{self.comparison.tuned} and {self.comparison.base} have different vocabularies: compare models that"
                " share a tokenizer"
            )
        if tuned.chat_template != self.tokenizer.chat_template and is_main_process():
            print(
                "note: the two models have different chat templates: each answers prompts under its own,"
                " and log-probabilities are those of one text, under the base's (--chat_template_path sets both)",
                file=sys.stderr,
            )
        return tuned

    def load(self) -> "TwoModels":
        """Load the weights once, in eval mode, with log-probability head, fused LoRA and shared prompts attached."""
        if self._base is None and self._tuned is None:
            args, c = self.comparison.args, self.comparison
            # Tuned first: with an adapter, the base is the same object. A side behind a server has no weights here.
            here = [side for side in self.sides if side not in c.servers]
            self._tuned = self.load_one(*c.weights("tuned")) if "tuned" in here else None
            if c.adapter:
                self._base = self._tuned
            elif "base" in here:
                self._base = self.load_one(*c.weights("base"))
            if c.base_adapter:
                # A second adapter on the shared weights (an SFT adapter that DPO started from, for example).
                with adapter_errors(self._base, c.base_adapter):
                    self._base.load_adapter(c.base_adapter, adapter_name=BASE_ADAPTER)
                self._base.eval()
            loaded = [model for model in (self._base, self._tuned) if model is not None]
            for model in loaded:
                attach_head(model)
                fused_lora.attach(model)
            # Both models must compute pairs packed, or neither: they score the same batches.
            attached = [args.shared_prompt and shared_prompt.attach_if_known(model) for model in loaded]
            self.shares_prompts = all(attached)
        return self

    def load_one(self, name: str, revision: str | None = None, adapter: str | None = None, quantized: bool = True):
        """Load one model in this comparison's precision, on this process's device, in eval mode."""
        args = self.comparison.args
        compute, config = self.autocast or getattr(torch, self.dtype), None
        if self.quantized and quantized:
            config = quantization(**self.quantized, compute_dtype=compute)
        model = load_model(
            name,
            revision,
            self.dtype,
            args.attn_implementation,
            config,
            adapter,
            trust_remote_code=args.trust_remote_code,
        )
        # bitsandbytes places a quantised model on its device while loading, and restricts moving it.
        return (model if config else model.to(self.device)).eval()

    def unload(self) -> None:
        """Free the models' memory, for example before a judge is loaded."""
        # The patched forward methods form reference cycles, which only a collection frees.
        self._base = self._tuned = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def is_float32(self) -> bool:
        """Whether every matrix product runs in float32."""
        return self.dtype == "float32" and self.autocast is None and not self.quantized

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return PartialState().device

    def autocasting(self):
        """A context with the run's autocast, disabled if it trained without."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @contextmanager
    def base(self):
        """The base model: the tuned one's adapter is disabled, or replaced by the base's own."""
        # Not at the top: it takes seconds (peft, bitsandbytes), which a call with bad input should not cost.
        from trl.trainer.utils import use_adapter

        # use_adapter(model, None) disables all adapters, which gives the plain base.
        own = BASE_ADAPTER if self.comparison.base_adapter else None
        with use_adapter(self._base, own) if self.comparison.adapter else nullcontext(), self.autocasting():
            yield self._base

    @contextmanager
    def tuned(self):
        """The tuned model."""
        with self.autocasting():
            yield self._tuned

    def side(self, name: str):
        """`base()` or `tuned()` by name."""
        return getattr(self, name)()

    def identity(self, side: str) -> dict:
        """What one side's results depend on, known before weights are loaded: names, hashes, precision, template."""
        if side in self.comparison.servers:
            # As far as it is known: the server may change its model unseen.
            return {"endpoint": self.comparison.names[side]}
        return self.identity_of(*self.comparison.weights(side), self.tokenizer)

    def answering_identity(self, side: str) -> dict:
        """What one side's answers depend on: as `identity`, with the template that the side is prompted under."""
        if side in self.comparison.servers:
            return self.identity(side)
        return self.identity_of(*self.comparison.weights(side), self.tokenizers[side])

    def identity_of(self, name: str, revision, adapter: str | None, tokenizer, quantized: bool = True) -> dict:
        """What the results of a model that `load_one` loads depend on. Part of cache keys, so its keys never change."""
        return {
            **identify(name, tokenizer, revision),
            "asked_revision": revision,
            "adapter_sha256": adapter_sha256(adapter) if adapter else None,
            "dtype": self.dtype,
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "quantized": self.quantized if quantized else None,
            "attn_implementation": self.comparison.args.attn_implementation,
        }

    def describe(self) -> dict:
        """The `model` section of an artifact."""
        names = self.comparison.names
        return {side: {**self.identity(side), "name": names[side]} for side in self.sides}
