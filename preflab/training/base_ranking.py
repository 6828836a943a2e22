"""How the base language model ranks the test pairs by likelihood: what a reward model must add to be worth training."""

import torch
from accelerate import PartialState
from transformers import AutoConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from preflab.models.fast import shared_prompt
from preflab.models.loading import identify, load_model, locate
from preflab.models.logprobs import attach_head, pair_batches, token_logps
from preflab.models.start_adapter import merge_start_adapter
from utils.cache import ResultCache, cache_key
from utils.errors import is_main_process
from utils.progress import progress
from utils.stage import print_main

SIDES = ("chosen", "rejected")


def rank_by_likelihood(training, splits) -> list[dict] | None:
    """Summed log-probabilities, in nats, of both answers of each test pair under the base; cached on disk.

    Called before the trainer is made, so that only one copy of the weights is in memory.

    Args:
        training: a TrainingRun with its tokenizer.

    Returns:
        `{"chosen", "rejected"}` per pair, in order; None without a test split, with --no_base_ranking, for a base that
        is a reward model itself, and where training shards a model that one device may not hold.
    """
    config, model_args = training.config, training.model_args
    if not splits.test or not config.base_ranking:
        return None
    if config.sharding is not None:
        training.notes.append("the base's likelihood ranking is left out: training shards the model")
        return None
    start = training.start_adapter
    if start and start.merged:
        merge_start_adapter(start, model_args.dtype, model_args.attn_implementation, config.trust_remote_code)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    revision = None if revision == "main" else revision
    settings = AutoConfig.from_pretrained(
        locate(name, revision), revision=revision, trust_remote_code=config.trust_remote_code
    )
    if not any("CausalLM" in kind or "ConditionalGeneration" in kind for kind in settings.architectures or []):
        training.notes.append(f"{name} is a reward model already, so it has no likelihood ranking")
        return None
    tokenizer, ids = training.tokenizer, splits.test_ids
    identity = {**identify(name, tokenizer, revision), "dtype": config.precision}
    cache = ResultCache(config.eval_out, "base-ranking", identity)
    keys = [cache_key(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in ids]
    missing = cache.own_share([i for i, key in enumerate(keys) if key not in cache.finished])
    if missing:
        options = (name, revision, config.dtype_name, model_args.attn_implementation)
        model = load_model(*options, trust_remote_code=config.trust_remote_code).to(PartialState().device).eval()
        with progress(len(missing), "likelihood of test pairs", "pair", leave=False) as bar:
            for rows, logps in likelihoods(model, tokenizer, ids, missing, config.per_device_eval_batch_size):
                for i, (chosen, rejected) in zip(rows, logps, strict=True):
                    cache.add(keys[i], {"chosen": chosen, "rejected": rejected})
                bar.update(len(rows) if is_main_process() else 0)
        del model
    cached = cache.gather()
    training.end_phase("base's ranking of test pairs")
    print_main(f"likelihood of {len(keys)} test pairs under {name}: {training.phases[list(training.phases)[-1]]:.0f} s")
    return [cached[key] for key in keys]


@torch.inference_mode()
def likelihoods(model, tokenizer, ids, rows: list[int], batch_size: int):
    """Yield (rows, [(chosen, rejected) log-probability in nats]) in batches, each pair's prompt computed once."""
    attach_head(model)
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    if shared_prompt.attach_if_known(model):
        collator = shared_prompt.PackingCollator(collator)
    for indices, batch in pair_batches(ids, collator, batch_size, rows):
        batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
        packed = {key: batch[key] for key in shared_prompt.KEYS if key in batch}
        inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        sums = token_logps(model, *inputs, **packed).double().sum(1)
        yield indices, list(zip(*(side.tolist() for side in sums.chunk(2)), strict=True))
