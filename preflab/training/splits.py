"""Both splits of a training run: read, filtered, checked for overlap, tokenised."""

from dataclasses import dataclass, field
from functools import cached_property

from datasets import Dataset

from preflab.data import conversations, preferences, thumbs
from preflab.data.conversations import ConversationData, SFTArguments
from preflab.data.preferences import DataArguments, PairFilters, PreferenceData
from preflab.data.prompt_format import PromptFormat
from preflab.data.sources import without_overlap
from preflab.training.dpo_config import DPORunConfig
from preflab.training.reward_config import RewardRunConfig
from preflab.training.sft_config import SFTRunConfig
from utils.errors import UserError
from utils.provenance import sha256_of


@dataclass
class Splits:
    """The train and the test split, as texts and as token ids in the same order.

    Attributes:
        test, test_ids: None where there is no test split.
        truncation: how many sequences of the train split were truncated, and where.
        held_out_rows: the rows of the test split as they were read, where they were held out of the train split; else
            None.
        facts: for run.json: what evaluations need to read the same rows in the same way.
    """

    train: PreferenceData | ConversationData
    train_ids: Dataset
    test: PreferenceData | ConversationData | None
    test_ids: Dataset | None
    truncation: dict[str, int]
    facts: dict = field(default_factory=dict)
    held_out_rows: list[dict] | None = None

    @cached_property
    def summary(self) -> dict:
        """Counts and provenance of both splits, for artifacts."""
        return {"train": self.train.summary(), "test": self.test.summary() if self.test else None}

    @property
    def is_text(self) -> bool:
        """Whether the model is trained on plain text only, without a chat template."""
        if isinstance(self.train, PreferenceData):
            return all(pair.messages is None for pair in self.train.pairs)
        return all(conversation.is_text for conversation in self.train.conversations)

    @property
    def kept_overlap(self) -> int:
        """How many train rows have prompts of the test split (--train_test_overlap keep)."""
        return self.train.dropped["prompt_in_test_split_kept"]

    @property
    def sha256(self) -> str:
        """One hash of all texts of both splits."""
        return sha256_of(*(split["text_sha256"] if split else "" for split in self.summary.values()))


def load_pair_splits(args: DataArguments, config: DPORunConfig, tokenizer) -> Splits:
    """Read, filter and tokenise the preference pairs of both splits; with `test_rows`, hold some out of train.

    Raises:
        UserError: unreadable rows, no rows left, prompts in both splits, or win probabilities that sppo needs.
    """
    train, test, held_out_rows, facts = _read_pairs(args, tokenizer)
    lengths, lists, test_ids = (config.max_length, config.max_prompt_length), config.uses_lists, None
    if test:
        test_ids, _ = preferences.tokenize(test, tokenizer, *lengths, desc="test", lists=lists)
    # Only the train split's truncation is reported.
    train_ids, truncation = preferences.tokenize(train, tokenizer, *lengths, desc="train", lists=lists)
    if lists:
        config.sequences_a_row = max(len(scores) for ids in (train_ids, test_ids) if ids for scores in ids["scores"])
    if "sppo" in config.loss_type:
        check_win_probabilities(train, "train")
        if test:
            check_win_probabilities(test, "test")
    return Splits(train, train_ids, test, test_ids, truncation, facts, held_out_rows)


def load_thumb_splits(args: DataArguments, config: DPORunConfig, tokenizer) -> Splits:
    """Read and tokenise the answers with thumbs of both splits, the train split in a random order of the run's seed.

    Raises:
        UserError: unreadable rows, no rows left, prompts in both splits, or filters that need pairs.
    """
    for flag in ("drop_ties", "min_score_margin", "lists"):
        if getattr(args, flag):
            raise UserError(f"--{flag}: rows with thumbs have one answer and no score; remove it")
    prompt_format = PromptFormat.of(args.prompt_format, tokenizer)
    train_sources, test_sources = args.sources()
    lengths = config.max_length, config.max_prompt_length
    train, test, test_ids, held_out_rows = (
        thumbs.load_thumbs(train_sources, prompt_format, args.limit),
        None,
        None,
        None,
    )
    if args.held_out_rows:
        test, held_out_rows = thumbs.hold_out_thumbs(train, args.held_out_rows, train_sources)
    elif test_sources:
        test = thumbs.load_thumbs(test_sources, prompt_format, args.limit)
        train.pairs = without_overlap(train.pairs, test.pairs, args.train_test_overlap, train.dropped)
    if test:
        test_ids, _ = thumbs.tokenize(test, tokenizer, *lengths, desc="test")
    thumbs.shuffle(train, config.seed)
    train_ids, truncation = thumbs.tokenize(train, tokenizer, *lengths, desc="train")
    facts = {"prompt_format": prompt_format.choice}
    return Splits(train, train_ids, test, test_ids, truncation, facts, held_out_rows)


def load_reward_splits(args: PairFilters, config: RewardRunConfig, tokenizer) -> Splits:
    """Read, filter and tokenise the pairs of both splits for a reward model, without those that are too long.

    Raises:
        UserError: as `load_pair_splits`; a pair without scores where the loss has margins.
    """
    train, test, held_out_rows, facts = _read_pairs(args, tokenizer)
    ids, truncation = {}, {}
    for name, data in (("test", test), ("train", train)):
        if data:
            # Without a limit: `drop_longer` removes what would be truncated.
            tokens, truncation = preferences.tokenize(data, tokenizer, None, None, desc=name)
            tokens = preferences.drop_longer(data, tokens, config.max_length, name)
            ids[name] = with_margins(data, tokens, config.margin_per_point)
    return Splits(train, ids["train"], test, ids.get("test"), truncation, facts, held_out_rows)


def with_margins(data: PreferenceData, ids: Dataset, per_point: float | None) -> Dataset:
    """The token ids with a column `margin`: `per_point` × (score_chosen - score_rejected). None adds no column.

    Raises:
        UserError: a pair without scores.
    """
    if per_point is None:
        return ids
    scores = [(pair.score_chosen, pair.score_rejected) for pair in data.pairs]
    missing = [pair.source for pair, pair_scores in zip(data.pairs, scores, strict=True) if None in pair_scores]
    if missing:
        raise UserError(f"{missing[0]}: --margin_per_point needs 'score_chosen' and 'score_rejected' in every row")
    return ids.add_column("margin", [per_point * (chosen - rejected) for chosen, rejected in scores])


def _read_pairs(args: PairFilters, tokenizer) -> tuple[PreferenceData, PreferenceData | None, list[dict] | None, dict]:
    """The pairs of both splits (train, test), the held-out rows, and facts, as `Splits` has them."""
    prompt_format = PromptFormat.of(args.prompt_format, tokenizer)
    filters = {
        "drop_ties": args.drop_ties,
        "min_score_margin": args.min_score_margin,
        "keep_duplicate_prompts": args.keep_duplicate_prompts,
        "prompt_format": prompt_format,
        "limit": args.limit,
    }
    train_sources, test_sources = args.sources()
    train, test, held_out_rows = preferences.load_pairs(train_sources, **filters), None, None
    if args.held_out_rows:
        test, held_out_rows = preferences.hold_out_pairs(train, args.held_out_rows, train_sources)
    elif test_sources:
        test = preferences.load_pairs(test_sources, **filters)
        # Overlapping prompts are removed from train, so that the test split is the same for every training set.
        train.pairs = without_overlap(train.pairs, test.pairs, args.train_test_overlap, train.dropped)
    return train, test, held_out_rows, {"prompt_format": prompt_format.choice}


def check_win_probabilities(data: PreferenceData, split: str) -> None:
    """Raise UserError, naming the first row, where a pair has no win probabilities between 0 and 1."""
    unusable = [p for p in data.pairs if any(w is None or not 0 <= w <= 1 for w in (p.win_chosen, p.win_rejected))]
    if unusable:
        raise UserError(
            f"{unusable[0].source}: --loss_type sppo needs 'win_chosen' and 'win_rejected' (probabilities from 0 to 1)"
            f" in every row of the {split} split; {len(unusable)} rows have none"
        )


def load_conversation_splits(args: SFTArguments, config: SFTRunConfig, tokenizer) -> Splits:
    """Read and tokenise the conversations of both splits; without a test split, hold out `test_rows` of them.

    Raises:
        UserError: unreadable rows, no rows left, or prompts in both splits.
    """
    train_sources, test_sources = args.sources()
    prompt_format = PromptFormat.of(args.prompt_format, tokenizer)
    train, test, test_ids = conversations.load_conversations(train_sources, args.limit, prompt_format), None, None
    if test_sources:
        test = conversations.load_conversations(test_sources, args.limit, prompt_format)
        overlap = args.train_test_overlap, train.dropped
        train.conversations = without_overlap(train.conversations, test.conversations, *overlap)
    # --dataset_test_split none (a value, not None) asks for no test split at all.
    elif args.dataset_test_split is None:
        test = conversations.hold_out(train, args.held_out_rows)
    if test:
        test_ids, _ = conversations.tokenize(test, tokenizer, args.loss_on, config.max_length, desc="test")
    train_ids, truncation = conversations.tokenize(train, tokenizer, args.loss_on, config.max_length, desc="train")
    return Splits(train, train_ids, test, test_ids, truncation, {"prompt_format": prompt_format.choice})
