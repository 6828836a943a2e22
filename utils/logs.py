"""Console manners: libraries keep to errors, so that what a script prints can be read."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence the libraries' informational chatter; errors and this project's own lines stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|transformers|accelerate|trl)\b")
    for name in ("bitsandbytes", "accelerate", "trl", "httpx", "torch.distributed", "torch.utils.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
