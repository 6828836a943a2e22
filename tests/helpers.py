"""Helpers that tests of several rooms share; fixtures are in conftest.py."""

import signal
import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import torch
from conftest import ROOT, eval_args, lora_args, make_pairs, train_args
from processes import run_two_processes

from preflab.evaluation.runs import is_complete
from preflab.models.loading import load_model
from utils.artifacts import RowFile


def slow_logp(model, prompt: list[int], answer: list[int]) -> float:
    """log pi(answer | prompt), one row, no padding, token by token from the plain forward's logits in float64."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    total = 0.0
    for position, token in enumerate(answer, start=len(prompt)):
        row = logits[position - 1]
        total += float(row[token] - torch.logsumexp(row, 0))
    return total


CPU = ROOT / "configs" / "accelerate" / "cpu_2proc.yaml"


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def lora_of(base, folder, scale: float = 0.3):
    """A LoRA folder for `base` with random weights, so that the tuned model differs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(load_model(str(base)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=scale)
    model.save_pretrained(folder)
    return folder


def two_processes(script, *args):
    done = run_two_processes(script, *args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_shared(eval_out, count, *kinds):
    """Each kind of work was done once, by two processes together."""
    for kind in kinds:
        shards = {p.name: len(RowFile(p).read()) for p in (eval_out / ".cache").glob(f"{kind}-[0-9a-f]*/rows-*.jsonl")}
        assert set(shards) == {"rows-0.jsonl", "rows-1.jsonl"} and sum(shards.values()) == count, (kind, shards)


def kill_after(ranks: list, checkpoint) -> None:
    """Send SIGKILL to all ranks of a launch as soon as the checkpoint is complete."""
    while not is_complete(checkpoint) and all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    results = [rank.result() for rank in ranks]
    assert {done.returncode for done in results} == {-signal.SIGKILL}, results[0].stderr[-3000:]


def instructions(count: int, offset: int = 0) -> list[dict]:
    """Short rows in Alpaca's form."""
    rows = make_pairs(count, offset)
    return [
        {"instruction": r["prompt"], "input": "in one line" if i % 3 == 0 else "", "output": r["chosen"][1]["content"]}
        for i, r in enumerate(rows)
    ]


def stock_sft_rows(rows: list[dict], tokenizer, **choices):
    """Rows as TRL's own SFTTrainer tokenises them.

    Args:
        choices: chat_template, completion_only_loss and assistant_only_loss of the trainer.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    defaults = {"chat_template": None, "completion_only_loss": False, "assistant_only_loss": False}
    stock = SimpleNamespace(_tokenizer=tokenizer, **{**defaults, **choices})
    args = SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        dataset_text_field="text",
        assistant_only_loss=stock.assistant_only_loss,
        shuffle_dataset=False,
    )
    return SFTTrainer._prepare_dataset(stock, Dataset.from_list(rows), tokenizer, args, False, None, "train")


def sft_args(model, data, folder, *extra) -> list[str]:
    return [
        *lora_args(extra),
        *("--model_name_or_path", str(model), "--dataset_name", str(data)),
        *("--learning_rate", "1e-2", "--max_length", "128"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "4"),
        *("--gradient_checkpointing", "false", "--disable_tqdm", "true", "--test_rows", "8"),
        "--allow_fatal",
        *("--output_dir", str(folder / "ck"), "--eval_out", str(folder / "out"), "--run_name", "r", *map(str, extra)),
    ]


def reward_args(model, data, folder, *extra) -> list[str]:
    """Arguments of a small reward model's training."""
    return train_args(model, data, folder, *extra)


def pair_args(model, prompts, folder, *extra) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(prompts), "--sampling_seeds", "0", "50", "100"),
        *("--max_new_tokens", "6", "--temperature", "1.5", "--top_p", "1.0", "--test_prompts", "2"),
        *("--scorer", "longer", "--eval_out", str(folder), "--run_name", "p", *map(str, extra)),
    ]


def alpaca_args(trained, tmp_path, reference, tiny, *extra):
    own = ("--reference", reference, "--max_new_tokens", 6, "--lc_resamples", 3)
    # A second --judge would make a panel.
    own = own if "--judge" in extra else (*own, "--judge", f"hf:{tiny}")
    return eval_args(trained, tmp_path / "out", *own, *extra)


def texts(page: str) -> str:
    """The text of a page as a reader sees it, on one line."""
    parts, hidden = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: hidden.append(tag) if tag in ("script", "style") else None
    parser.handle_endtag = lambda tag: hidden.pop() if tag in ("script", "style") else None
    parser.handle_data = lambda data: None if hidden else parts.append(data)
    parser.feed(page)
    return " ".join(" ".join(parts).split())


def elements(page: str) -> list[tuple[str, dict]]:
    """Tag and attributes of every element, as an HTML parser finds them."""
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    return tags
