"""The models of a chat, loaded once; each answers a conversation as in the evaluations."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from preflab.data.chat_template import TemplateRefused
from preflab.evaluation.two_models import TwoModels
from preflab.judging.answers import AnsweringModel, engine_of
from utils.errors import UserError

# A conversation and a function that is called with the answer so far -> {text, tokens, finish_reason}.
Answer = Callable[[list[dict], Callable[[str], None]], dict]


@contextmanager
def opened(models: TwoModels, answering: list[AnsweringModel], settings: dict) -> Iterator[dict[str, Answer]]:
    """Load all models and yield `{name: Answer}`. All of them stay in memory.

    Args:
        settings: max_new_tokens, temperature, top_p, top_k and seed.

    Raises:
        UserError: more than one process, or a model cannot be loaded. The functions raise it where a prompt is too
            long, a chat template refuses the conversation, or a server fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("chat.py: a conversation needs one process; start it without a launcher")
    with ExitStack() as stack:
        if any(model.name in models.sides and model.endpoint is None for model in answering):
            models.load()
        # Base and tuned share weights, whose adapter is switched on or off for each answer.
        loaded = {
            model.name: stack.enter_context(engine_of(model, "hf"))
            for model in answering
            if model.name not in models.sides and model.endpoint is None
        }

        def answer(model: AnsweringModel, messages: list[dict], on_text: Callable[[str], None]) -> dict:
            context = nullcontext(loaded[model.name]) if model.name in loaded else engine_of(model, "hf")
            try:
                with context as generate:
                    (given,) = generate([messages], **settings, on_text=lambda _, text: on_text(text))
            except TemplateRefused as error:
                raise UserError(f"{model.name}: its chat template refuses this conversation ({error})") from None
            return given

        yield {model.name: lambda *given, model=model: answer(model, *given) for model in answering}
