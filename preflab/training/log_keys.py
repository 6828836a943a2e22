"""Keys of train_log.jsonl that this project adds to those of TRL's trainers."""

# Reward accuracy with a tie as half. TRL's own `rewards/accuracies` counts ties as wrong: at step 0, where all rewards
# are 0, it is 0 instead of 50%.
TIES_HALF = "rewards/accuracies_ties_half"
# Marks the means over pairs of an evaluation. TRL's own keys are means over batches, of which the last may be short.
PAIR_MEAN = "_pair_mean"
