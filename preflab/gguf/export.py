"""One export: the model, its files, and what was measured of each."""

import re
from pathlib import Path

import numpy as np

from preflab.data.chat_template import ChatRenderer
from preflab.evaluation.comparison import Comparison, has_held_out
from preflab.evaluation.held_out import SHIPPED_PAIRS, held_out_pairs, shipped_pairs
from preflab.evaluation.merge_check import SIDES
from preflab.evaluation.rewards import number_prompts
from preflab.evaluation.two_models import TwoModels
from preflab.gguf.files import (
    CONVERTED,
    LOSSLESS,
    TYPES,
    GgufFolder,
    convert,
    convert_adapter,
    quantise,
    tensor_types,
)
from preflab.gguf.metrics import ensure_rounding_only, file_metrics, rows_of, source_metrics
from preflab.gguf.modelfile import modelfile, turns_of
from preflab.gguf.source import base_folder, source_folder
from preflab.gguf.verify import ensure_same_text, measured, texts_to_compare
from preflab.models.gguf_model import GgufModel
from preflab.models.llama_cpp import GgufFile, threads
from utils.errors import UserError
from utils.provenance import ROOT, sha256_of, sha256_of_files
from utils.stage import print_main

# The type of the adapter's own file, which is written in 16 bits.
ADAPTER = "LORA"


class Export:
    """The model that is exported, its pairs, and its finished files.

    Args:
        folder: of the files.
        chooses_pairs: whether the pairs were named on the command line.

    Attributes:
        models: base and tuned; `source` is the tuned model's size and speed.
        files: by type: file name, size, sha256, speed, a sample answer.
        logps: log-probabilities of the answers, shape (pairs, 2), in nats: `source`, `base`, and each type.
        checked: what was equal (`verify.ensure_same_text`).
        note: where the pairs are from, if they were not held out.
    """

    def __init__(self, comparison: Comparison, folder: Path, chooses_pairs: bool):
        args = comparison.args
        self.comparison, self.models = comparison, TwoModels(comparison)
        self.tokenizer = self.models.tokenizers["tuned"]
        identity = {"source": self.models.identity("tuned"), "dtype": self.models.dtype}
        self.folder = GgufFolder(folder, comparison.name, identity, args.overwrite)
        self.note = None
        if chooses_pairs or has_held_out(comparison.trained):
            self.data, self.ids, _ = held_out_pairs(comparison, self.tokenizer)
        else:
            lengths = args.max_length, args.max_prompt_length
            self.data, self.ids = shipped_pairs(self.tokenizer, *lengths, args.limit)
            self.note = f"No held-out pairs are known, so the {len(self.ids)} pairs are those of {SHIPPED_PAIRS}."
        rows = [{} for _ in self.data.pairs]
        number_prompts(rows, self.data.pairs)
        self.prompts = [row["prompt"] for row in rows]
        # Shape (pairs, 2).
        self.tokens = np.array([[len(row[f"{side}_ids"]) for side in SIDES] for row in self.ids])
        self.texts = texts_to_compare(self.data.pairs, self.tokenizer)
        self.files: dict[str, dict] = {}
        self.logps: dict[str, np.ndarray] = {}
        self.source, self.checked = {}, {}
        pinned = (ROOT / "requirements/gguf.txt").read_text()
        self.tools = {**dict(re.findall(r"^([\w.-]+)==(\S+)", pinned, re.MULTILINE)), "threads": threads()}

    def measure_source(self) -> None:
        """Prepare the plain folder of the model, and score it and its base."""
        models, comparison = self.models, self.comparison
        self.folder.open()
        self.source_folder = source_folder(models, self.folder.intermediate)
        self.logps["source"], speed = self._measured(
            lambda: models.load_one(str(self.source_folder), quantized=False), models.identity("tuned"), "model"
        )
        weights = [*self.source_folder.glob("*.safetensors"), *self.source_folder.glob("*.bin")]
        size = sum(path.stat().st_size for path in weights)
        bits = {"float32": 32, "bfloat16": 16, "float16": 16}[models.dtype]
        self.source = {"bytes": size, "bits_per_weight": bits, **speed}
        if comparison.base != comparison.tuned:
            # As rewards have it: the base that the run trained on, quantised as it was there.
            self.logps["base"], _ = self._measured(
                lambda: models.load_one(*comparison.weights("base")), models.identity("base"), "base"
            )
        self.tokenizer.save_pretrained(self.folder.path)

    def add(self, kind: str) -> None:
        """Write the file of one type, verify it, and give it its name."""

        def make(path: Path) -> None:
            print_main(f"{kind}: writing {self.folder.file(kind).name}")
            if kind in CONVERTED:
                convert(self.source_folder, path, kind)
            else:
                quantise(self._lossless(), path, kind)

        path = self.folder.write(kind, make)
        try:
            file = GgufFile(path, weights=False)
            self.checked = ensure_same_text(file, self.tokenizer, self.texts)
            file.close()
            self._measure(kind, path, lambda: GgufModel(path))
        except UserError:
            self.folder.reject(kind)
            raise
        self.folder.publish(kind)

    def add_adapter(self) -> None:
        """Write the adapter as GGUF, verified on a lossless GGUF of its base."""
        kind = ADAPTER
        base = base_folder(self.models)
        lossless = LOSSLESS[self.models.dtype]
        on = self.folder.intermediate(f"base-{lossless}.gguf", lambda path: convert(base, path, lossless))
        adapter = Path(self.comparison.adapter)
        path = self.folder.write(kind, lambda path: convert_adapter(adapter, base, path, "F16"))
        try:
            self._measure(kind, path, lambda: GgufModel(on, lora=path))
        except UserError:
            self.folder.reject(kind)
            raise
        self.folder.publish(kind)

    def _lossless(self) -> Path:
        """The model in its own precision: what the K-quants are made from."""
        kind = LOSSLESS[self.models.dtype]
        if self.folder.file(kind).exists():
            return self.folder.file(kind)
        return self.folder.intermediate(f"lossless-{kind}.gguf", lambda path: convert(self.source_folder, path, kind))

    def _measure(self, kind: str, path: Path, load) -> None:
        """Score a file, refuse it if it is another model, and record its size and speed."""
        digest = sha256_of_files([path])
        identity = {"weights_sha256": digest, "tools": {k: v for k, v in self.tools.items() if k != "threads"}}
        logps, speed = self._measured(load, identity, kind)
        ensure_rounding_only(kind, path.name, logps, self.logps["source"], self.tokens)
        size = path.stat().st_size
        # Parameters of the model from the source's size, so that an adapter's bits are its own.
        weights = self.source["bytes"] * 8 / self.source["bits_per_weight"]
        bits = None if kind == ADAPTER else 8 * size / weights
        self.logps[kind] = logps
        types = tensor_types(path)
        self.files[kind] = {
            "file": path.name,
            "bytes": size,
            "bits_per_weight": bits,
            "sha256": digest,
            "tensor_types": types,
            # K-quants need rows of a multiple of 256 values; other tensors get a larger type.
            "fallback_tensors": sum(n for name, n in types.items() if "_K" not in name and name != "F32")
            if "_K" in kind
            else 0,
            **speed,
        }

    def _measured(self, load, identity: dict, name: str) -> tuple[np.ndarray, dict]:
        ids = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in self.ids]
        identity = {"model": identity, "ids_sha256": sha256_of(*map(str, ids)), "dtype": self.models.dtype}
        return measured(load, self.tokenizer, self.ids, self.comparison.args, identity, name)

    def metrics(self) -> dict:
        """The metrics of the model and of every file."""
        seed, source, base = self.comparison.args.seed, self.logps["source"], self.logps.get("base")
        metrics = source_metrics(source, base, self.tokens, seed, self.prompts)
        for kind in self.files:
            metrics |= file_metrics(kind, self.logps[kind], source, base, self.tokens, seed, self.prompts)
        return metrics

    def rows(self) -> list[dict]:
        """One row per pair."""
        return rows_of(self.data.pairs, self.logps, self.prompts)

    def modelfile(self, kind: str) -> tuple[bool, str]:
        """(whether the Modelfile has the model's template, its text), for the file of one type."""
        kind = kind if kind in TYPES else next(k for k in reversed(self.files) if k in TYPES)
        file = GgufFile(self.folder.file(kind), weights=False)
        if not self.tokenizer.chat_template:
            return False, modelfile(file.path.name, None, self.checked["end_tokens"], False)
        turns = turns_of(self.tokenizer, file.adds_bos)
        folds = ChatRenderer(self.tokenizer).folds_system
        return turns is not None, modelfile(file.path.name, turns, self.checked["end_tokens"], folds)
