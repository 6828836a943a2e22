"""YAML files of `--config`: strict keys and types, and a fix for a file that does not exist."""

from pathlib import Path

from utils.errors import UserError
from utils.keys import Key, fits
from utils.parsing import parse_yaml
from utils.provenance import ROOT
from utils.suggestions import choose_from, meant_key, nearest


def check_config(path: str, keys: dict[str, Key]) -> None:
    """Raise UserError for what TRL's parser accepts in YAML: duplicate keys, values of a wrong type or choice."""
    for name, value in read_config(path).items():
        # TrlParser sets the entries of `env` as environment variables.
        if name == "env":
            check_environment(path, value)
            continue
        if name not in keys:
            meant = meant_key(str(name), keys)
            raise UserError(
                f"{path}: unknown key {name!r}; " + (f"did you mean {meant!r}?" if meant else "see --help_all")
            )
        key = keys[name]
        if key.choices and isinstance(value, str) and value not in key.choices:
            raise UserError(f"{path}: key {name!r}: {value!r} is unknown; {choose_from(value, key.choices)}")
        if not fits(value, key.hint):
            raise UserError(f"{path}: key {name!r} must be {key.wanted}, got {value!r}")


# The environment variables that a config may set, by the start of their names: of devices, threads and trackers. Others
# decide which code runs (LD_PRELOAD, PYTHONPATH, PATH), or where models and tokens are sent (HF_ENDPOINT, HTTPS_PROXY).
ENVIRONMENT = (
    "CUDA_", "NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_", "MKL_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "WANDB_", "COMET_", "MLFLOW_", "TRACKIO_", "CLEARML_",
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
)  # fmt: skip
# Words in the names of those that a file must not hold: secrets and addresses.
NOT_IN_FILES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "URL", "URI", "HOST", "PROXY", "ENDPOINT")


def check_environment(path: str, variables) -> None:
    """Raise UserError where the `env` of a config is not a mapping of harmless variables to plain values."""
    if not isinstance(variables, dict):
        raise UserError(f"{path}: key 'env' must be `NAME: value` lines")
    for name, value in variables.items():
        harmless = str(name).startswith(ENVIRONMENT) and not any(word in str(name) for word in NOT_IN_FILES)
        if not harmless or not isinstance(value, (str, int, float)):
            problem = "must be text or a number" if harmless else "is not set from a file"
            raise UserError(f"{path}: key 'env': {name} {problem}; set it in the shell: {name}=... python ...")


def read_config(path: str) -> dict:
    """Read a YAML mapping.

    Raises:
        UserError: no such file (names similar ones), invalid YAML, a key given twice, or no mapping.
    """
    import yaml

    # PyYAML keeps the last of two equal keys without a warning.
    class UniqueKeys(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path} line {key.start_mark.line + 1}: a key must be a word, not a list or mapping")
            if key.value in seen:
                raise UserError(f"{path} line {key.start_mark.line + 1}: duplicate key {key.value!r}")
            seen.add(key.value)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        config = parse_yaml(Path(path).read_text(encoding="utf-8-sig"), UniqueKeys)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; {similar_files(path)}") from None
    # Also of bytes that are not UTF-8.
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return config


def similar_files(path: str) -> str:
    """A sentence that names the config files most like `path`: the nearest spelling, else those of configs/."""
    folder = ROOT / "configs"
    shipped = {file.stem: file for file in sorted(folder.rglob("*.yaml"), key=lambda file: -len(file.parts))}
    beside = {file.stem: file for file in Path(path).parent.glob("*.y*ml")}
    files = shipped | beside
    match = nearest(Path(path).stem, files)
    if match:
        return f"did you mean {_shown(files[match])}?"
    top = [file.stem for file in sorted(folder.glob("*.yaml"))]
    return f"{_shown(folder)}/ has {', '.join(top)} (.yaml)"


def _shown(path: Path) -> str:
    """The path as it would be typed: relative to the current folder where it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
