"""Names of modules in LoRA's keys, checked against the model that they are applied to."""

import re

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError
from utils.suggestions import choose_from, did_you_mean

# PEFT's name for every linear module but the output layer.
ALL_LINEAR = "all-linear"


def as_names(targets: str | list[str] | None) -> str | list[str] | None:
    """`lora_target_modules` as PEFT should read it: a list of names, `all-linear`, or a regular expression.

    TRL turns a list of one name into the name, which PEFT would read as a regular expression of complete paths.
    Names separated by commas are accepted too.
    """
    names = targets if isinstance(targets, list) else [targets]
    if targets is None or ALL_LINEAR in names:
        return targets
    split = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if all(re.fullmatch(r"[\w.]+", part) for part in split):
        return split
    return targets


def check_targets(model, model_args) -> None:
    """Raise UserError for a name in LoRA's keys that matches nothing in the model; PEFT skips it silently.

    Args:
        model: the loaded base. model_args: TRL's ModelConfig after `as_names`.
    """
    modules = [name for name, _ in model.named_modules() if name]
    linear = _linear_names(model)
    targets, flag = model_args.lora_target_modules, "--lora_target_modules"
    if targets is None:
        kind = model.config.model_type
        if kind not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise UserError(f"{flag} is missing: PEFT has no default for {kind}; {_choices(linear)}")
    elif isinstance(targets, list):
        for name in targets:
            if not _ends_with(modules, name):
                raise UserError(
                    f"{flag} {name}: the model has no such module; {did_you_mean(name, linear)}{_choices(linear)}"
                )
    elif targets != ALL_LINEAR and not any(re.fullmatch(targets, module) for module in modules):
        raise UserError(f"{flag} {targets}: this regular expression matches no module of the model; {_choices(linear)}")
    for name in model_args.lora_modules_to_save or []:
        if not _ends_with(modules, name):
            names = sorted({module.rpartition(".")[2] for module in modules} - {""})
            names = [n for n in names if not n.isdigit()]
            raise UserError(f"--lora_modules_to_save {name}: the model has no such module; {choose_from(name, names)}")
    parameters = [name for name, _ in model.named_parameters()]
    for name in model_args.lora_target_parameters or []:
        if not _ends_with(parameters, name):
            raise UserError(f"--lora_target_parameters {name}: the model has no such parameter, e.g. {parameters[-1]}")


def _ends_with(paths: list[str], name: str) -> bool:
    """Whether a path is `name` or ends with it after a dot, which is how PEFT matches names in a list."""
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _linear_names(model) -> list[str]:
    """The last part of the path of every linear module but the output layer, each once, in the model's order."""
    # TRL refuses an adapter on the output layer.
    modules = [(path, m) for path, m in model.named_modules() if m is not model.get_output_embeddings()]
    return list(dict.fromkeys(path.rpartition(".")[2] for path, m in modules if isinstance(m, (nn.Linear, Conv1D))))


def _choices(linear: list[str]) -> str:
    return f"choose from {', '.join(linear)}, or {ALL_LINEAR}"
