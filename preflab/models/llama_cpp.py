"""GGUF files through llama.cpp: vocabulary, chat template, and next-token logits on the CPU.

The library is xllamacpp's wheel, which exports llama.cpp's C interface (`bash install_gguf.sh`). Weights are computed
as llama.cpp computes them, in the file's own quantisation. The key-value cache is float32 and flash attention is
disabled, so that what is measured is the file and not the rounding of the cache.
"""

import importlib
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.machine import usable_cores
from utils.provenance import ROOT

INSTALL = "bash install_gguf.sh"
# Declarations of llama.h of the pinned build (b11549), without what is not called. ABI mode needs complete structs.
DECLARATIONS = """
struct llama_model; struct llama_context; struct llama_vocab; struct llama_adapter_lora; struct llama_memory_i;
struct llama_model_params {
    void *devices; void *tensor_buft_overrides;
    int32_t n_gpu_layers; int split_mode; int load_mode; int lazy_mode; int32_t main_gpu;
    const float *tensor_split; void *progress_callback; void *progress_callback_user_data; void *kv_overrides;
    bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
};
struct llama_context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch;
    int ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    float rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
    uint32_t yarn_orig_ctx; float defrag_thold;
    void *cb_eval; void *cb_eval_user_data; int type_k, type_v;
    void *abort_callback; void *abort_callback_data; size_t moe_cache_size;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
    void *samplers; size_t n_samplers; void *ctx_other;
};
struct llama_batch {
    int32_t n_tokens; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq_id; int32_t **seq_id; int8_t *logits;
};
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void llama_backend_init(void);
void llama_log_set(void (*callback)(int level, const char *text, void *data), void *data);
struct llama_model *llama_model_load_from_file(const char *path, struct llama_model_params params);
void llama_model_free(struct llama_model *model);
struct llama_context *llama_init_from_model(struct llama_model *model, struct llama_context_params params);
void llama_free(struct llama_context *context);
const struct llama_vocab *llama_model_get_vocab(const struct llama_model *model);
int32_t llama_model_n_ctx_train(const struct llama_model *model);
int32_t llama_model_desc(const struct llama_model *model, char *buffer, size_t size);
uint64_t llama_model_size(const struct llama_model *model);
uint64_t llama_model_n_params(const struct llama_model *model);
bool llama_model_has_encoder(const struct llama_model *model);
const char *llama_model_chat_template(const struct llama_model *model, const char *name);
int32_t llama_vocab_n_tokens(const struct llama_vocab *vocab);
const char *llama_vocab_get_text(const struct llama_vocab *vocab, int32_t token);
bool llama_vocab_is_eog(const struct llama_vocab *vocab, int32_t token);
int32_t llama_vocab_bos(const struct llama_vocab *vocab);
int32_t llama_vocab_eos(const struct llama_vocab *vocab);
bool llama_vocab_get_add_bos(const struct llama_vocab *vocab);
int32_t llama_tokenize(const struct llama_vocab *vocab, const char *text, int32_t size, int32_t *tokens,
    int32_t most, bool add_special, bool parse_special);
struct llama_memory_i *llama_get_memory(const struct llama_context *context);
void llama_memory_clear(struct llama_memory_i *memory, bool data);
bool llama_memory_seq_rm(struct llama_memory_i *memory, int32_t sequence, int32_t first, int32_t end);
struct llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(struct llama_batch batch);
int32_t llama_decode(struct llama_context *context, struct llama_batch batch);
float *llama_get_logits_ith(struct llama_context *context, int32_t i);
struct llama_adapter_lora *llama_adapter_lora_init(struct llama_model *model, const char *path);
int32_t llama_set_adapters_lora(struct llama_context *context, struct llama_adapter_lora **adapters, size_t count,
    float *scales);
"""
# Levels of llama.cpp's log: 3 is a warning, 4 an error, 5 continues the line before.
ERROR_LEVEL = 4
FLOAT32 = 0  # GGML_TYPE_F32
NO_FLASH_ATTENTION = 0
# Tokens per call of llama_decode, which returns at most this many rows of logits.
BATCH = 512


def tools_folder() -> Path:
    """Where install_gguf.sh puts the tools: $PREFERENCELAB_GGUF_TOOLS, or .gguf-tools in the project's folder."""
    return Path(os.environ.get("PREFERENCELAB_GGUF_TOOLS") or ROOT / ".gguf-tools")


def require_tools() -> Path:
    """The folder of the tools. Raises UserError, naming the command that installs them, if it is not complete."""
    folder = tools_folder()
    if not (folder / "stamp").exists():
        raise UserError(f"GGUF files need llama.cpp, which is not installed in {folder}: run `{INSTALL}` (100 MB)")
    return folder


class Library:
    """llama.cpp's functions (`c`), and the errors that it has logged."""

    def __init__(self):
        folder = require_tools()
        # At the end, so that no package of the environment is replaced.
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        self.ffi = importlib.import_module("cffi").FFI()
        self.ffi.cdef(DECLARATIONS)
        try:
            self.c = self.ffi.dlopen(str(next((folder / "xllamacpp").glob("xllamacpp*.so"))))
        except (StopIteration, OSError) as error:
            raise UserError(f"{folder}: llama.cpp cannot be loaded ({error}): run `{INSTALL}` again") from None
        self.errors: list[str] = []
        # A reference must remain: cffi frees a callback with its Python object.
        self._log = self.ffi.callback("void(int, const char *, void *)", self._logged)
        self.c.llama_log_set(self._log, self.ffi.NULL)
        self.c.llama_backend_init()
        self._check_layout()

    def _logged(self, level: int, text, _data) -> None:
        if level == ERROR_LEVEL:
            self.errors = [*self.errors, self.ffi.string(text).decode(errors="replace").strip()][-3:]

    def _check_layout(self) -> None:
        """Raise UserError if the structs above are not those of this library: known defaults are at their places."""
        model, context = self.c.llama_model_default_params(), self.c.llama_context_default_params()
        expected = (
            (model.use_extra_bufts, True),
            (model.vocab_only, False),
            (context.n_ctx, 512),
            (context.n_batch, 2048),
            (context.flash_attn_type, -1),
            (context.type_k, 1),
            (context.offload_kqv, True),
            (context.ctx_other, self.ffi.NULL),
        )
        if any(value != wanted for value, wanted in expected):
            raise UserError(
                f"{tools_folder()}: llama.cpp is of another version than requirements/gguf.txt: run `{INSTALL}`"
            )

    def last_error(self) -> str:
        """The last line of llama.cpp's errors, for a message."""
        return self.errors[-1] if self.errors else "llama.cpp gives no reason"


@cache
def library() -> Library:
    """The library, loaded once per process."""
    return Library()


def threads() -> int:
    """Threads of llama.cpp: $OMP_NUM_THREADS, else one per core that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else usable_cores()


class GgufFile:
    """A GGUF file opened by llama.cpp.

    Args:
        path: the file.
        weights: False to read vocabulary and metadata only.
        lora: GGUF file of a LoRA adapter that is applied.

    Attributes:
        vocabulary: number of token ids.
        longest: the longest context that the model was trained for, in tokens.
        description: e.g. "llama 134M Q8_0"; size in bytes of all tensors, and number of parameters.

    Raises:
        UserError: no such file, or one that llama.cpp cannot load.
    """

    def __init__(self, path: str | os.PathLike, weights: bool = True, lora: str | os.PathLike | None = None):
        self.path, self.lib = Path(path), library()
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file")
        # Before anything can fail: `close` frees what is there.
        self.context, self.adapter, self._capacity, self._cached = None, None, (0, 0), []
        c = self.lib.c
        settings = c.llama_model_default_params()
        settings.n_gpu_layers, settings.vocab_only = 0, not weights
        self.lib.errors = []
        self.model = c.llama_model_load_from_file(os.fsencode(self.path), settings)
        if not self.model:
            raise UserError(f"{path}: llama.cpp cannot load it ({self.lib.last_error()})")
        self.vocab = c.llama_model_get_vocab(self.model)
        self.vocabulary = c.llama_vocab_n_tokens(self.vocab)
        self.longest = c.llama_model_n_ctx_train(self.model)
        self.size, self.parameters = c.llama_model_size(self.model), c.llama_model_n_params(self.model)
        if lora is not None:
            self.adapter = c.llama_adapter_lora_init(self.model, os.fsencode(lora))
            if not self.adapter:
                raise UserError(f"{lora}: llama.cpp cannot apply it to {path} ({self.lib.last_error()})")

    @property
    def description(self) -> str:
        """Architecture, parameters and quantisation, as llama.cpp names them."""
        buffer = self.lib.ffi.new("char[]", 200)
        self.lib.c.llama_model_desc(self.model, buffer, 200)
        return self.lib.ffi.string(buffer).decode(errors="replace")

    @property
    def template(self) -> str | None:
        """The chat template inside the file."""
        text = self.lib.c.llama_model_chat_template(self.model, self.lib.ffi.NULL)
        return self.lib.ffi.string(text).decode() if text else None

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp and Ollama put a BOS in front of every text."""
        return bool(self.lib.c.llama_vocab_get_add_bos(self.vocab))

    def tokens(self) -> list[str]:
        """The text of every token, by id."""
        c, string = self.lib.c, self.lib.ffi.string
        return [string(c.llama_vocab_get_text(self.vocab, i)).decode(errors="replace") for i in range(self.vocabulary)]

    def end_ids(self) -> list[int]:
        """Ids at which llama.cpp ends an answer."""
        return [i for i in range(self.vocabulary) if self.lib.c.llama_vocab_is_eog(self.vocab, i)]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered text: special tokens in it are read as such, none is added."""
        data = text.encode()
        # One more than there are bytes: a token has at least one, and some tokenizers add a leading space.
        ids = self.lib.ffi.new("int32_t[]", len(data) + 2)
        count = self.lib.c.llama_tokenize(self.vocab, data, len(data), ids, len(data) + 2, False, True)
        if count < 0:
            raise UserError(f"{self.path}: llama.cpp cannot tokenize a text of {len(data)} bytes")
        return list(ids[0:count])

    def logits(self, rows: list[list[int]], wanted: list[list[int]]) -> list[np.ndarray]:
        """Next-token logits after the wanted positions of each row.

        A start of a row that was also the start of the same row of the last call is not computed again, so that
        generation computes one token per step.

        Args:
            rows: token ids.
            wanted: ascending positions per row, 0 for the first token.

        Returns:
            Per row, shape (wanted positions, vocabulary), float32.
        """
        self._make_room(len(rows), max(map(len, rows)))
        out = [np.empty((len(positions), self.vocabulary), np.float32) for positions in wanted]
        # (row, position, where its logits go or None) of every token to compute.
        todo = []
        for row, (ids, positions) in enumerate(zip(rows, wanted, strict=True)):
            place = {position: k for k, position in enumerate(positions)}
            start = self._reuse(row, ids, positions[0] if positions else len(ids))
            todo += [(row, position, place.get(position)) for position in range(start, len(ids))]
        for first in range(0, len(todo), BATCH):
            self._decode(rows, todo[first : first + BATCH], out)
        self._cached = [list(ids) for ids in rows]
        return out

    def _make_room(self, rows: int, length: int) -> None:
        """A context for that many rows of that many tokens."""
        most_rows, most = self._capacity
        if self.context and rows <= most_rows and length <= most:
            return
        c = self.lib.c
        self._free_context()
        # Rounded up: a generated answer grows token by token, and a new context computes all of it again.
        rows, length = max(rows, most_rows), max(-(-length // 256) * 256, most)
        settings = c.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = rows * length, rows, False
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads()
        settings.flash_attn_type, settings.swa_full = NO_FLASH_ATTENTION, True
        settings.type_k = settings.type_v = FLOAT32
        self.lib.errors = []
        self.context = c.llama_init_from_model(self.model, settings)
        if not self.context:
            raise UserError(
                f"{self.path}: llama.cpp cannot make a context of {rows} x {length} tokens ({self.lib.last_error()})"
            )
        if self.adapter:
            adapters = self.lib.ffi.new("struct llama_adapter_lora *[]", [self.adapter])
            c.llama_set_adapters_lora(self.context, adapters, 1, self.lib.ffi.new("float[]", [1.0]))
        self._capacity, self._cached = (rows, length), []
        self._batch = c.llama_batch_init(BATCH, 0, 1)

    def _reuse(self, row: int, ids: list[int], most: int) -> int:
        """Number of first tokens of a row that the cache holds, at most `most`; the cache drops the others."""
        before = self._cached[row] if row < len(self._cached) else []
        same = next((n for n, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), None)
        same = min(len(before), len(ids)) if same is None else same
        same = min(same, most)
        memory = self.lib.c.llama_get_memory(self.context)
        # Recurrent models cannot drop a part of a row.
        if not self.lib.c.llama_memory_seq_rm(memory, row, same, -1):
            self.lib.c.llama_memory_seq_rm(memory, row, 0, -1)
            return 0
        return same

    def _decode(self, rows: list[list[int]], todo: list[tuple], out: list[np.ndarray]) -> None:
        batch, c, ffi = self._batch, self.lib.c, self.lib.ffi
        batch.n_tokens = len(todo)
        for i, (row, position, place) in enumerate(todo):
            batch.token[i], batch.pos[i] = rows[row][position], position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, place is not None
        self.lib.errors = []
        status = c.llama_decode(self.context, batch)
        if status:
            # What the cache holds is not known after an error.
            c.llama_memory_clear(c.llama_get_memory(self.context), True)
            self._cached = []
            raise UserError(f"{self.path}: llama.cpp failed ({status}: {self.lib.last_error()})")
        for i, (row, _, place) in enumerate(todo):
            if place is not None:
                logits = c.llama_get_logits_ith(self.context, i)
                out[row][place] = np.frombuffer(ffi.buffer(logits, 4 * self.vocabulary), np.float32)

    def _free_context(self) -> None:
        if self.context:
            self.lib.c.llama_batch_free(self._batch)
            self.lib.c.llama_free(self.context)
            self.context = None

    def close(self) -> None:
        """Free the memory of weights and context."""
        self._free_context()
        if self.model:
            self.lib.c.llama_model_free(self.model)
            self.model = None

    def __del__(self):
        # At the interpreter's end modules are gone already, and the memory goes with the process.
        if getattr(self, "model", None) and sys and not sys.is_finalizing():
            self.close()
