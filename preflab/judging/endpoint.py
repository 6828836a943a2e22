"""Judges behind an OpenAI-compatible HTTP endpoint."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai

from preflab.data.chat_template import CONTROL_TOKENS, break_up
from preflab.judging.judge_prompt import Item, JudgePrompt, Verdict, unparsed

# Failed connections in a row after which the endpoint counts as down and is not asked again.
FAILURES_UNTIL_DOWN = 3
TOP_LOGPROBS = 5


class EndpointJudge:
    """A model behind a server with OpenAI's chat completions. The client retries timeouts, 429 and 5xx with backoff."""

    instant = False

    def __init__(self, model: str, url: str, prompt: JudgePrompt, options: dict):
        self.name, self.model, self.prompt, self.options = f"openai:{model}@{url}", model, prompt, options
        self.client = openai.OpenAI(
            base_url=url,
            # The client insists on a key; servers without authentication ignore it.
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=options["attempts"],
            timeout=options["timeout"],
        )
        # Shared by the threads without a lock: an approximate count is enough to stop early.
        self.failed_connections = 0

    def identity(self) -> dict:
        return {"judge": self.name, **self.prompt.identity, "max_new_tokens": self.prompt.max_new_tokens}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        with ThreadPoolExecutor(self.options["concurrency"]) as pool:
            futures = {pool.submit(self._verdict, item): i for i, item in enumerate(items)}
            try:
                for done in as_completed(futures):
                    yield futures[done], done.result()
            # Also after Ctrl-C: requests that have not started are dropped instead of awaited.
            finally:
                pool.shutdown(cancel_futures=True)

    def _verdict(self, item: Item) -> Verdict:
        """The verdict on one item. Errors become unparsed verdicts, so that one bad reply does not stop a battle."""
        verdict = unparsed("not asked")
        # The client retries errors; this loop asks again after a reply that cannot be parsed.
        for _ in range(1 + self.options["attempts"]):
            if self.failed_connections >= FAILURES_UNTIL_DOWN:
                return unparsed("the endpoint does not answer")
            try:
                verdict = self._request(item)
                self.failed_connections = 0
            # A subclass of APIConnectionError, so it comes first. The client has already retried it.
            except openai.APITimeoutError:
                return unparsed(f"no answer within {self.options['timeout']:g} s")
            except openai.APIConnectionError as error:
                self.failed_connections += 1
                return unparsed(f"no connection: {error.__cause__ or error}")
            except openai.OpenAIError as error:
                return unparsed(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
                # Servers differ in what they leave out of a reply.
                verdict = unparsed(f"the reply is not a chat completion ({type(error).__name__})")
            if verdict.first is not None:
                break
        return verdict

    def _request(self, item: Item) -> Verdict:
        """One request. Without usable log-probabilities the reply's text is parsed."""
        by_logprob = self.prompt.verdict == "logprob"
        if by_logprob:
            # Temperature 1, so that the server does not rescale the log-probabilities.
            # One token: the label is expected as the first token of the reply.
            settings = {"logprobs": True, "top_logprobs": TOP_LOGPROBS, "max_tokens": 1, "temperature": 1.0}
        else:
            settings = {"max_tokens": self.prompt.max_new_tokens, "temperature": 0.0}
        # The server's tokenizer is unknown: break up the control tokens of all common families.
        messages = self.prompt.messages(item, lambda text: break_up(CONTROL_TOKENS, text))
        reply = self.client.chat.completions.create(model=self.model, messages=messages, **settings)
        if not getattr(reply, "choices", None):
            return unparsed("the endpoint's reply has no choices")
        choice = reply.choices[0]
        content = getattr(choice.logprobs, "content", None) if by_logprob and choice.logprobs else None
        if content:
            top = {}
            for token in content[0].top_logprobs or []:
                # " A" and "A" are the same label; the likelier one comes first.
                top.setdefault(token.token.strip(), token.logprob)
            verdict = self.prompt.weigh({label: top[label] for label in self.prompt.labels if label in top})
            if verdict.first is not None:
                return verdict
        # content is None in refusals and tool calls.
        return self.prompt.parse((choice.message.content if choice.message else None) or "")
