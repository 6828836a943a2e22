"""Answers of base and tuned model to a few held-out prompts, for people to read."""

from contextlib import nullcontext

from preflab.data.chat_template import ChatRenderer
from preflab.models.generation import generate
from preflab.models.start_adapter import as_reference
from preflab.training.run import TrainingRun
from preflab.training.run_config import SAMPLE_TOKENS
from utils.artifacts import write_text
from utils.errors import is_main_process
from utils.tables import answer_label, side_by_side


def write_pair_samples(training: TrainingRun, trainer, splits) -> None:
    """Write samples.md: reference and policy on the first conversational test prompts. Nothing without a reference.

    Plain-text pairs are left out: they are not questions.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if splits.test and (trainer.ref_model is not None or hasattr(policy, "peft_config")):
        prompts = [pair.messages for pair in splits.test.pairs if pair.messages][: training.config.sample_prompts]
        answer_prompts(training, trainer, prompts, {"base": as_reference(policy, trainer.ref_model)})


def write_conversation_samples(training: TrainingRun, trainer, splits) -> None:
    """Write samples.md: base (with LoRA) and tuned model on the last user turn of the first test conversations."""
    if not splits.test:
        return
    chat = ChatRenderer(trainer.processing_class)
    # Without the last turn, the answer, so that each ends with a user turn.
    prompts = [c.turns_for(chat)[:-1] for c in splits.test.conversations[: training.config.sample_prompts]]
    policy = trainer.accelerator.unwrap_model(trainer.model)
    # Switching off an adapter that was trained further would not give the model that training started from.
    has_base = training.model_args.use_peft and not training.continues_adapter
    answer_prompts(training, trainer, prompts, {"base": as_reference(policy)} if has_base else {})


def answer_prompts(training: TrainingRun, trainer, prompts: list[list[dict]], other_models: dict) -> None:
    """Answer greedily with the trained model and others, and write the answers. Rank 0 only.

    Nothing for a sharded model, which cannot generate on one rank alone.

    Args:
        prompts: conversations that end with a user turn.
        other_models: {name: context manager that gives the model}, each entered once.
    """
    if not prompts or trainer.is_sharded or not is_main_process():
        return
    models = {**other_models, "tuned": nullcontext(trainer.accelerator.unwrap_model(trainer.model))}
    answers = {}
    # In the precision of training.
    with trainer.accelerator.autocast():
        for name, context in models.items():
            with context as model:
                generated = generate(model, trainer.processing_class, prompts, SAMPLE_TOKENS)
                # `generate` answers the longest prompts first.
                answers[name] = sorted(generated, key=lambda answer: answer["index"])
    entries = [
        (
            f"Prompt {i + 1}",
            "\n\n".join(_turn(message, len(messages) > 1) for message in messages),
            {
                answer_label(name, by_prompt[i]["finish_reason"] == "length"): by_prompt[i]["text"]
                for name, by_prompt in answers.items()
            },
        )
        for i, messages in enumerate(prompts)
    ]
    note = f"Held-out prompts, decoded greedily, at most {SAMPLE_TOKENS} tokens per answer."
    write_text(training.folders.results / "samples.md", side_by_side("Answers side by side", entries, note))


def _turn(message: dict, with_role: bool) -> str:
    # Alpaca's template has an `input` field beside the instruction.
    text = "\n\n".join(message[key] for key in ("content", "input") if message.get(key))
    return f"**{message['role']}**: {text}" if with_role else text
