"""Models behind an OpenAI-compatible server that answer prompts (vLLM, SGLang, llama.cpp, Ollama, hosted ones)."""

from concurrent.futures import ThreadPoolExecutor, as_completed

import openai

from preflab.judging.chat_server import ChatServer
from preflab.judging.endpoint import first_choice, text_of
from preflab.judging.replies import without_thoughts
from utils.errors import UserError

PREFIX = "openai:"
CONCURRENCY, ATTEMPTS, TIMEOUT = 8, 4, 600.0


class EndpointModel:
    """A server's model as an answering model. Its thoughts are not part of an answer.

    Raises:
        UserError: a specification other than openai:NAME@URL.
    """

    def __init__(self, spec: str, flag: str):
        self.spec = spec
        model, at, url = spec.removeprefix(PREFIX).partition("@")
        if not (model and at and url.startswith(("http://", "https://"))):
            raise UserError(f"{flag} {spec}: expected openai:NAME@URL, such as openai:gemma@http://localhost:8000/v1")
        self.server = ChatServer(model, url, ATTEMPTS, TIMEOUT)

    @property
    def identity(self) -> dict:
        """What its answers depend on, as far as it is known: the server may change its model unseen."""
        return {"endpoint": self.spec}

    def generate(self, prompts: list[list[dict]], tokenizer, *, max_new_tokens, temperature, top_p, seed, **_):
        """As `preflab.models.generation.generate`; answers come as the server gives them.

        Tokens are counted with `tokenizer`, so that lengths are comparable with the other models'.

        Raises:
            UserError: a request failed, also after retries. Finished answers are cached by the caller.
        """
        settings = {"max_tokens": max_new_tokens, "temperature": temperature}
        if temperature:
            settings |= {"top_p": top_p, "seed": seed}
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            futures = {pool.submit(self._answer, prompt, settings): i for i, prompt in enumerate(prompts)}
            try:
                for done in as_completed(futures):
                    text, reason = done.result()
                    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                    yield {"index": futures[done], "text": text, "tokens": tokens, "finish_reason": reason}
            # Also after an error or Ctrl-C: requests that have not started are dropped instead of awaited.
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, messages: list[dict], settings: dict) -> tuple[str, str]:
        try:
            plain = [{key: message[key] for key in ("role", "content")} for message in messages]
            choice = first_choice(self.server.reply(plain, settings))
            text = text_of(choice)
        except openai.OpenAIError as error:
            raise UserError(f"{self.spec}: {str(error).splitlines()[0][:200]}; run the same command again") from None
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise UserError(f"{self.spec}: the reply is not a chat completion ({type(error).__name__})") from None
        return without_thoughts(text).strip(), "length" if choice.finish_reason == "length" else "stop"
