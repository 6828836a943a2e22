"""The training script against a loop that uses none of this project's code: losses, rewards and gradient norms.

Every step takes all rows as one batch, so the order of the rows does not matter.
"""

import copy
import json

import pytest
import torch
from conftest import make_pairs, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, RATE, BETA = 4, 2e-4, 0.3
# {loss: function of policy and reference log-ratios}, from the papers. w, l: log pi - log pi_ref of chosen and
# rejected; w_mean, l_mean: the same per token; pw, pl: log pi per token.
LOSSES = {
    "sigmoid": lambda s: -logsigmoid(BETA * (s.w - s.l)),
    "hinge": lambda s: torch.relu(1 - BETA * (s.w - s.l)),
    "ipo": lambda s: (s.w_mean - s.l_mean - 1 / (2 * BETA)) ** 2,
    "robust": lambda s: (-0.9 * logsigmoid(BETA * (s.w - s.l)) + 0.1 * logsigmoid(BETA * (s.l - s.w))) / 0.8,
    "sppo_hard": lambda s: (s.w - 0.5 / BETA) ** 2 + (s.l + 0.5 / BETA) ** 2,
    "apo_zero": lambda s: 1 - torch.sigmoid(BETA * s.w) + torch.sigmoid(BETA * s.l),
    "apo_down": lambda s: torch.sigmoid(BETA * s.w) + 1 - torch.sigmoid(BETA * (s.w - s.l)),
    "simpo": lambda s: -logsigmoid(BETA * (s.pw - s.pl) - 0.5 * BETA),
}
SMOOTHING = {"robust": 0.1}


class Sides:
    """Log-ratios of a batch. Shapes (pairs,)."""

    def __init__(self, policy, reference, lengths):
        (self.w, self.l), (nw, nl) = policy - reference, lengths
        self.w_mean, self.l_mean, self.pw, self.pl = self.w / nw, self.l / nl, policy[0] / nw, policy[1] / nl


def rendered(tokenizer, turns: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer that ends the conversation."""
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.startswith(prompt)
    # As in TRL, the answer is everything that the template adds, also a newline behind the end-of-turn token.
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text[len(prompt) :]))


def log_probability(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Summed log-probability of the answer, one sequence without padding."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
    return logps.gather(1, torch.tensor(answer)[:, None]).sum()


def loop(policy, tokenizer, rows, loss: str) -> list[dict]:
    """Full-batch training with AdamW at a constant rate."""
    reference = copy.deepcopy(policy).eval()
    pairs = [[rendered(tokenizer, row[side]) for row in rows] for side in ("chosen", "rejected")]
    lengths = torch.tensor([[len(answer) for _, answer in side] for side in pairs], dtype=torch.float32)
    with torch.no_grad():
        ref = torch.stack([torch.stack([log_probability(reference, *pair) for pair in side]) for side in pairs])
    policy.eval()  # without dropout, as TRL's disable_dropout
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    log = []
    for _ in range(STEPS):
        logps = torch.stack([torch.stack([log_probability(policy, *pair) for pair in side]) for side in pairs])
        sides = Sides(logps, ref, lengths)
        value = LOSSES[loss](sides).mean()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards = {"rewards/chosen": BETA * sides.w.mean(), "rewards/margins": BETA * (sides.w - sides.l).mean()}
        if loss == "simpo":
            # It has no reference: what it compares are means per token.
            rewards = {"simpo/chosen": BETA * sides.pw.mean(), "simpo/rejected": BETA * sides.pl.mean()}
        log.append({"loss": value, "grad_norm": norm, "logps/rejected": logps[1].mean(), **rewards})
    return [{name: float(number.detach()) for name, number in row.items()} for row in log]


def script(train, model, data, folder, rows: int, *extra) -> list[dict]:
    code, _, err = train(
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--dataset_test_split", "none"),
        *("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", "1", "--max_steps", str(STEPS)),
        *("--learning_rate", str(RATE), "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--beta", str(BETA)),
        *("--weight_decay", "0", "--max_grad_norm", "1.0", "--bf16", "false", "--save_strategy", "no"),
        *("--output_dir", str(folder / "ck"), "--eval_out", str(folder / "out"), "--run_name", "r", "--disable_tqdm"),
        # Eight rows in full training learn nothing at the rates of the recipes.
        *("--keep_duplicate_prompts", "--sample_prompts", "0", "--allow_fatal", *extra),
    )
    assert code == 0, err
    log = [json.loads(line) for line in (folder / "out" / "r" / "train_log.jsonl").read_text().splitlines()]
    return [row for row in log if row["split"] == "train"]


def assert_same(own: list[dict], independent: list[dict]) -> None:
    assert len(own) == len(independent) == STEPS
    for step, (a, b) in enumerate(zip(own, independent, strict=True)):
        for name, value in b.items():
            # A reward is beta times the difference of two sums of about 100 nats, which float32 resolves to 1e-5 each.
            tolerance = 5e-5 if name.startswith("rewards/") else 1e-5
            assert a[name] == pytest.approx(value, rel=1e-5, abs=tolerance), (step, name)


def conversations(tmp_path) -> tuple[list[dict], object]:
    """Eight pairs, some with a system turn and earlier turns."""
    rows = make_pairs(8)
    for k, row in enumerate(rows):
        before = [{"role": "system", "content": "Be brief."}] if k % 2 else []
        if k % 3 == 0:
            before += [{"role": "user", "content": f"Hello {k}."}, {"role": "assistant", "content": "Hello."}]
        row.pop("prompt")
        for side in ("chosen", "rejected"):
            row[side] = before + row[side]
    return rows, write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.mark.parametrize(
    "loss", ["sigmoid", "simpo", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LOSSES)[1:-1])]
)
def test_full_training(loss, train, tiny, tmp_path):
    rows, data = conversations(tmp_path)
    smoothing = ("--label_smoothing", str(SMOOTHING[loss])) if loss in SMOOTHING else ()
    own = script(train, tiny, data, tmp_path, len(rows), "--loss_type", loss, *smoothing)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    assert_same(own, loop(model, tokenizer, rows, loss))


def test_lora_continued_from_an_adapter(train, tiny, tmp_path):
    """The adapter starts from random weights that both loops read; its frozen copy is the reference."""
    rows, data = conversations(tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path / "adapter")
    flags = ("--use_peft", "--start_adapter", str(tmp_path / "adapter"), "--start_adapter_use", "continue")
    own = script(train, tiny, data, tmp_path, len(rows), *flags)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    assert_same(own, loop(model, AutoTokenizer.from_pretrained(tiny), rows, "sigmoid"))
