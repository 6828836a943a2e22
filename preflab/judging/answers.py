"""Answers of a model to prompts, cached on disk by model, prompt and settings."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from preflab.data.chat_template import ChatRenderer, TemplateRefused
from preflab.data.prompts import Prompt
from preflab.evaluation.comparison import base_of, ensure_models_differ
from preflab.evaluation.two_models import TwoModels
from preflab.models.generation import generate
from preflab.models.loading import (
    adapter_sha256,
    default_dtype,
    identify,
    load_model,
    load_tokenizer,
    locate_adapter,
    tokenizer_home,
)
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress


@dataclass
class AnsweringModel:
    """A model that answers: its name, what identifies its answers, its tokenizer, and `open()`, the loaded model."""

    name: str
    identity: dict
    tokenizer: object
    open: object
    base: str = ""
    adapter: str | None = None
    remote_code: bool = False


def base_and_tuned(models: TwoModels) -> list[AnsweringModel]:
    """Base and tuned."""
    c = models.comparison
    weights = {side: c.weights(side)[::2] for side in models.sides}
    remote = c.args.trust_remote_code
    return [
        AnsweringModel(
            side, models.identity(side), models.tokenizer, lambda s=side: models.load().side(s), *weights[side], remote
        )
        for side in models.sides
    ]


def policy_model(args) -> AnsweringModel:
    """The model that samples its own answers: a base, perhaps with an adapter.

    Args:
        args: model_name_or_path, model_revision, adapter_path, dtype, attn_implementation, chat_template_path,
            trust_remote_code.
    """
    from accelerate import PartialState

    name, revision, device = args.model_name_or_path, args.model_revision, PartialState().device
    adapter = locate_adapter(args.adapter_path) if args.adapter_path else None
    dtype = args.dtype or default_dtype()
    home = tokenizer_home(name, revision, adapter)
    tokenizer = load_tokenizer(*home, args.chat_template_path, trust_remote_code=args.trust_remote_code)
    identity = {
        **identify(name, tokenizer, revision),
        "asked_revision": revision,
        "adapter_sha256": adapter_sha256(adapter) if adapter else None,
        "dtype": dtype,
        "autocast": None,
        "attn_implementation": args.attn_implementation,
    }

    @contextmanager
    def opened():
        options = (revision, dtype, args.attn_implementation, None, adapter, args.trust_remote_code)
        yield load_model(name, *options).to(device).eval()

    return AnsweringModel("policy", identity, tokenizer, opened, name, adapter, args.trust_remote_code)


def named_model(spec: str, models: TwoModels) -> AnsweringModel:
    """The model of `name=path`: a hub id, a model's folder, or a LoRA folder, whose config names its base.

    It plays under the precision of base and tuned, and a LoRA folder on a base quantised as theirs.
    """
    name, equals, path = spec.partition("=")
    if not (name and equals and path) or name in models.sides:
        raise UserError(f"--models {spec}: expected name=PATH, with a name other than {' and '.join(models.sides)}")
    adapter = path if (Path(path) / "adapter_config.json").exists() else None
    base = (base_of(adapter) or models.comparison.base) if adapter else path
    tokenizer = load_tokenizer(*tokenizer_home(base, None, adapter), models.comparison.args.chat_template_path)
    identity = models.identity_of(base, None, adapter, tokenizer, quantized=adapter is not None)

    @contextmanager
    def opened():
        model = models.load_one(base, None, adapter, quantized=adapter is not None)
        with models.autocasting():
            yield model

    return AnsweringModel(name, identity, tokenizer, opened, base, adapter)


def answering_models(models: TwoModels, further: list[str] | None) -> list[AnsweringModel]:
    """Base, tuned and every `name=path` of `further`. Raises UserError where two have one name."""
    answering = [*base_and_tuned(models), *(named_model(spec, models) for spec in further or [])]
    names = [answerer.name for answerer in answering]
    if len(set(names)) < len(names):
        raise UserError(f"--models: two models have one name ({', '.join(names)}); give each its own")
    return answering


def answerable(answering: list[AnsweringModel], prompts: list[Prompt]) -> tuple[list[Prompt], int]:
    """The prompts that every model's chat template takes, and how many were refused."""
    chats = [ChatRenderer(answerer.tokenizer) for answerer in answering]
    kept = []
    for prompt in prompts:
        try:
            for chat in chats:
                chat.prompt_text(prompt.messages)
            kept.append(prompt)
        except TemplateRefused as error:
            refusal = f"{prompt.source}: {error}"
    if not kept:
        raise UserError(f"the chat template refuses all {len(prompts)} prompts; the last: {refusal}")
    return kept, len(prompts) - len(kept)


# Answers are decoded a token at a time over a cache: far more tokens fit than in a scoring pass.
GENERATION_BUDGET = 4


def answer_all(answerer: AnsweringModel, prompts: list[Prompt], sampling: dict, args, engine: str = "hf") -> list[dict]:
    """One answer a prompt: `answer_each` under one setting."""
    return answer_each(answerer, prompts, [sampling], args, engine)[0]


def answer_each(
    answerer: AnsweringModel, prompts: list[Prompt], samplings: list[dict], args, engine: str = "hf"
) -> list[list]:
    """`{text, tokens, finish_reason}` of every prompt, in order, under each setting, on every process.

    The work is sharded, and kept batch by batch; the model is loaded once, and only where something is left to answer.

    Args:
        samplings: max_new_tokens, temperature, top_p and seed of each setting, which decide an answer.
        args: eval_out, overwrite and the batch sizes, which decide nothing but the speed.
        engine: hf or vllm; answers of one are never taken for those of the other.
    """

    keys = [cache_key(prompt.messages) for prompt in prompts]
    batches = {"batch_tokens": GENERATION_BUDGET * args.batch_tokens, "batch_size": args.batch_size}
    caches = []
    with ExitStack() as opened:
        answers = None
        for number, sampling in enumerate(samplings, 1):
            cache = _answer_cache(answerer, sampling, args, engine)
            caches.append(cache)
            todo = list({key: i for i, key in enumerate(keys) if key not in cache.finished}.values())
            # Dealt out by length, so that every process gets as much to do.
            todo.sort(key=lambda i: (-len(prompts[i].text), i))
            mine = cache.own_share(todo)
            if not mine:
                continue
            answers = answers or opened.enter_context(engine_of(answerer, engine))
            what = f"{answerer.name} answers" + (f" {number}/{len(samplings)}" if len(samplings) > 1 else "")
            with progress(len(mine), what, "prompt") as bar:
                for answer in answers([prompts[i].messages for i in mine], **sampling, **batches):
                    cache.add(keys[mine[answer.pop("index")]], answer)
                    bar.update()
    found = [cache.gather() for cache in caches]
    return [[one[key] for key in keys] for one in found]


def _answer_cache(answerer: AnsweringModel, sampling: dict, args, engine: str) -> ResultCache:
    """Where a player's answers under one setting are kept."""
    decisive = dict(sampling)
    if not sampling["temperature"]:
        decisive |= {"top_p": None, "seed": None}
    if engine != "hf":
        decisive["engine"] = engine
    return ResultCache(args.eval_out, f"answers-{answerer.name}", {**answerer.identity, **decisive}, args.overwrite)


def answer_prompts_with_all(
    models: TwoModels, answering: list[AnsweringModel], prompts: list[Prompt], sampling: dict
) -> dict[str, list]:
    """`answer_all` of every answerer, by name; raises UserError where base and tuned answered everything alike."""
    answers = {}
    for answerer in answering:
        if answerer.name not in models.sides:
            models.unload()
        answers[answerer.name] = answer_all(answerer, prompts, sampling, models.comparison.args)
    models.unload()
    ensure_adapter_applied(answers)
    return answers


def ensure_adapter_applied(answers: dict[str, list[dict]]) -> None:
    """Raise UserError where base and tuned answered every prompt alike: the adapter was not applied."""
    base, tuned = ([answer["text"] for answer in answers[side]] for side in ("base", "tuned"))
    ensure_models_differ(base == tuned, f"the same answer to all {len(base)} prompts")


@contextmanager
def engine_of(answerer: AnsweringModel, engine: str):
    """What answers prompts with this answerer: the generation loop, or vLLM."""
    if engine == "vllm":
        from preflab.models import vllm_engine
        from preflab.models.loading import locate

        about = answerer.identity
        options = {"revision": about["asked_revision"], "trust_remote_code": answerer.remote_code}
        where = locate(answerer.base, about["asked_revision"])
        llm, lora = vllm_engine.load_engine(where, about["autocast"] or about["dtype"], answerer.adapter, **options)
        try:
            yield lambda prompts, **settings: vllm_engine.generate(llm, lora, answerer.tokenizer, prompts, **settings)
        finally:
            vllm_engine.close(llm)
    else:
        with answerer.open() as model:
            yield lambda prompts, **settings: generate(model, answerer.tokenizer, prompts, **settings)


def given_answers(answers: list[str | None], tokenizer) -> list[dict | None]:
    """Answers from a file in the same form, counted with `tokenizer`; how they ended is not known."""
    return [
        None
        if text is None
        else {
            "text": text,
            "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            "finish_reason": None,
        }
        for text in answers
    ]
