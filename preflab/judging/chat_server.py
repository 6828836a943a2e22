"""Chat completions of an OpenAI-compatible server, without the parameters that it refuses."""

import base64
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import unquote, urlsplit

import httpx2
import openai

from preflab.data.messages import well_formed
from preflab.evaluation.servers import SERVER
from utils.secrets_in_text import without_secrets

# The largest reply that is read, in bytes: more than ten times the longest answers and thoughts.
LARGEST_REPLY = 4 * 2**20
# What a reply raises that is not a chat completion: servers differ in what they leave out.
MALFORMED = (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError)
# A parameter that a server may refuse, and the words of its error message that name it. In this order: `logprobs` is
# part of the name `top_logprobs`.
REFUSABLE = {
    "top_logprobs": ("top_logprobs",),
    "logprobs": ("logprobs",),
    "max_completion_tokens": ("max_completion_tokens",),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "top_k": ("top_k",),
    "seed": ("seed",),
    "system": ("system role", "system message", "role system", "'system'", '"system"', "roles must alternate"),
}
# Status codes of a refused request. Templates that refuse a role are a server error in llama.cpp.
REFUSED = (400, 404, 422, 500)


class ErrorReply(ValueError):
    """A reply of status 200 that has an error in place of an answer; some servers pass errors of others on like that.

    Args:
        error: the reply's `error`: OpenAI's `{"message": ...}`, or a text.
    """

    def __init__(self, error):
        message = str((isinstance(error, dict) and error.get("message")) or error).strip()
        super().__init__((message.splitlines() or ["no message"])[0][:200])


def malformed(error: Exception) -> str:
    """What an exception of MALFORMED says about the reply."""
    if isinstance(error, ErrorReply):
        return f"the server replied with an error: {error}"
    return f"the reply is not a chat completion ({type(error).__name__})"


class ChatServer:
    """A model behind a server with OpenAI's chat completions. The client retries timeouts, 429 and 5xx with backoff.

    Args:
        url: the address; a login in it (https://user:password@host) is sent as basic authentication.
        timeout: seconds for a complete reply.

    Attributes:
        name: openai:MODEL@URL without a login, for reports and caches.
        given_up: the parameters that the server refused, as far as requests without them succeeded.
        usage: tokens read and written by replies so far, as the server counts them; threads share it without a lock,
            so it is approximate.
    """

    def __init__(self, model: str, url: str, attempts: int, timeout: float):
        self.model, self.given_up = model, ()
        self.usage = {"tokens_read": 0, "tokens_written": 0}
        parts, url = urlsplit(url), without_secrets(url)
        self.name = f"{SERVER}{model}@{url}"
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        self.client = openai.OpenAI(
            base_url=url,
            # The client insists on a key; servers without authentication ignore it.
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            # In place of the key. In the address it would reach logs and error messages.
            default_headers={"Authorization": f"Basic {base64.b64encode(login).decode()}"} if parts.username else None,
            max_retries=attempts,
            timeout=timeout,
            # A redirection is an error that names the status: prompts and key go to the address that was given only.
            http_client=openai.DefaultHttpxClient(transport=BoundedTransport(timeout), follow_redirects=False),
        )

    def reply(self, messages: list[dict], settings: dict):
        """The first choice of the reply to a conversation. A refused parameter is left out, each once per request.

        Raises:
            openai.OpenAIError: the request failed for another reason.
            one of MALFORMED: the reply is not a chat completion, has no choice, or an error (ErrorReply).
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
            for name, key in (("tokens_read", "prompt_tokens"), ("tokens_written", "completion_tokens")):
                count = getattr(getattr(reply, "usage", None), key, None)
                self.usage[name] += count if isinstance(count, int) else 0
            choices = getattr(reply, "choices", None)
            choice = choices[0] if choices else None
            if error := getattr(reply, "error", None) or getattr(choice, "error", None):
                raise ErrorReply(error)
            if choice is None:
                raise IndexError("no choices")
            return choice

    @property
    def note(self) -> str | None:
        """What was given up, None if nothing was."""
        if not self.given_up:
            return None
        return f"the server refused {', '.join(self.given_up)}; requests were sent without"


class BoundedTransport(httpx2.BaseTransport):
    """HTTP whose replies are bounded in time and size. httpx2's own timeout starts again with every chunk received."""

    def __init__(self, seconds: float, largest: int = LARGEST_REPLY):
        self.seconds, self.largest, self.inner = seconds, largest, httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """The complete reply. Raises httpx2.ReadTimeout or httpx2.ReadError beyond a bound."""
        started, body = time.monotonic(), bytearray()
        response = self.inner.handle_request(request)
        try:
            for chunk in response.stream:
                body += chunk
                if len(body) > self.largest:
                    raise httpx2.ReadError(f"a reply of more than {self.largest >> 20} MiB", request=request)
                if time.monotonic() - started > self.seconds:
                    raise httpx2.ReadTimeout(f"no complete reply in {self.seconds:g} s", request=request)
        finally:
            response.close()
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=httpx2.ByteStream(bytes(body)),
            extensions=response.extensions,
        )

    def close(self) -> None:
        self.inner.close()


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
    sent = {"messages": messages, **{key: value for key, value in settings.items() if key not in dropped}}
    if "top_k" in sent:
        # OpenAI's interface has none, so the client takes it as a further field of the request.
        sent["extra_body"] = {"top_k": sent.pop("top_k")}
    return sent


def refused(error: openai.APIStatusError, messages: list[dict], settings: dict, given_up: tuple) -> str | None:
    """The parameter of the request that the server's error message names; None for another error."""
    if error.status_code not in REFUSED:
        return None
    sent = accepted(messages, settings, given_up)
    present = {*sent, *sent.get("extra_body", {}), *(["system"] if sent["messages"][0]["role"] == "system" else [])}
    text = str(error).lower()
    return next((k for k, words in REFUSABLE.items() if k in present and any(word in text for word in words)), None)


def text_of(choice) -> str:
    """The text of a choice; content is None in refusals, tool calls and replies that were cut off in a thought."""
    # A server that cuts a reply inside an emoji may send half of it.
    return well_formed((choice.message.content if choice.message else None) or "")


def joined(*notes: str | None) -> str | None:
    """Notes as one text, None if there is none."""
    return "; ".join(note for note in notes if note) or None


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
