"""Ranked lists on the engine of pairs: each row is one sequence [prompt | answer 1 | ... | answer N], the best first.

The implicit reward of an answer is r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)), as for pairs; the losses of
preflab.training.list_losses compare the rewards of all answers of a list. A list of two is a pair, with DPO's loss.
"""

import torch

from preflab.models.batching import pad_right
from preflab.models.logprobs import sum_logps
from preflab.training import list_losses
from preflab.training.dpo_trainer import ResumableDPOTrainer

# Keys of a batch that the model does not take.
NOT_FOR_THE_MODEL = ("completion_mask", "groups", "scores", "ref_logps")
# The column of the reference's log-probabilities, one per answer.
REFERENCE = "ref_logps"


class RankedListTrainer(ResumableDPOTrainer):
    """ResumableDPOTrainer on rows tokenised with `lists` (`data.preferences.tokenize`)."""

    SEQUENCES = (*ResumableDPOTrainer.SEQUENCES, ("prompt_ids", "others_ids"))
    KEYED = (*ResumableDPOTrainer.KEYED, "others_ids", "others_lengths")
    REFERENCE_COLUMNS = {"answers": REFERENCE}
    # Arrow's null: lists have different lengths.
    UNKNOWN = None

    def share_prompts(self, models: list, aux_loss: bool = False) -> None:
        # Here, because the packed layout is computed from the collated batch.
        self.data_collator = ListCollator(self.processing_class.pad_token_id or 0)
        super().share_prompts(models, aux_loss)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += ["others_ids", "others_lengths", "scores", REFERENCE]

    # ------------------------------------------------------------------------------------------------ micro-batches

    def rows_of_batch(self, batch: dict) -> int:
        """Number of lists in a collated batch."""
        return len(batch["groups"])

    def examples_of_batch(self, batch: dict) -> list[dict]:
        """The examples of a collated batch."""
        return examples_of(batch)

    def complete_batch(self, batch: dict) -> None:
        """Compute the reference of a list that the plan of training did not foresee."""
        if REFERENCE in batch and batch[REFERENCE].isnan().any():
            batch[REFERENCE] = self.reference_of_batch(batch)

    # -------------------------------------------------------------------------------------------------------- losses

    def _compute_loss(self, model, inputs, return_outputs):
        """The loss and the metrics of one batch of lists."""
        kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = model(**model_inputs(inputs), **kwargs, labels=labels, use_cache=False, fused_lm_head=True)
        # Both of shape (answers,); `logps` carries the policy's gradient.
        logps = sum_logps(output)
        reference = inputs[REFERENCE] if REFERENCE in inputs else self.reference_of_batch(inputs)
        self._last_scores = logps.detach().float(), reference
        self.check_sharded_step0(self.beta * (logps.detach() - reference))
        rewards, scores, answers = (
            padded(values, inputs["groups"]) for values in (self.beta * (logps - reference), inputs["scores"], logps)
        )
        given = padded(torch.ones_like(inputs["scores"]), inputs["groups"]).bool()
        name = self.loss_types[0]
        loss = self.loss_weights[0] * list_losses.LOSSES[name](rewards, scores, given).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        self._log_lists(rewards.detach(), answers.detach(), scores, given, inputs["attention_mask"])
        return (loss, output) if return_outputs else loss

    def _log_lists(self, rewards, logps, scores, given, attention_mask) -> None:
        """Log TRL's metrics, of the best (chosen) and the worst (rejected) answer, and those of complete lists.

        Args:
            rewards, logps, scores, given: shape (lists, answers), best answer first; `given` is False in padding.
        """
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        last = given.sum(1, keepdim=True) - 1
        (chosen, rejected), (chosen_logps, rejected_logps) = (
            (values[:, 0], values.gather(1, last)[:, 0]) for values in (rewards, logps)
        )
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            "lists/accuracies": list_losses.accuracy(rewards, scores, given),
        }
        for key, values in metrics.items():
            self._metrics[mode][key].append(self.accelerator.gather(values).mean().item())
        if mode == "train":
            self._log_accuracy_of(chosen, rejected)

    # -------------------------------------------------------------------------------------------------------- scores

    @torch.no_grad()
    def reference_of_batch(self, batch: dict):
        """Summed reference log-probabilities of all answers of a collated batch, float32, shape (answers,)."""
        inputs = {**model_inputs(batch), "completion_mask": batch["completion_mask"]}
        return torch.cat(super().reference_of_batch(inputs))

    def reference_values(self, batch: dict) -> list[dict]:
        """`{"answers": [...]}` of every list of a batch: its reference log-probabilities, best answer first."""
        values = self.reference_of_batch(batch).tolist()
        return [{"answers": [values[row] for row in rows]} for rows in batch["groups"]]

    def unknown_reference(self, row: dict) -> dict:
        """Columns with any value as the reference."""
        return {REFERENCE: [0.0] * len(row["scores"])}

    def scores_of_batch(self, captured: list, batch: dict):
        """Log-probabilities of the policy, then of the reference, shape (lists, 2 x most answers), NaN in padding."""
        # The lists of all processes need the same width.
        width = self.args.sequences_a_row
        return torch.cat([padded(values, batch["groups"], torch.nan, width) for values in self._last_scores], 1)

    def score_row(self, values: list[float]) -> dict:
        """The scores of a list: those of its best and its worst answer as of a pair, and all of them."""
        half = len(values) // 2
        # NaN is not equal to itself.
        answers, reference = ([x for x in side if x == x] for side in (values[:half], values[half:]))
        pair = {"chosen": answers[0], "rejected": answers[-1]}
        return {
            **pair,
            "ref_chosen": reference[0],
            "ref_rejected": reference[-1],
            "answers": answers,
            "ref_answers": reference,
        }


class ListCollator:
    """Tokenised lists as padded tensors, the answers of a list one after the other, from the best to the worst.

    Returns:
        input_ids, attention_mask, completion_mask, shape (answers, length), right-padded; scores and, where the rows
        have it, ref_logps, shape (answers,), NaN where it is unknown; groups: the rows of the batch of each list.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict:
        rows, groups = [], []
        for example in examples:
            answers = answers_of(example)
            groups.append(list(range(len(rows), len(rows) + len(answers))))
            rows += [(example["prompt_ids"], answer) for answer in answers]
        ids, attention = pad_right([[*prompt, *answer] for prompt, answer in rows], self.pad_token_id, "cpu")
        completion, _ = pad_right([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows], 0, "cpu")
        batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion, "groups": groups}
        batch["scores"] = torch.tensor([score for example in examples for score in example["scores"]])
        if REFERENCE in examples[0]:
            unknown = torch.nan
            values = [e[REFERENCE] or [unknown] * len(e["scores"]) for e in examples]
            batch[REFERENCE] = torch.tensor([value for row in values for value in row])
        return batch


def answers_of(row: dict) -> list[list[int]]:
    """The token ids of the answers of a tokenised row, from the best to the worst."""
    others, start = [], 0
    for size in row["others_lengths"]:
        others.append(row["others_ids"][start : start + size])
        start += size
    return [row["chosen_ids"], *others, row["rejected_ids"]]


def examples_of(batch: dict) -> list[dict]:
    """The examples of a collated batch, with their other columns."""
    ids, examples = batch["input_ids"].tolist(), []
    # Tokens of each row without padding, and of its answer.
    sizes, completions = batch["attention_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
    columns = {name: batch[name].tolist() for name in ("scores", REFERENCE) if name in batch}
    for rows in batch["groups"]:
        prompt = sizes[rows[0]] - completions[rows[0]]
        chosen, *others, rejected = (ids[row][prompt : sizes[row]] for row in rows)
        example = {
            "prompt_ids": ids[rows[0]][:prompt],
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "others_ids": [token for answer in others for token in answer],
            "others_lengths": [len(answer) for answer in others],
        }
        examples.append(example | {name: [values[row] for row in rows] for name, values in columns.items()})
    return examples


def model_inputs(batch: dict) -> dict:
    """What of a batch the model takes."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


def padded(values, groups: list[list[int]], padding: float = 0.0, width: int | None = None):
    """Values of answers, shape (answers,), as one row per list: shape (lists, width or most answers)."""
    width = width or max(map(len, groups))
    rows = [
        torch.nn.functional.pad(values[rows[0] : rows[-1] + 1], (0, width - len(rows)), value=padding)
        for rows in groups
    ]
    return torch.stack(rows)
