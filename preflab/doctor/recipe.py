"""What a recipe needs before it starts: access to model and data on the hub, and room for what it writes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from preflab.doctor.checks import GIB, OK, PROBLEM, WARNING, Finding
from utils.config_file import read_config
from utils.errors import UserError, first_line
from utils.hub import why_no_access, why_unreachable

# Seconds to wait for the hub.
TIMEOUT = 15
# Adam keeps two moments in float32 for every trained parameter.
OPTIMIZER_BYTES = 8
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def read_recipe(path: str) -> dict:
    """The keys of a training recipe.

    Raises:
        UserError: the file is missing, damaged or not a recipe.
    """
    recipe = read_config(path)
    if "model_name_or_path" not in recipe:
        raise UserError(
            f"--config {path}: no model_name_or_path; name a training recipe, such as configs/quickstart.yaml"
        )
    return recipe


def repositories(recipe: dict) -> list[tuple[str, str]]:
    """(kind, name) of the hub repositories that a recipe reads; local folders and the builtin model are left out."""
    names = [("model", recipe["model_name_or_path"]), ("model", recipe.get("start_adapter"))]
    names += [("dataset", recipe.get("dataset_name")), ("dataset", recipe.get("test_dataset_name"))]
    names += [("dataset", part.get("path")) for part in recipe.get("datasets") or []]
    # A repository is `name` or `owner/name`; anything deeper is a path.
    return [
        (kind, name)
        for kind, name in dict.fromkeys(names)
        if name and not name.startswith("builtin:") and not Path(name).exists() and name.count("/") <= 1
    ]


def check_hub(recipe: dict | None) -> Iterator[Finding]:
    """Whether the hub can be reached, whose token is used, and access to the recipe's repositories."""
    from huggingface_hub import HfApi, constants, errors, get_token

    api, needed = HfApi(), repositories(recipe) if recipe else []
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", WARNING, "HF_HUB_OFFLINE is set: only cached models and data sets can be used")
        return
    try:
        _access("model", "openai-community/gpt2")
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        # Any answer of the server proves the connection; a mirror need not have this repository.
        pass
    except Exception as error:
        # Proxies, certificates and name servers fail with errors of many libraries.
        yield Finding(
            "hub", PROBLEM if needed else WARNING, f"{why_unreachable(error)}; docs/install.md describes offline use"
        )
        return
    if get_token() is None:
        yield Finding("hub", OK, f"{api.endpoint} answers; not logged in, which public repositories do not need")
    else:
        try:
            yield Finding("hub", OK, f"{api.endpoint} answers; logged in as {api.whoami()['name']}")
        except Exception as error:
            yield Finding("hub", PROBLEM, f"the token is not accepted ({first_line(error)}): run `hf auth login` again")
    for kind, name in needed:
        try:
            _access(kind, name)
            yield Finding("hub", OK, f"{kind} {name}: accessible")
        except errors.RepositoryNotFoundError as error:
            # Gated repositories are among them.
            yield Finding("hub", PROBLEM, why_no_access(error, name, kind))
        except Exception as error:
            yield Finding("hub", WARNING, why_no_access(error, name, kind))


def _access(kind: str, name: str) -> None:
    """Ask for one file of a repository, as a download would. Raises the hub client's error without access."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    # The page of a gated repository is public, its files are not.
    file = "config.json" if kind == "model" else "README.md"
    with contextlib.suppress(errors.EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=TIMEOUT)


def needed_bytes(recipe: dict) -> dict[str, float]:
    """{purpose of a folder: bytes} that the recipe's run writes; {} where the model's size is not known.

    Checkpoints hold the trained weights and two Adam moments for each of them; the last one's weights are written once
    more at the end. Only the model's configuration is read.
    """
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    name = recipe["model_name_or_path"]
    if name.startswith("builtin:"):
        return {}
    try:
        revision = recipe.get("model_revision")
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            total = sum(p.numel() for p in model.parameters())
            if recipe.get("use_peft"):
                targets = recipe.get("lora_target_modules") or "all-linear"
                lora = LoraConfig(r=recipe.get("lora_r", 16), target_modules=targets, task_type="CAUSAL_LM")
                model = get_peft_model(model, lora)
    except (OSError, ValueError):
        # Without the configuration (gated, offline) only the check of the hub can report.
        return {}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Adapters are trained and saved in float32.
    weight = 4 if recipe.get("use_peft") else DTYPE_BYTES.get(str(recipe.get("dtype")), 4)
    limit = 0 if recipe.get("save_strategy") == "no" else recipe.get("save_total_limit", 2)
    # A new checkpoint is complete before the oldest is deleted.
    checkpoints = (limit + 1 if limit else 0) * trained * (weight + OPTIMIZER_BYTES) + trained * weight
    stored = DTYPE_BYTES.get(str(getattr(config, "dtype", None)).removeprefix("torch."), 2)
    cached = Path(name).exists() or _is_cached(name)
    return {"checkpoints": checkpoints, "models and data sets": 0 if cached else total * stored}


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def describe_needs(needs: dict[str, float]) -> Finding:
    """The line about what the recipe writes."""
    if not needs:
        return Finding("recipe", WARNING, "the size of its model is not known here; disk needs are not checked")
    parts = ", ".join(f"{purpose} {size / GIB:.1f} GiB" for purpose, size in needs.items())
    return Finding("recipe", OK, f"will write about: {parts}")
