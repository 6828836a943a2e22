"""A GGUF file as a causal LM of transformers: scored and sampled by the same code as every other model.

llama.cpp computes next-token logits; this wrapper gives them the interface that the project uses. For KL divergences
the logits themselves take the place of the last hidden states, and the output layer is the identity.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from preflab.models.llama_cpp import GgufFile
from utils.errors import UserError, first_line

PREFIX = "gguf:"
# Texts whose token ids show whether a tokenizer is that of a file: prose, code, digits, white space, other scripts.
PROBES = (
    "The river rises in the mountains, passes three towns and a dam, and reaches the sea after 240 kilometres.",
    "def mean(values):\n    return sum(values) / len(values)\n\n\tprint(mean([3, 5, 10]))  # 6.0",
    "  It's 1,234.56 — or isn't it?\r\n\r\n\r\n   naïve café, Straße, ÅNGSTRÖM…  ",
    "Привет, мир! 你好，世界。 こんにちは हिन्दी 🙂👩‍🚀",
)


def gguf_path(name: str) -> Path | None:
    """The file of a model named `gguf:FILE`, None for other names. Raises UserError if there is no such file."""
    if not name.startswith(PREFIX):
        return None
    path = Path(name.removeprefix(PREFIX)).expanduser()
    if not path.is_file():
        raise UserError(f"model {name}: no such file; give the path of a .gguf file after {PREFIX}")
    return path


def gguf_tokenizer(path: Path):
    """The tokenizer of a GGUF file with the file's chat template: from files beside it, else from the file itself.

    Raises:
        UserError: no tokenizer can be read, or it gives other token ids than llama.cpp does with this file.
    """
    file = GgufFile(path, weights=False)
    beside = (path.parent / "tokenizer_config.json").exists()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **({} if beside else {"gguf_file": path.name}))
    # Architectures that transformers cannot read from GGUF end in one of these.
    except (ValueError, OSError, KeyError, ImportError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"{path}: transformers cannot read its tokenizer ({first_line(error)[:200]}): put the original model's"
            " tokenizer.json and tokenizer_config.json into the same folder"
        ) from None
    tokenizer.chat_template = file.template or tokenizer.chat_template
    different = next((text for text in PROBES if tokenizer(text, add_special_tokens=False)["input_ids"]
                      != file.tokenize(text)), None)  # fmt: skip
    file.close()
    if different is not None:
        source = "the tokenizer beside it" if beside else "its tokenizer as transformers reads it"
        raise UserError(
            f"{path}: {source} gives other token ids than llama.cpp, for example for {different[:40]!r}: put the"
            " original model's tokenizer.json and tokenizer_config.json into the same folder"
        )
    return tokenizer


def ordered(rows: list[list[int]]) -> list[int]:
    """Indices of the rows in an order in which rows with the same start follow each other."""
    return sorted(range(len(rows)), key=rows.__getitem__)


class Backbone(nn.Module):
    """Computes logits in the place of hidden states."""

    def __init__(self, file: GgufFile):
        super().__init__()
        self.file = file

    def forward(self, input_ids, attention_mask, wanted):
        """Logits of shape (batch, length, vocabulary) at the positions where `wanted` (batch, length) is true.

        Other positions are 0. Rows may be padded on either side.
        """
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        # Positions within the row, without its padding.
        places = [(w & m)[m].nonzero()[:, 0].tolist() for w, m in zip(wanted, attention_mask.bool(), strict=True)]
        # Pages of zeros that are not written take no memory.
        hidden = torch.zeros((*input_ids.shape, self.file.vocabulary))
        # Scoring: one after the other, two answers to a prompt next to each other, so that it is computed once.
        # Generation: together, one token each.
        together = [range(len(rows))] if places[0][:1] == [len(rows[0]) - 1] else [[row] for row in ordered(rows)]
        for batch in together:
            given = self.file.logits([rows[row] for row in batch], [places[row] for row in batch])
            for row, logits in zip(batch, given, strict=True):
                columns = attention_mask[row].bool().nonzero()[:, 0][places[row]]
                hidden[row, columns.cpu()] = torch.from_numpy(logits)
        return SimpleNamespace(last_hidden_state=hidden.to(input_ids.device))


class IdentityHead(nn.Module):
    """The output layer: its input are logits already. Its empty weight gives the model a device and a dtype."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, hidden):
        return hidden


class GgufModel(PreTrainedModel, GenerationMixin):
    """The model in a GGUF file, computed by llama.cpp on the CPU.

    Args:
        lora: GGUF file of an adapter that is applied.

    Raises:
        UserError: as `GgufFile`.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    def __init__(self, path: Path, lora: Path | None = None):
        file = GgufFile(path, lora=lora)
        config = PreTrainedConfig(
            vocab_size=file.vocabulary,
            max_position_embeddings=file.longest,
            eos_token_id=file.end_ids(),
            num_hidden_layers=1,
        )
        super().__init__(config)
        self.backbone, self.lm_head, self.file = Backbone(file), IdentityHead(), file
        # `attach_head` leaves a model with this mark as it is: `forward` computes log-probabilities itself.
        self._has_logp_head = True
        self.name_or_path = config._name_or_path = f"{PREFIX}{path}"

    def get_input_embeddings(self):
        """An object with the number of token ids (preflab.models.checks)."""
        return SimpleNamespace(num_embeddings=self.config.vocab_size)

    def get_output_embeddings(self):
        """The identity."""
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        """All ids at every step: llama.cpp's own cache computes the new ones only."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def _prepare_cache_for_generation(self, *_args, **_kwargs):
        """No key-value cache of transformers."""

    def forward(
        self, input_ids, attention_mask=None, labels=None, logits_to_keep=0, fused_lm_head=False, use_cache=None, **_
    ):
        """Logits, or with `fused_lm_head` the log-probabilities of the labels, as TRL's fused head returns them.

        Args:
            input_ids, attention_mask: shape (batch, length).
            labels: as input_ids; -100 where no log-probability is wanted.
            logits_to_keep: compute the last positions only; 0 for all.

        Returns:
            `logits` (batch, length, vocabulary), or `log_probs` (batch, length - 1) in float32, 0 at label -100.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        wanted = torch.ones_like(input_ids, dtype=torch.bool)
        if fused_lm_head:
            wanted[:, :-1], wanted[:, -1] = labels[:, 1:] != -100, False
        elif logits_to_keep:
            wanted[:, :-logits_to_keep] = False
        hidden = self.backbone(input_ids, attention_mask, wanted).last_hidden_state
        if not fused_lm_head:
            return CausalLMOutput(logits=self.lm_head(hidden[:, -logits_to_keep:]))
        log_probs = torch.zeros(labels[:, 1:].shape, device=labels.device)
        for row, columns in enumerate(wanted[:, :-1]):
            logits = hidden[row, :-1][columns].float()
            chosen = logits.gather(1, labels[row, 1:][columns][:, None])[:, 0]
            log_probs[row, columns] = chosen - logits.logsumexp(1)
        return SimpleNamespace(log_probs=log_probs)
