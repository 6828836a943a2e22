"""Judges behind an OpenAI-compatible HTTP endpoint."""

import os
from collections.abc import Iterator

from preflab.data.chat_template import CONTROL_TOKENS, break_up
from preflab.judging.judge_prompt import Item, JudgePrompt, Verdict, unparsed


class Endpoint:
    """A server that speaks OpenAI's chat completions. Timeouts, 429 and 5xx are retried with backoff by its client."""

    def __init__(self, model: str, url: str, prompt: JudgePrompt, options: dict):
        import openai

        self.name, self.model, self.prompt, self.options = f"openai:{model}@{url}", model, prompt, options
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=options["attempts"],
            timeout=options["timeout"],
        )
        self.down = 0

    def identity(self) -> dict:
        return {"judge": self.name, **self.prompt.identity, "max_new_tokens": self.prompt.max_new_tokens}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        from concurrent.futures import ThreadPoolExecutor, as_completed

        with ThreadPoolExecutor(self.options["concurrency"]) as pool:
            futures = {pool.submit(self._ask, item): i for i, item in enumerate(items)}
            try:
                for done in as_completed(futures):
                    yield futures[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, item: Item) -> Verdict:
        import openai

        verdict = unparsed("not asked")
        # Nonsense is asked again, as often as an error would be.
        for _ in range(1 + self.options["attempts"]):
            if self.down >= 3:
                return unparsed("the endpoint does not answer")
            try:
                verdict = self._once(item)
                self.down = 0
            except openai.APITimeoutError:
                return unparsed(f"no answer within {self.options['timeout']:g} s")
            except openai.APIConnectionError as error:
                self.down += 1
                return unparsed(f"no connection: {error.__cause__ or error}")
            except openai.OpenAIError as error:
                return unparsed(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
                verdict = unparsed(f"a reply that is no chat completion ({type(error).__name__})")
            if verdict.first is not None:
                break
        return verdict

    def _once(self, item: Item) -> Verdict:
        weighed = self.prompt.verdict == "logprob"
        extra = {"logprobs": True, "top_logprobs": 5, "max_tokens": 1, "temperature": 1.0}
        written = {"max_tokens": self.prompt.max_new_tokens, "temperature": 0.0}
        messages = self.prompt.messages(item, lambda text: break_up(CONTROL_TOKENS, text))
        answer = self.client.chat.completions.create(
            model=self.model, messages=messages, **(extra if weighed else written)
        )
        if not getattr(answer, "choices", None):
            return unparsed("the endpoint's reply holds no choice")
        choice = answer.choices[0]
        content = getattr(choice.logprobs, "content", None) if weighed and choice.logprobs else None
        if content:
            top = {}
            for token in content[0].top_logprobs or []:
                top.setdefault(token.token.strip(), token.logprob)
            verdict = self.prompt.weigh({label: top[label] for label in self.prompt.labels if label in top})
            if verdict.first is not None:
                return verdict
        return self.prompt.parse((choice.message.content if choice.message else None) or "")
