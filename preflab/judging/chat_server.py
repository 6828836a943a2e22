"""Chat completions of an OpenAI-compatible server, without the parameters that it refuses."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai

from utils.errors import UserError

# What precedes MODEL@BASE_URL in the specification of a model behind a server.
PREFIX = "openai:"
# What a reply raises that is not a chat completion: servers differ in what they leave out.
MALFORMED = (ValueError, TypeError, AttributeError, KeyError, IndexError)
# A parameter that a server may refuse, and the words of its error message that name it. In this order: `logprobs` is
# part of the name `top_logprobs`.
REFUSABLE = {
    "top_logprobs": ("top_logprobs",),
    "logprobs": ("logprobs",),
    "max_completion_tokens": ("max_completion_tokens",),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "seed": ("seed",),
    "system": ("system role", "system message", "role system", "'system'", '"system"', "roles must alternate"),
}
# Status codes of a refused request. Templates that refuse a role are a server error in llama.cpp.
REFUSED = (400, 404, 422, 500)


class ChatServer:
    """A model behind a server with OpenAI's chat completions. The client retries timeouts, 429 and 5xx with backoff.

    Attributes:
        given_up: the parameters that the server refused, as far as requests without them succeeded.
    """

    def __init__(self, model: str, url: str, attempts: int, timeout: float):
        self.model, self.given_up = model, ()
        self.client = openai.OpenAI(
            base_url=url,
            # The client insists on a key; servers without authentication ignore it.
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=attempts,
            timeout=timeout,
        )

    def reply(self, messages: list[dict], settings: dict):
        """The first choice of the reply to a conversation. A refused parameter is left out, each once per request.

        Raises:
            openai.OpenAIError: the request failed for another reason.
            one of MALFORMED: the reply is not a chat completion, or has no choice.
        """
        given_up = self.given_up
        while True:
            try:
                reply = self.client.chat.completions.create(model=self.model, **accepted(messages, settings, given_up))
            except openai.APIStatusError as error:
                name = refused(error, messages, settings, given_up)
                if name is None:
                    raise
                given_up = (*given_up, name)
                continue
            # Only now: an error message may name a parameter for another reason, such as a prompt that is too long.
            self.given_up = tuple(dict.fromkeys((*self.given_up, *given_up)))
            if not getattr(reply, "choices", None):
                raise IndexError("no choices")
            return reply.choices[0]

    @property
    def note(self) -> str | None:
        """What was given up, None if nothing was."""
        if not self.given_up:
            return None
        return f"the server refused {', '.join(self.given_up)}; requests were sent without"


def accepted(messages: list[dict], settings: dict, given_up: tuple[str, ...]) -> dict:
    """Messages and settings without the parameters in `given_up`."""
    # Newer models of OpenAI's take the limit under another name.
    if "max_tokens" in given_up and "max_tokens" in settings:
        settings = {**settings, "max_completion_tokens": settings["max_tokens"]}
    dropped = {*given_up, *(("top_logprobs",) if "logprobs" in given_up else ())}
    # Alone, the flag gives the sampled token's log-probability, which compares no labels.
    dropped |= {"logprobs"} if "top_logprobs" in given_up else set()
    if "system" in given_up and messages[0]["role"] == "system":
        system, first, *others = messages
        messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
    return {"messages": messages, **{key: value for key, value in settings.items() if key not in dropped}}


def refused(error: openai.APIStatusError, messages: list[dict], settings: dict, given_up: tuple) -> str | None:
    """The parameter of the request that the server's error message names; None for another error."""
    if error.status_code not in REFUSED:
        return None
    sent = accepted(messages, settings, given_up)
    present = {*sent, *(["system"] if sent["messages"][0]["role"] == "system" else [])}
    text = str(error).lower()
    return next((k for k, words in REFUSABLE.items() if k in present and any(word in text for word in words)), None)


def text_of(choice) -> str:
    """The text of a choice; content is None in refusals, tool calls and replies that were cut off in a thought."""
    return (choice.message.content if choice.message else None) or ""


def model_and_url(spec: str, place: str) -> tuple[str, str]:
    """Model and address in openai:MODEL@BASE_URL. Raises UserError, naming `place`, for another specification."""
    model, at, url = spec.removeprefix(PREFIX).partition("@")
    if not (model and at and url.startswith(("http://", "https://"))):
        raise UserError(
            f"{place}: expected openai:MODEL@BASE_URL, such as openai:gpt-4o@https://host/v1 or"
            " openai:gemma@http://localhost:8000/v1"
        )
    return model, url


def in_threads(call: Callable, items: list, workers: int) -> Iterator[tuple[int, object]]:
    """Yield (index, call(item)) once for every item, as the calls finish. The first error of a call ends it."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(call, item): i for i, item in enumerate(items)}
        try:
            for done in as_completed(futures):
                yield futures[done], done.result()
        # Also after an error or Ctrl-C: requests that have not started are dropped instead of awaited.
        finally:
            pool.shutdown(cancel_futures=True)
