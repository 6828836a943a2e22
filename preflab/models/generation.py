"""Generation with transformers, for every stage: prompts in, answers with token counts and finish reasons out."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from preflab.data.chat_template import ChatRenderer, neutralise
from preflab.models.batching import token_batches
from preflab.models.checks import answer_room, check_ids, fit_pad_token, name_of
from preflab.models.fast.packed_linear import packed
from preflab.models.fast.row_cache import RowCache, Step, next_logits, rounded, supports
from preflab.models.logprobs import without_adapter_shell
from preflab.models.sampling import Sampled, Sampler, prompt_seed
from utils.errors import UserError

# Prompt tokens that are computed in one forward pass, unless one prompt is longer.
JOINING_TOKENS = 2048
# Packing the weights takes the time that it saves in about this number of steps. For a single row it saves none.
WORTH_PACKING = 16
# On a GPU the tokens are read once in this number of steps, because reading waits for the device. Tokens after an end
# token are then computed in vain.
STEPS_PER_READ = 8


def generate(
    model,
    tokenizer,
    prompts: list[list[dict]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_tokens: int = 8192,
    seed: int = 42,
    batch_size: int | None = None,
    top_k: int = 0,
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[dict]:
    """Answer conversations together, longest first.

    An answer does not depend on the other prompts: rows are computed without padding, or padding is masked, and every
    sampled answer has its own random generator, seeded from `seed` and the prompt. Special tokens that a prompt spells
    out are treated as text. The model must not be used otherwise until all answers are there.

    Args:
        prompts: conversations that end with a user turn.
        temperature: 0 decodes greedily; above 0 samples.
        batch_tokens: maximum of prompt and answer tokens (their longest possible length) in memory at once; a prompt
            that needs more is answered alone.
        batch_size: maximum of prompts at once.
        top_k: sample among this many most likely tokens; 0 for all.
        on_text: called after every token with a prompt's index and its answer so far, for display. Does not change
            the answers.

    Yields:
        `{"index", "text", "tokens", "finish_reason"}` per prompt, as they end (`index` into `prompts`);
        `finish_reason` is "stop" after an end-of-turn token, "length" if truncated at `max_new_tokens` or at the
        model's longest context.

    Raises:
        UserError: a prompt fills the model's longest context or has a token id without an embedding, or the model's
            outputs are NaN.
    """
    chat = ChatRenderer(tokenizer)
    prompt_ids = chat.ids([chat.prompt_text(as_plain_text(messages, tokenizer)) for messages in prompts])
    fit_pad_token(model, tokenizer)
    check_ids(model, tokenizer, max((max(ids) for ids in prompt_ids), default=0))
    room = answer_room(model, prompt_ids, max_new_tokens)
    sampler = Sampler(temperature, top_p, top_k) if temperature else None
    generators = [
        torch.Generator(model.device).manual_seed(prompt_seed(seed, messages)) if sampler else None
        for messages in prompts
    ]
    requests = [Request(*given) for given in zip(range(len(prompts)), prompt_ids, room, generators, strict=True)]
    stops = end_tokens(model, tokenizer, chat)
    show = _reporter(tokenizer, stops, on_text) if on_text else None
    answers = answers_by_row if supports(model) else answers_by_batch
    was_training = model.training
    model.eval()
    try:
        for request in answers(model, tokenizer, requests, stops, sampler, batch_tokens, batch_size, show):
            # The end token is not counted as part of the answer.
            ended = request.tokens[-1:] and request.tokens[-1] in stops
            tokens = request.tokens[:-1] if ended else request.tokens
            yield {
                "index": request.index,
                "text": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                "tokens": len(tokens),
                "finish_reason": "stop" if ended else "length",
            }
    finally:
        model.train(was_training)


@dataclass
class Request:
    """A prompt and its answer so far.

    Attributes:
        index: of the prompt.
        ids: the prompt's tokens.
        room: longest answer in tokens.
        generator: random numbers of a sampled answer.
        tokens: the answer so far, its end token included.
        start: its span's place in the cache, while it is being answered.
    """

    index: int
    ids: list[int]
    room: int
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    start: int = -1

    @property
    def span(self) -> int:
        """Tokens of the cache that it needs."""
        return rounded(len(self.ids) + self.room)

    def add(self, tokens: list[int], stops: set[int]) -> bool:
        """Add new tokens up to the first end token. Returns whether the answer is complete."""
        for token in tokens:
            self.tokens.append(token)
            if token in stops:
                return True
        return len(self.tokens) >= self.room


def end_tokens(model, tokenizer, chat: ChatRenderer) -> set[int]:
    """The ids that end an answer."""
    # Some instruct models name only the end of the text in their generation config, not the template's end of turn.
    eos = model.generation_config.eos_token_id
    return ({tokenizer.eos_token_id, *chat.end_ids()} | set(eos if isinstance(eos, list) else [eos])) - {None}


def _reporter(tokenizer, stops: set[int], on_text: Callable[[int, str], None]) -> Callable[[int, list[int]], None]:
    """A function that reports an answer's text, given its index and its tokens so far."""

    def show(index: int, tokens: list[int]) -> None:
        ended = tokens[-1] in stops
        text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).strip()
        # Bytes of a character that is not complete yet decode to replacement characters.
        on_text(index, text if ended else text.rstrip("\ufffd"))

    return show


# ------------------------------------------------------------------------------------------------------ without padding


def answers_by_row(model, tokenizer, requests, stops, sampler, batch_tokens, batch_size, show) -> Iterator[Request]:
    """Decode all rows that fit together; a row that ends makes room for the next prompt (continuous batching).

    Args as `generate`'s; show: called with an index and its tokens after every token, or None.

    Yields:
        Requests with their complete answers.
    """
    # Longest first, so that a prompt too large for the memory fails at once, and later ones fit into the spans that
    # become free.
    waiting = deque(sorted(requests, key=lambda r: (-len(r.ids), r.index)))
    if not waiting:
        return
    needed = [request.span for request in requests]
    cache = RowCache(min(sum(needed), max(batch_tokens, *needed)))
    live: list[Request] = []
    worth_packing = len(requests) > 1 and max(request.room for request in requests) >= WORTH_PACKING
    with packed(model) if worth_packing else nullcontext():
        while waiting or live:
            live.sort(key=lambda r: r.start)
            joining = _join(waiting, cache, batch_size - len(live) if batch_size else len(waiting))
            rows = live + joining
            # No row may exceed its span.
            steps = min(1 if show else steps_per_read(model.device), *(r.room - len(r.tokens) for r in rows))
            decoded, live = _decode(model, cache, live, joining, sampler, steps), []
            for request, new in zip(rows, decoded, strict=True):
                complete = request.add(new, stops)
                if show:
                    show(request.index, request.tokens)
                if complete:
                    cache.spans.give_back(request.start, request.span)
                    yield request
                else:
                    live.append(request)


def steps_per_read(device) -> int:
    """How many tokens are drawn before they are read, where nothing shows them."""
    return 1 if device.type == "cpu" else STEPS_PER_READ


def _join(waiting: deque, cache: RowCache, most: int) -> list[Request]:
    """Take the next prompts that fit, give them spans of the cache, and return them."""
    joining, tokens = [], 0
    while waiting and len(joining) < most and (not joining or tokens + len(waiting[0].ids) <= JOINING_TOKENS):
        start = cache.spans.take(waiting[0].span)
        if start is None:
            break
        waiting[0].start = start
        tokens += len(waiting[0].ids)
        joining.append(waiting.popleft())
    return joining


def _decode(model, cache: RowCache, live, joining, sampler, steps: int) -> list[list[int]]:
    """The next `steps` tokens of the rows in `live`, then of the prompts in `joining`.

    Raises:
        UserError: the model's outputs are NaN.
    """
    device, rows = model.device, live + joining
    ids = torch.tensor([r.tokens[-1] for r in live] + [token for r in joining for token in r.ids], device=device)
    drawn, damaged = [], torch.zeros((), dtype=torch.bool, device=device)
    with torch.inference_mode():
        for number in range(steps):
            decoded = rows if number else live
            # The last token of an answer is not in the cache yet.
            places = [(r.start, len(r.ids) + len(r.tokens) + number) for r in decoded]
            prompts = [] if number else [(r.start, len(r.ids)) for r in joining]
            logits = next_logits(model, ids, Step(cache, places, prompts, device)).float()
            damaged |= logits.isnan().any()
            ids = sampler(logits, [r.generator for r in rows]) if sampler else logits.argmax(-1)
            drawn.append(ids)
    # One read for all steps.
    tokens = torch.stack(drawn, 1).tolist()
    # argmax and sampling would still give tokens.
    if bool(damaged):
        raise UserError(not_a_number(name_of(model)))
    return tokens


# ----------------------------------------------------------------------------------------------------------- in batches


def answers_by_batch(model, tokenizer, requests, stops, sampler, batch_tokens, batch_size, show) -> Iterator[Request]:
    """As `answers_by_row`, with transformers' `generate`, batch by batch, for every other architecture."""
    settings = GenerationConfig(
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        # Sampling is left to the logits processor below, so that each row has its own generator.
        do_sample=False,
    )
    for batch in _batches_with_room(requests, batch_tokens, batch_size):
        settings.max_new_tokens = batch[0].room
        # Left padding, so that all answers start in the same column: shape (rows, longest prompt).
        # Batches are sorted by length, so the first prompt is the longest.
        width = len(batch[0].ids)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id, device=model.device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, width - len(request.ids) :] = 1
        # First, so that it sees the model's own scores.
        checked = NotANumber()
        processors = [checked, *([Sampled(sampler, [r.generator for r in batch])] if sampler else [])]
        watch = StoppingCriteriaList([AnswersSoFar(batch, width, stops, show)] if show else [])
        with torch.no_grad(), only_settings(settings, model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=watch,
            )
        checked.ensure_none(name_of(model))
        for request, answer in zip(batch, out[:, width:].tolist(), strict=True):
            # Rows that end earlier are filled with pad tokens up to the longest answer.
            request.add(answer, stops)
            yield request


class AnswersSoFar(StoppingCriteria):
    """Reports each answer of a batch after every token, and stops none.

    Args:
        batch: requests. width: tokens of the padded prompts. stops: ids that end an answer.
        show: called with an index and its tokens, the end token included.
    """

    def __init__(self, batch: list[Request], width: int, stops: set[int], show: Callable[[int, list[int]], None]):
        self.batch, self.width, self.stops, self.show, self.ended = batch, width, stops, show, set()

    def __call__(self, input_ids, scores, **_):
        for request, answer in zip(self.batch, input_ids[:, self.width :].tolist(), strict=True):
            if request.index not in self.ended:
                self.show(request.index, answer)
                if answer[-1] in self.stops:
                    self.ended.add(request.index)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _batches_with_room(requests: list[Request], batch_tokens: int, batch_size: int | None) -> list[list[Request]]:
    """`token_batches` of the prompts with room for complete answers; each of the others is batched alone."""
    # With a shared batch, a short answer limit of one prompt would cut the others' answers.
    most = max((r.room for r in requests), default=0)
    full = [r for r in requests if r.room == most]
    batches = token_batches([len(r.ids) + most for r in full], batch_tokens, batch_size)
    return [[r] for r in requests if r.room < most] + [[full[k] for k in batch] for batch in batches]


@contextmanager
def only_settings(settings, model):
    """Replace the model's generation config, so that none of its defaults (e.g. a repetition penalty) apply.

    `generate` fills fields that `settings` leaves unset from the model's own config.
    """
    # PEFT's generate copies its wrapper's config to the model, so both are replaced.
    holders = [m for m in (model, without_adapter_shell(model)) if hasattr(m, "generation_config")]
    originals = [m.generation_config for m in holders]
    for m in holders:
        m.generation_config = settings
    try:
        yield
    finally:
        for m, config in zip(holders, originals, strict=True):
            m.generation_config = config


def not_a_number(name: str) -> str:
    """The message for a model whose outputs are NaN."""
    return (
        f"{name}: the model's outputs are not numbers (NaN), so its weights are damaged or overflow in this precision;"
        " try --dtype float32 or bfloat16, or another checkpoint"
    )


class NotANumber(LogitsProcessor):
    """Remembers whether any score was NaN, on the device: a check per step would wait for the GPU."""

    def __init__(self):
        self.seen = None

    def __call__(self, input_ids, scores):
        seen = scores.isnan().any()
        self.seen = seen if self.seen is None else self.seen | seen
        return scores

    def ensure_none(self, name: str) -> None:
        """Raise UserError if a score was NaN: argmax and sampling would still give tokens."""
        if self.seen is not None and bool(self.seen):
            raise UserError(not_a_number(name))


def as_plain_text(messages: list[dict], tokenizer) -> list[dict]:
    """`messages` in which spelled-out special tokens are plain text (`neutralise`)."""
    return [{**m, "content": neutralise(m["content"], tokenizer)} for m in messages]
