"""The files of a folder of weights that others need: weights, settings, tokenizer, template."""

import fnmatch

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
SMALL = (
    "adapter_config.json", "config.json", "generation_config.json", "*.safetensors.index.json", "*.bin.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model",
)  # fmt: skip


def matches(name: str, patterns: tuple) -> bool:
    """Whether a file's name matches one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
