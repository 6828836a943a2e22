"""ArmoRM (Wang et al. 2024, "Interpretable Preferences via Multi-Objective Reward Modeling", arXiv 2406.12845).

A Llama that scores an answer on 19 objectives, and a gate that weighs them by the prompt. The code that the published
weights (RLHFlow/ArmoRM-Llama3-8B-v0.1) bring along imports names that transformers 5 does not have, so the architecture
is defined here; nothing from the hub is executed.
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

from utils.errors import UserError

# The name of the published class, in `architectures` of config.json.
ARCHITECTURE = "LlamaForRewardModelWithGating"
# The gate reads the hidden state at the first of these tokens: the end of the last user turn, which has read the prompt
# and nothing of the answer. The published pattern has the two newlines too, which an answer that begins with a newline
# would change.
END_OF_PROMPT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"


class Gate(nn.Module):
    """A perceptron whose softmax weighs the objectives. Attribute names match the published weights."""

    def __init__(self, width: int, objectives: int, temperature: float, hidden: int, layers: int):
        super().__init__()
        self.temperature, self.logit_scale = temperature, nn.Parameter(torch.ones(1))
        widths = [width, *[hidden] * layers, objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, prompt: torch.Tensor) -> torch.Tensor:
        """Weights of the objectives, shape (batch, objectives), from hidden states of shape (batch, width)."""
        *hidden, last = self.layers
        for layer in hidden:
            prompt = torch.relu(layer(prompt))
        return torch.softmax(last(prompt) / self.temperature, dim=1) * self.logit_scale[0]


class ArmoRM(LlamaPreTrainedModel):
    """Llama with one linear output per objective, a transformation of them, and a gate."""

    def __init__(self, config):
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        # Takes the correlation with length out of the objectives (section 2.3 of the paper).
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives), requires_grad=False)
        self.gating = Gate(
            config.hidden_size,
            objectives,
            getattr(config, "gating_temperature", 10),
            getattr(config, "gating_hidden_dim", 1024),
            getattr(config, "gating_n_hidden", 3),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, end_of_prompt: list[int]):
        """`score`, shape (batch,): sum over objectives of gate weight × transformed reward.

        Args:
            input_ids, attention_mask: shape (batch, length), padded on the right.
            end_of_prompt: ids of END_OF_PROMPT, which every row contains.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=hidden.device)
        rewards = self.regression_layer(hidden[rows, attention_mask.sum(1) - 1]) @ self.reward_transform_matrix
        weights = self.gating(hidden[rows, last_start(input_ids, end_of_prompt)])
        return SimpleNamespace(score=(weights * rewards).sum(1))


def last_start(input_ids: torch.Tensor, pattern: list[int]) -> torch.Tensor:
    """Where the last occurrence of `pattern` starts in each row, shape (batch,).

    Raises:
        UserError: a row without it.
    """
    # Shape (batch, windows): whether the window that starts here is the pattern.
    windows = input_ids.unfold(1, len(pattern), 1)
    matches = (windows == torch.tensor(pattern, device=input_ids.device)).all(2)
    if not matches.any(1).all():
        raise UserError(
            f"ArmoRM reads the prompt's end at {END_OF_PROMPT!r}, which its chat template does not write; use"
            " the tokenizer of the published model"
        )
    places = torch.arange(matches.shape[1], device=input_ids.device)
    return torch.where(matches, places, -1).max(1).values
