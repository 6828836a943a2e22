"""Models behind an OpenAI-compatible server that answer prompts (vLLM, SGLang, llama.cpp, Ollama, hosted ones)."""

import openai

from preflab.judging.chat_server import MALFORMED, ChatServer, in_threads, model_and_url, text_of
from preflab.judging.replies import without_thoughts
from utils.errors import UserError

CONCURRENCY, ATTEMPTS, TIMEOUT = 8, 4, 600.0


class EndpointModel:
    """A server's model as an answering model. Its thoughts are not part of an answer.

    Raises:
        UserError: a specification other than openai:MODEL@BASE_URL.
    """

    def __init__(self, spec: str, flag: str):
        self.spec = spec
        self.server = ChatServer(*model_and_url(spec, f"{flag} {spec}"), ATTEMPTS, TIMEOUT)

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
        for i, (text, reason) in in_threads(lambda prompt: self._answer(prompt, settings), prompts, CONCURRENCY):
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            yield {"index": i, "text": text, "tokens": tokens, "finish_reason": reason}

    def _answer(self, messages: list[dict], settings: dict) -> tuple[str, str]:
        try:
            plain = [{key: message[key] for key in ("role", "content")} for message in messages]
            choice = self.server.reply(plain, settings)
            text = text_of(choice)
        except openai.OpenAIError as error:
            raise UserError(f"{self.spec}: {str(error).splitlines()[0][:200]}; run the same command again") from None
        except MALFORMED as error:
            raise UserError(f"{self.spec}: the reply is not a chat completion ({type(error).__name__})") from None
        return without_thoughts(text).strip(), "length" if choice.finish_reason == "length" else "stop"
