"""Judges behind an OpenAI-compatible HTTP endpoint."""

import math
from collections.abc import Iterator

import openai

from preflab.data.chat_template import CONTROL_TOKENS, break_up
from preflab.judging.chat_server import MALFORMED, ChatServer, in_threads, joined, malformed, text_of
from preflab.judging.judge_prompt import PARSER, Item, JudgePrompt, Verdict, unparsed
from preflab.judging.replies import starts_with_thought

# Failed connections in a row after which the endpoint counts as down and gets no more requests.
FAILURES_UNTIL_DOWN = 3
# The same for requests that timed out, each also in its retries: more, since a busy server answers some in time.
TIMEOUTS_UNTIL_DOWN = 16
TOP_LOGPROBS = 5
# Room for the thoughts of a judge that gives no usable log-probability of a label as its first token.
ROOM_FOR_THOUGHTS = 4096
FROM_TEXT = "the verdict was read from the reply's text"


class EndpointJudge:
    """A model behind a server with OpenAI's chat completions."""

    instant = False

    def __init__(self, model: str, url: str, prompt: JudgePrompt, options: dict):
        self.prompt, self.options = prompt, options
        self.server = ChatServer(model, url, options["attempts"], options["timeout"])
        self.name, self.usage = self.server.name, self.server.usage
        # Shared by the threads without a lock: an approximate count is enough to stop early.
        self.timeouts = 0
        self.failed_connections, self.reads_text = 0, prompt.verdict == "text"

    def identity(self) -> dict:
        parsed = {"max_new_tokens": self.prompt.max_new_tokens, "parser": PARSER}
        return {"judge": self.name, **self.prompt.identity, **parsed}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        return in_threads(self._verdict, items, self.options["concurrency"])

    def _verdict(self, item: Item) -> Verdict:
        """The verdict on one item. Errors become unparsed verdicts, so that one bad reply does not stop a battle."""
        verdict = unparsed("not requested")
        # The client retries errors; this loop asks again after a reply that cannot be parsed.
        for _ in range(1 + self.options["attempts"]):
            if self.failed_connections >= FAILURES_UNTIL_DOWN or self.timeouts >= TIMEOUTS_UNTIL_DOWN:
                return unparsed("the endpoint does not answer")
            try:
                verdict = self._request(item)
                self.failed_connections = self.timeouts = 0
            # A subclass of APIConnectionError, so it comes first. The client has already retried it.
            except openai.APITimeoutError:
                self.timeouts += 1
                return unparsed(f"no answer within {self.options['timeout']:g} s")
            except openai.APIConnectionError as error:
                self.failed_connections += 1
                return unparsed(f"no connection: {error.__cause__ or error}")
            except openai.OpenAIError as error:
                return unparsed(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            except MALFORMED as error:
                verdict = unparsed(malformed(error))
            if verdict.first is not None:
                break
        return verdict

    def _request(self, item: Item) -> Verdict:
        """One verdict: from the labels' log-probabilities, or from the text of a judge that gives none or thinks."""
        # The server's tokenizer is unknown: break up the control tokens of all common families.
        messages = self.prompt.messages(item, lambda text: break_up(CONTROL_TOKENS, text))
        if not (self.reads_text or {"logprobs", "top_logprobs"} & set(self.server.given_up)):
            # Temperature 1, so that the server does not rescale the log-probabilities.
            # One token: the label is expected as the first token of the reply.
            settings = {"logprobs": True, "top_logprobs": TOP_LOGPROBS, "max_tokens": 1, "temperature": 1.0}
            verdict = self._from_logprobs(self.server.reply(messages, settings))
            # The next attempt reads a text; without one left, it is made here.
            if verdict.first is not None or not self.reads_text or self.options["attempts"]:
                return verdict
        return self._from_text(messages)

    def _from_logprobs(self, choice) -> Verdict:
        """The verdict of a reply of one token; sets `reads_text` where only a longer reply can have one."""
        text = text_of(choice)
        tokens = (getattr(choice.logprobs, "content", None) if choice.logprobs else None) or []
        # A thought, shown or hidden by the server: the label comes after it.
        if starts_with_thought(text) or (tokens and starts_with_thought(tokens[0].token)):
            self.reads_text = True
            return unparsed("the judge thinks before its verdict")
        top = {}
        for token in (tokens[0].top_logprobs or []) if tokens else []:
            # " A" and "A" are spellings of one label: their probabilities add up. Case is part of a label (m and M).
            label = token.token.strip()
            top[label] = top.get(label, 0.0) + math.exp(token.logprob)
        verdict = self.prompt.weigh({label: math.log(p) for label, p in top.items() if p > 0})
        if verdict.first is None:
            # Its limit of one token is ours: a token that is a label was not cut off.
            verdict = self.prompt.parse(text)
            verdict.note = FROM_TEXT
            # No log-probabilities, or nothing but a hidden thought.
            self.reads_text |= verdict.first is None and not (tokens and text.strip())
        verdict.note = joined(verdict.note, self.server.note)
        return verdict

    def _from_text(self, messages: list[dict]) -> Verdict:
        by_text = self.prompt.verdict == "text"
        room = self.prompt.max_new_tokens if by_text else ROOM_FOR_THOUGHTS
        choice = self.server.reply(messages, {"max_tokens": room, "temperature": 0.0})
        verdict = self.prompt.parse(text_of(choice), choice.finish_reason)
        verdict.note = joined(None if by_text else FROM_TEXT, self.server.note)
        return verdict
