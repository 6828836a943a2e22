"""Models that answer prompts. Answers are cached on disk by model, prompt and sampling settings."""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from preflab.data.chat_template import ChatRenderer, TemplateRefused
from preflab.data.prompts import Prompt
from preflab.evaluation.comparison import base_of, ensure_models_differ
from preflab.evaluation.servers import SERVER
from preflab.evaluation.two_models import TwoModels
from preflab.judging.endpoint_answers import EndpointModel
from preflab.judging.judges import notes_of
from preflab.models import vllm_engine
from preflab.models.adapter_files import adapter_sha256
from preflab.models.generation import generate
from preflab.models.loading import (
    BUILTIN,
    default_dtype,
    identify,
    load_model,
    load_tokenizer,
    locate,
    locate_adapter,
    tokenizer_home,
)
from preflab.models.vllm_environment import answer_settings
from utils.cache import ResultCache, cache_key
from utils.errors import UserError, is_main_process
from utils.progress import progress


@dataclass
class AnsweringModel:
    """A model that answers prompts; its weights are loaded when they are needed.

    Attributes:
        name: base, tuned, policy, or the NAME of `--models NAME=PATH`.
        identity: what its answers depend on; keys the cache.
        tokenizer: its tokenizer with the chat template.
        open: a function that returns a context manager over the loaded model.
        base: hub id or folder of the weights, for vLLM.
        adapter: LoRA folder on top of `base`, or None.
        remote_code: whether model code from the hub may run.
        endpoint: the server that answers in place of weights, or None; then `tokenizer` only counts tokens.
    """

    name: str
    identity: dict
    tokenizer: object
    open: object
    base: str = ""
    adapter: str | None = None
    remote_code: bool = False
    endpoint: EndpointModel | None = None


def base_and_tuned(models: TwoModels, args) -> list[AnsweringModel]:
    """The two models of a comparison. `args`: server_timeout, server_concurrency."""
    comparison = models.comparison
    answering = []
    for side in models.sides:
        if side in comparison.servers:
            answering.append(behind_server(side, comparison.servers[side], f"--{side}_model", models.tokenizer, args))
            continue
        base, _, adapter = comparison.weights(side)
        answering.append(
            AnsweringModel(
                side,
                models.answering_identity(side),
                models.tokenizers[side],
                # Bound per side: both sides share one pair of loaded models.
                lambda side=side: models.load().side(side),
                base,
                adapter,
                comparison.args.trust_remote_code,
            )
        )
    return answering


def behind_server(name: str, spec: str, flag: str, tokenizer, args) -> AnsweringModel:
    """A model behind a server. Its tokens are counted with `tokenizer`.

    Args:
        spec: openai:MODEL@URL. flag: what gave it. args: server_timeout, server_concurrency.
    """
    endpoint = EndpointModel(spec, flag, args)
    return AnsweringModel(name, endpoint.identity, tokenizer, None, endpoint=endpoint)


def policy_model(args) -> AnsweringModel:
    """The model that samples its own answers: a base model, with an adapter if --adapter_path is given, or a server.

    Args:
        args: model_name_or_path, model_revision, adapter_path, dtype, attn_implementation, chat_template_path,
            trust_remote_code, server_timeout, server_concurrency.
    """
    name, revision, device = args.model_name_or_path, args.model_revision, PartialState().device
    if name.startswith(SERVER):
        return behind_server("policy", name, "--model_name_or_path", load_tokenizer(BUILTIN), args)
    adapter = locate_adapter(args.adapter_path) if args.adapter_path else None
    dtype = args.dtype or default_dtype()
    home = tokenizer_home(name, revision, adapter)
    tokenizer = load_tokenizer(*home, args.chat_template_path, trust_remote_code=args.trust_remote_code)
    identity = {
        **identify(name, tokenizer, revision),
        # The key is part of existing caches' identities, so its name never changes.
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


def named_model(spec: str, models: TwoModels, args) -> AnsweringModel:
    """The model of `--models NAME=PATH`: a hub id, a model folder, a LoRA folder, whose config names its base, or
    openai:MODEL@URL for a model behind a server.

    It runs in the precision of base and tuned; the base of a LoRA folder is quantised like the base model.

    Args:
        args: server_timeout, server_concurrency.
    """
    name, equals, path = spec.partition("=")
    if not (name and equals and path) or name in models.sides:
        raise UserError(f"--models {spec}: expected name=PATH, with a name other than {' and '.join(models.sides)}")
    if path.startswith(SERVER):
        return behind_server(name, path, "--models", models.tokenizer, args)
    # Only local folders: a hub id is taken for a complete model.
    adapter = path if (Path(path) / "adapter_config.json").exists() else None
    base = (base_of(adapter) or models.comparison.base) if adapter else path
    args = models.comparison.args
    home = tokenizer_home(base, None, adapter)
    tokenizer = load_tokenizer(*home, args.chat_template_path, trust_remote_code=args.trust_remote_code)
    identity = models.identity_of(base, None, adapter, tokenizer, quantized=adapter is not None)

    @contextmanager
    def opened():
        model = models.load_one(base, None, adapter, quantized=adapter is not None)
        with models.autocasting():
            yield model

    return AnsweringModel(name, identity, tokenizer, opened, base, adapter)


def answering_models(models: TwoModels, args) -> list[AnsweringModel]:
    """Base, tuned and the models of `--models`. Raises UserError if two have the same name.

    Args:
        args: models, server_timeout, server_concurrency.
    """
    answering = [*base_and_tuned(models, args), *(named_model(spec, models, args) for spec in args.models or [])]
    names = [model.name for model in answering]
    if len(set(names)) < len(names):
        raise UserError(f"--models: two models have the same name ({', '.join(names)}); give each a different one")
    return answering


def answerable(answering: list[AnsweringModel], prompts: list[Prompt]) -> tuple[list[Prompt], int]:
    """The prompts that every model's chat template accepts, and how many were refused.

    Raises:
        UserError: every prompt was refused.
    """
    # A server renders with its own template, which is not known here.
    chats = [ChatRenderer(model.tokenizer) for model in answering if model.endpoint is None]
    accepted = []
    for prompt in prompts:
        try:
            for chat in chats:
                chat.prompt_text(prompt.messages)
            # Accepted only after every model's template: all models must answer the same prompts.
            accepted.append(prompt)
        except TemplateRefused as error:
            refusal = f"{prompt.source}: {error}"
    if not accepted:
        raise UserError(f"the chat template refuses all {len(prompts)} prompts; the last: {refusal}")
    return accepted, len(prompts) - len(accepted)


# Generation decodes one token per step over a key-value cache, so more tokens fit than in scoring. On a CPU, the part
# of the cache that is never written takes no memory, and many answers end long before their limit.
GENERATION_BATCH_FACTOR = {"cpu": 8}


def answer_all(
    model: AnsweringModel,
    prompts: list[Prompt],
    settings: dict,
    args,
    engine: str = "hf",
    vllm_args: list[str] | None = None,
) -> list[dict]:
    """One answer per prompt: `answer_each` with a single setting."""
    return answer_each(model, prompts, [settings], args, engine, vllm_args)[0]


def answer_each(
    model: AnsweringModel,
    prompts: list[Prompt],
    settings_list: list[dict],
    args,
    engine: str = "hf",
    vllm_args: list[str] | None = None,
) -> list[list[dict]]:
    """Answer every prompt under each of several settings, on every process.

    The prompts are sharded over the processes and answers cached one by one. The model is loaded once, and only if
    an answer is missing.

    Args:
        settings_list: max_new_tokens, temperature, top_p and seed of each setting.
        args: eval_out, overwrite; batch_tokens and batch_size, which affect speed only.
        engine: hf or vllm; the engines' answers differ, so they are cached apart.
        vllm_args: further settings of vLLM, KEY=VALUE each.

    Returns:
        Per setting, `{text, tokens, finish_reason}` of every prompt in order.
    """
    keys = [cache_key(prompt.messages) for prompt in prompts]
    factor = GENERATION_BATCH_FACTOR.get(PartialState().device.type, 4)
    batches = {"batch_tokens": factor * args.batch_tokens, "batch_size": args.batch_size}
    caches = []
    with ExitStack() as opened:
        generate_answers = None
        for number, settings in enumerate(settings_list, 1):
            # Opening a cache synchronises the processes, so each of them does it for every setting, even if its share
            # is empty.
            cache = _answer_cache(model, settings, args, engine, vllm_args)
            caches.append(cache)
            # By key, so that equal prompts are answered once.
            todo = list({key: i for i, key in enumerate(keys) if key not in cache.finished}.values())
            # Sorted by length, so that every process gets the same amount of work.
            todo.sort(key=lambda i: (-len(prompts[i].text), i))
            own = cache.own_share(todo)
            if not own:
                continue
            # Loaded at the first missing answer, and used for all later settings.
            generate_answers = generate_answers or opened.enter_context(engine_of(model, engine, vllm_args))
            title = f"{model.name} answers"
            title += f" {number}/{len(settings_list)}" if len(settings_list) > 1 else ""
            with progress(len(own), title, "prompt") as bar:
                for answer in generate_answers([prompts[i].messages for i in own], **settings, **batches):
                    # `index` counts within this process's share; answers come as they end, not in order.
                    cache.add(keys[own[answer.pop("index")]], answer)
                    bar.update()
    # After all settings: `gather` is a barrier, and one per setting would make fast processes wait each time.
    gathered = [cache.gather() for cache in caches]
    answers_of = [[answers[key] for key in keys] for answers in gathered]
    for note in answer_notes([answer for answers in answers_of for answer in answers]):
        if is_main_process():
            print(f"note: {model.name}: {note}", file=sys.stderr)
    return answers_of


def answer_notes(answers: list[dict]) -> list[str]:
    """What was given up to get answers (`notes_of`), and how many of them are empty."""
    empty = sum(not answer["text"].strip() for answer in answers)
    return [*notes_of(answers, "answers"), *([f"no text ({empty} of {len(answers)} answers)"] if empty else [])]


def _answer_cache(model: AnsweringModel, settings: dict, args, engine: str, vllm_args: list[str] | None) -> ResultCache:
    """The cache of a model's answers under one setting."""
    relevant = dict(settings)
    if not settings["temperature"]:
        # Greedy decoding does not depend on them.
        relevant |= {"top_p": None, "seed": None}
    if engine != "hf" and model.endpoint is None:
        # Absent for hf, so that the identity of its caches does not change.
        relevant["engine"] = engine
        relevant |= answer_settings(vllm_args)
    return ResultCache(args.eval_out, f"answers-{model.name}", {**model.identity, **relevant}, args.overwrite)


def answer_prompts_with_all(
    models: TwoModels, answering: list[AnsweringModel], prompts: list[Prompt], settings: dict
) -> dict[str, list[dict]]:
    """`answer_all` of every model, by name. Raises UserError if base and tuned gave identical answers."""
    answers = {}
    for model in answering:
        # Base and tuned are loaded together; free them before another model is loaded.
        if model.name not in models.sides:
            models.unload()
        answers[model.name] = answer_all(model, prompts, settings, models.comparison.args)
    models.unload()
    if len(models.sides) > 1:
        ensure_answers_differ(answers, models.comparison)
    return answers


def ensure_answers_differ(answers: dict[str, list[dict]], comparison) -> None:
    """Raise UserError if base and tuned gave the same answer to every prompt (`ensure_models_differ`)."""
    base, tuned = ([answer["text"] for answer in answers[side]] for side in ("base", "tuned"))
    ensure_models_differ(base == tuned, f"the same answer to all {len(base)} prompts", comparison)


def engine_name(model: AnsweringModel, engine: str) -> str:
    """What makes a model's answers: `engine`, or server."""
    return "server" if model.endpoint else engine


@contextmanager
def engine_of(model: AnsweringModel, engine: str, vllm_args: list[str] | None = None):
    """Load a model. Yields a function of (conversations, **settings) that generates answers with it.

    Args:
        engine: hf (preflab.models.generation) or vllm.
        vllm_args: further settings of vLLM.
    """
    if model.endpoint:
        yield lambda prompts, **settings: model.endpoint.generate(prompts, model.tokenizer, **settings)
    elif engine == "vllm":
        revision = model.identity["asked_revision"]
        # vLLM has no autocast: it computes in the dtype that autocast would use.
        dtype = model.identity["autocast"] or model.identity["dtype"]
        options = {"revision": revision, "trust_remote_code": model.remote_code}
        llm = vllm_engine.Engine(locate(model.base, revision), dtype, model.adapter, vllm_args, **options)
        try:
            yield lambda prompts, **settings: vllm_engine.generate(llm, model.tokenizer, prompts, **settings)
        finally:
            llm.close()
    else:
        with model.open() as loaded:
            yield lambda prompts, **settings: generate(loaded, model.tokenizer, prompts, **settings)


def given_answers(answers: list[str | None], tokenizer) -> list[dict | None]:
    """Answers read from a file in the form of generated ones; tokens are counted with `tokenizer`.

    finish_reason is None: it is not known.
    """
    return [text if text is None else _given_answer(text, tokenizer) for text in answers]


def _given_answer(text: str, tokenizer) -> dict:
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return {"text": text, "tokens": tokens, "finish_reason": None}
