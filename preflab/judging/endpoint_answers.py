"""Models behind an OpenAI-compatible server that answer prompts (vLLM, SGLang, llama.cpp, Ollama, hosted ones)."""

import openai

from preflab.evaluation.servers import model_and_url
from preflab.judging.chat_server import MALFORMED, ChatServer, in_threads, joined, malformed, text_of
from preflab.judging.replies import without_thoughts
from utils.errors import UserError

# Retries of a request that times out or that the server refuses for now (429, 5xx).
ATTEMPTS = 4


class EndpointModel:
    """A server's model as an answering model. Its thoughts are not part of an answer.

    Args:
        flag: what named the server, for error messages.
        args: server_timeout, server_concurrency.

    Raises:
        UserError: a specification other than openai:MODEL@BASE_URL.
    """

    def __init__(self, spec: str, flag: str, args):
        self.server = ChatServer(*model_and_url(spec, f"{flag} {spec}"), ATTEMPTS, args.server_timeout)
        self.name, self.concurrency = self.server.name, args.server_concurrency

    @property
    def identity(self) -> dict:
        """What its answers depend on, as far as it is known: the server may change its model unseen."""
        return {"endpoint": self.name}

    def generate(self, prompts: list[list[dict]], tokenizer, *, max_new_tokens, temperature, top_p, seed, top_k=0, **_):
        """As `preflab.models.generation.generate`; answers come as the server gives them.

        Tokens are counted with `tokenizer`, so that lengths are comparable with the other models'.

        Raises:
            UserError: a request failed, also after retries. Finished answers are cached by the caller.
        """
        settings = {"max_tokens": max_new_tokens, "temperature": temperature}
        if temperature:
            settings |= {"top_p": top_p, "seed": seed, **({"top_k": top_k} if top_k else {})}
        for i, answer in in_threads(lambda prompt: self._answer(prompt, settings), prompts, self.concurrency):
            tokens = len(tokenizer(answer["text"], add_special_tokens=False)["input_ids"])
            yield {"index": i, "tokens": tokens, **answer}

    def _answer(self, messages: list[dict], settings: dict) -> dict:
        """`{text, finish_reason}`, with `note` where the server refused a parameter or gave no text."""
        try:
            plain = [{key: message[key] for key in ("role", "content")} for message in messages]
            choice = self.server.reply(plain, settings)
            text = text_of(choice)
        except openai.OpenAIError as error:
            # The cause says which connection failed and how.
            reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
            raise UserError(
                f"{self.name}: {reason.splitlines()[0][:300]}; finished answers are cached, run the same command again"
            ) from None
        except MALFORMED as error:
            raise UserError(f"{self.name}: {malformed(error)}") from None
        text = without_thoughts(text).strip()
        reason = "length" if choice.finish_reason == "length" else "stop"
        note = joined(self.server.note, None if text or reason == "length" else why_empty(choice))
        return {"text": text, "finish_reason": reason, **({"note": note} if note else {})}


def why_empty(choice) -> str:
    """The note on a reply without text, in the server's words: a refusal, a content filter, a tool call."""
    refusal = str(getattr(choice.message, "refusal", None) or "").strip()
    reason = f"refusal: {refusal.splitlines()[0][:100]}" if refusal else f"finish_reason: {choice.finish_reason}"
    return f"the server's reply has no text ({reason})"
