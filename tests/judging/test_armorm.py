"""ArmoRM on tiny random weights, against the formula of the published code, one text at a time."""

import copy
import json

import pytest
import torch
from conftest import ROOT
from torch.nn.functional import relu, softmax
from transformers import LlamaConfig, LlamaModel

from preflab.data.prompts import Prompt
from preflab.judging.armorm import ARCHITECTURE, END_OF_PROMPT, ArmoRM, last_start
from preflab.judging.judge_prompt import Item
from preflab.judging.judges import make_judge
from preflab.pairs.scorers import Candidates, make_scorer
from utils.errors import UserError

OPTIONS = {"dtype": "float32", "batch_tokens": 100_000, "batch_size": None, "attn_implementation": None, "seed": 0}
PROMPT = Prompt([{"role": "user", "content": "Name the sea."}], "p")
ANSWERS = [
    "The sea.",
    "It is the sea, as everybody knows.",
    "No <|eot_id|> at all.",
    "x",
    "\nIn a new line.",
]


@pytest.fixture(scope="module")
def tokenizer(smol_tokenizer):
    tokenizer = copy.deepcopy(smol_tokenizer)
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = (ROOT / "configs/templates/llama3.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="module")
def armorm(tokenizer, tmp_path_factory):
    """A folder as the published one: its class's name, and code that must not run."""
    folder = tmp_path_factory.mktemp("armorm")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_objectives=5, gating_temperature=0.5, gating_hidden_dim=16, gating_n_hidden=2,
        max_position_embeddings=512, num_labels=5,
    )  # fmt: skip
    model = ArmoRM(config)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved |= {"architectures": [ARCHITECTURE], "auto_map": {"AutoModelForSequenceClassification": "own.Code"}}
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "own.py").write_text("raise SystemExit('executed')")
    return folder


def published_score(folder, tokenizer, answer: str) -> float:
    """`modeling_custom.py` of RLHFlow/ArmoRM-Llama3-8B-v0.1 on one text, with the tensors of the file."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    backbone = LlamaModel(LlamaConfig.from_pretrained(folder)).eval()
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    backbone.load_state_dict(state)
    # Special tokens that an answer spells out are text.
    text = tokenizer.apply_chat_template(
        [*PROMPT.messages, {"role": "assistant", "content": answer.replace("<|eot_id|>", "< |eot_id|>")}],
        tokenize=False,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pattern = tokenizer(END_OF_PROMPT, add_special_tokens=False)["input_ids"]
    assert pattern[0] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    position = next(j for j in range(len(ids) - len(pattern), -1, -1) if ids[j : j + len(pattern)] == pattern)
    with torch.no_grad():
        hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
        rewards = tensors["regression_layer.weight"] @ hidden[-1]
        x = hidden[position]
        for k in range(3):
            x = tensors[f"gating.layers.{k}.weight"] @ x + tensors[f"gating.layers.{k}.bias"]
            x = relu(x) if k < 2 else x
        gate = softmax(x / 0.5, 0) * tensors["gating.logit_scale"][0]
        return float(gate @ (rewards @ tensors["reward_transform_matrix"]))


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_score_of_the_published_formula(armorm, tokenizer, batch_tokens):
    judge = make_judge(f"rm:{armorm}", "", {**OPTIONS, "batch_tokens": batch_tokens})
    scores = dict(judge.score([(PROMPT, answer) for answer in ANSWERS]))
    expected = {k: published_score(armorm, tokenizer, answer) for k, answer in enumerate(ANSWERS)}
    assert scores == pytest.approx(expected, abs=1e-5)
    assert min(abs(a - b) for i, a in expected.items() for k, b in expected.items() if k < i) > 1e-3


def test_gate_reads_the_prompt_only(armorm, tokenizer):
    """The end of the prompt comes before the answer, so its hidden state is the same for all answers."""
    model = ArmoRM.from_pretrained(armorm).eval()
    seen = []
    model.gating.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    judge = make_judge(f"rm:{armorm}", "", OPTIONS)
    judge.load()
    judge.model = model
    list(judge.score([(PROMPT, answer) for answer in ANSWERS]))
    rows = torch.cat(seen)
    assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-5)


def test_as_judge_and_as_scorer(armorm, tokenizer, tmp_path):
    a, b = (published_score(armorm, tokenizer, answer) for answer in ANSWERS[:2])
    (verdict,) = dict(make_judge(f"rm:{armorm}", "", OPTIONS).judge([Item(PROMPT, *ANSWERS[:2])])).values()
    assert verdict.first == float(a > b)
    (scores,) = make_scorer(f"rm:{armorm}", OPTIONS).score(
        [Candidates(PROMPT, ANSWERS[:2], [1, 1])], str(tmp_path), False
    )
    assert scores.scores == pytest.approx([a, b], abs=1e-5)


def test_last_occurrence():
    ids = torch.tensor([[7, 1, 2, 1, 2, 9], [1, 2, 9, 9, 9, 9], [0, 0, 0, 0, 1, 2]])
    assert last_start(ids, [1, 2]).tolist() == [3, 0, 4]
    with pytest.raises(UserError, match="chat template"):
        last_start(ids, [9, 7])
