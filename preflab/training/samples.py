"""Answers of base and tuned model to a few held-out prompts (without any: of train), for people to read."""

from contextlib import nullcontext

from preflab.data.chat_template import ChatRenderer
from preflab.models.generation import generate
from preflab.models.start_adapter import as_reference
from preflab.training.run import TrainingRun
from preflab.training.run_config import SAMPLE_TOKENS
from utils.artifacts import write_text
from utils.errors import is_main_process
from utils.progress import progress
from utils.tables import answer_label, side_by_side


def write_pair_samples(training: TrainingRun, trainer, splits) -> str | None:
    """Write samples.md: reference and policy on the first conversational prompts. Nothing without a reference.

    Plain-text pairs are left out: they are not questions.

    Returns:
        The file's path, None where none was written.
    """
    policy, pairs = trainer.accelerator.unwrap_model(trainer.model), (splits.test or splits.train).pairs
    if trainer.ref_model is None and not hasattr(policy, "peft_config"):
        return None
    prompts = [pair.messages for pair in pairs if pair.messages][: training.config.sample_prompts]
    others = {"base": as_reference(policy, trainer.ref_model)}
    return answer_prompts(training, trainer, prompts, others, held_out=bool(splits.test))


def write_conversation_samples(training: TrainingRun, trainer, splits) -> str | None:
    """Write samples.md: base (with LoRA) and tuned model on the last user turn of the first conversations.

    Plain text is left out: it is not a question.

    Returns:
        The file's path, None where none was written.
    """
    conversations = [c for c in (splits.test or splits.train).conversations if not c.is_text]
    conversations = conversations[: training.config.sample_prompts]
    if not conversations:
        return None
    chat = ChatRenderer(trainer.processing_class)
    # Without the last turn, the answer, so that each ends with a user turn.
    prompts = [c.turns_for(chat)[:-1] for c in conversations]
    policy = trainer.accelerator.unwrap_model(trainer.model)
    # Switching off an adapter that was trained further would not give the model that training started from.
    has_base = training.model_args.use_peft and not training.continues_adapter
    others = {"base": as_reference(policy)} if has_base else {}
    return answer_prompts(training, trainer, prompts, others, held_out=bool(splits.test))


def answer_prompts(
    training: TrainingRun, trainer, prompts: list[list[dict]], other_models: dict, held_out: bool
) -> str | None:
    """Answer greedily with the trained model and others, and write the answers. Rank 0 only.

    Nothing for a sharded model, which cannot generate on one rank alone.

    Args:
        prompts: conversations that end with a user turn.
        other_models: {name: context manager that gives the model}, each entered once.
        held_out: whether the prompts were not trained on.

    Returns:
        The file's path, None where none was written.
    """
    if not prompts or trainer.is_sharded or not is_main_process():
        return None
    models = {**other_models, "tuned": nullcontext(trainer.accelerator.unwrap_model(trainer.model))}
    answers = {}
    # In the precision of training.
    with trainer.accelerator.autocast():
        for name, context in models.items():
            with context as model:
                answers[name] = []
                with progress(len(prompts), f"samples of {name}", "prompt", leave=False) as bar:
                    for answer in generate(model, trainer.processing_class, prompts, SAMPLE_TOKENS):
                        answers[name].append(answer)
                        bar.update()
                # `generate` answers the longest prompts first.
                answers[name].sort(key=lambda answer: answer["index"])
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
    which = "Held-out prompts" if held_out else "Prompts of the train split"
    note = f"{which}, decoded greedily, at most {SAMPLE_TOKENS} tokens per answer."
    path = training.folders.results / "samples.md"
    write_text(path, side_by_side("Answers side by side", entries, note))
    return str(path)


def _turn(message: dict, with_role: bool) -> str:
    # Alpaca's template has an `input` field beside the instruction.
    text = "\n\n".join(message[key] for key in ("content", "input") if message.get(key))
    return f"**{message['role']}**: {text}" if with_role else text
