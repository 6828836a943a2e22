"""The implicit reward of a DPO run as a judge and scorer: beta (log pi(y|x) - log pi_ref(y|x)), Rafailov et al. 2023.

A run ranks answers without a further model. It knows its own training pairs, so it cannot audit the run itself.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from preflab.data.chat_template import ChatRenderer, TemplateRefused, neutralise, shared_prefix
from preflab.data.prompts import Prompt
from preflab.evaluation.arguments import ComparisonArguments
from preflab.evaluation.comparison import resolve
from preflab.evaluation.logprob_scoring import Sequence, batches_of, score_batch, units_of
from preflab.evaluation.two_models import TwoModels
from preflab.judging.judge_prompt import NOT_FINITE
from preflab.judging.reward_model import ScoringJudge
from preflab.models.checks import UNLIMITED, context_length
from utils.errors import UserError

# Where the run does not name its beta (a loss without one).
DEFAULT_BETA = 0.1


class ImplicitReward(ScoringJudge):
    """A run of this project: the tuned model's log-probability of an answer relative to its reference's, times beta."""

    def __init__(self, run: str, options: dict):
        self.name = f"implicit:{run}"
        folder = Path(run).expanduser()
        if (folder / "adapter_config.json").exists():
            named = {"adapter_path": str(folder)}
        elif folder.is_dir():
            named = {"tuned_model": str(folder)}
        else:
            named = {"run_name": run}
        try:
            # The run's own precision, template and reference: its rewards are those of its evaluations.
            comparison = resolve(
                ComparisonArguments(
                    checkpoints=options.get("checkpoints") or ComparisonArguments.checkpoints,
                    output_dir=options.get("eval_out") or ComparisonArguments.eval_out,
                    batch_tokens=options["batch_tokens"],
                    batch_size=options["batch_size"],
                    **named,
                )
            )
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        beta = comparison.trained.get("beta")
        self.beta = DEFAULT_BETA if beta is None else float(beta)
        self.models = TwoModels(comparison)
        self.chat = ChatRenderer(self.models.tokenizer)

    def identity(self) -> dict:
        sides = {side: self.models.identity(side) for side in self.models.sides}
        return {"judge": self.name, "beta": self.beta, **sides}

    def close(self) -> None:
        """Release the two models' memory."""
        self.models.unload()

    def score(self, answers: list[tuple[Prompt, str]]) -> Iterator[tuple[int, float | str]]:
        """Yield (index, reward in beta × nats) of each answer; a text in place of a reward gives the reason."""
        self.models.load()
        with self.models.base() as model:
            limit = context_length(model) or UNLIMITED
        rows = {}
        for i, (prompt, answer) in enumerate(answers):
            try:
                sequence = self._sequence(prompt, answer)
            except TemplateRefused as error:
                yield i, f"the chat template of {self.name} refused: {error}"
                continue
            if len(sequence.ids) > limit:
                # Not truncated: a part of an answer has another reward.
                yield i, f"{len(sequence.ids)} tokens exceed the limit of {limit} of {self.name}"
                continue
            rows[i] = sequence
        indices = list(rows)
        # Answers to one prompt are not neighbours here, so each is computed on its own.
        units = units_of([rows[i].ids for i in indices], pairs=False)
        self.models.shares_prompts = False
        for batch in batches_of(units, self.models.comparison.args):
            chosen = [indices[k] for k in batch]
            for i, scores in zip(chosen, score_batch(self.models, [rows[i] for i in chosen]), strict=True):
                reward = self.beta * float(scores.tuned.sum() - scores.base.sum())
                yield i, reward if math.isfinite(reward) else NOT_FINITE

    def _sequence(self, prompt: Prompt, answer: str) -> Sequence:
        """The rendered conversation; scored from where it differs from the rendered prompt, as in training."""
        tokenizer = self.models.tokenizer
        messages = [{**m, "content": neutralise(m["content"], tokenizer)} for m in prompt.messages]
        texts = [self.chat.prompt_text(messages), self.chat.full_text(messages, neutralise(answer, tokenizer))]
        opening, ids = self.chat.ids(texts)
        return Sequence(ids, shared_prefix(opening, ids))
