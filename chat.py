"""Talk to base and tuned side by side in the terminal; votes become training data.

    python chat.py                                          # the latest run against its base
    python chat.py --run_name mine --system "Answer in one sentence." --temperature 0.7 --top_p 0.9
    python chat.py --prompt "Why is the sky blue?"          # one answer of each model, then the end
    python chat.py --file my_prompts.jsonl --vote --blind   # many; names hidden until the vote
    python chat.py --models other=FOLDER served=openai:gemma@http://localhost:8000/v1
    python chat.py --base_model FOLDER                      # one model alone
    python chat.py --score ann_votes.jsonl bob_votes.jsonl --pairs both.jsonl   # several people

A line is a message; /1 or /2 says which answer was better, /tie or /bad (both bad) neither; /new
starts over, /help lists all commands, Ctrl-D ends. Without a terminal, stdin has one message per
line. Answers are those of the evaluations: same template, same generation, same seeds.

Votes go to chat_pairs_votes.jsonl, and the preference pairs out of them to chat_pairs.jsonl in
<eval_out>/<run_name>/, which dpo_train_human_preference.py --dataset_name reads.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  models    --run_name NAME | --base_model ID with --adapter_path FOLDER or --tuned_model ID
            --base_run NAME (a run in the base's place)   --list (all runs with state and figures)
            --models name=FOLDER ...   (each of the models may be openai:MODEL@URL, a server)
  prompts   --system TEXT   --prompt TEXT | --file ID|FILE|hf://FILE (.txt: one prompt per line)
            --prompts_split NAME [test]   --limit N
            --history shared|own|none [shared] (shared: all models continue with the answer that was
            preferred, without a vote with that of the last model; own: each continues its own)
  generate  --max_new_tokens N [256]   --temperature X [0]   --top_k N [0] (0: all tokens)
            --top_p X [1]   --seed N [42]
  votes     --vote (wait for a vote after each prompt of --prompt and --file)   --blind
            --pairs FILE.jsonl   --annotator NAME [annotator]   --overwrite
            --score FILE ... (several people's votes into --pairs, without a chat)
            --min_agreement X [0.5] (share of a pair's votes that must prefer the chosen answer)
"""

from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import ComparisonArguments, GenerationArguments
from preflab.evaluation.run_list import print_runs
from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start


@dataclass
class ChatArguments(GenerationArguments):
    """Keys of this script."""

    system: str | None = option("System text of every conversation that has none.")
    prompt: str | None = option("Answer this prompt and stop.")
    file: str | None = option("Answer the prompts of a hub id, file or hf:// file (.txt: one per line) and stop.")
    prompts_split: str = option("Split of --file.", "test")
    models: list[str] | None = option("Further models, name=PATH or name=openai:MODEL@URL each.")
    top_k: int = option("Sample among this many most likely tokens; 0 for all.", 0)
    history: str = option(
        "What a conversation continues with: shared (the preferred answer, for all models), own or none.",
        "shared",
        choices=["shared", "own", "none"],
    )
    vote: bool = option("Wait for a vote after each prompt of --prompt and --file.", False)
    blind: bool = option("Hide the models' names, in random order, until the vote.", False)
    pairs: str | None = option("JSON lines file of the preference pairs (default: chat_pairs.jsonl of the run).")
    annotator: str = option("Name of the person who votes.", "annotator")
    min_agreement: float = option("Share of a pair's votes that must prefer the chosen answer.", 0.5)
    score: list[str] | None = option("Votes files to turn into --pairs, without a chat.")


def check(args, c) -> None:
    """Raise UserError for contradictory or out-of-range arguments."""
    args.check()
    c.refuse_output_json()
    if args.top_k < 0:
        raise UserError(f"--top_k {args.top_k}: must be at least 0")
    if args.prompt is not None and args.file is not None:
        raise UserError("--prompt and --file: give only one of them")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt: is empty; give the text of the prompt")
    if args.vote and args.prompt is None and args.file is None:
        raise UserError("--vote needs --prompt or --file: in a conversation, /1 and /2 vote at any time")
    if c.limit and args.file is None:
        raise UserError("--limit needs --file: it is the number of prompts")
    if not args.annotator.strip():
        raise UserError("--annotator: is empty; give a name")
    if args.score is not None and not (args.score and args.pairs):
        raise UserError("--score: give at least one votes file, and the file to write as --pairs")
    if args.score and (args.prompt is not None or args.file is not None):
        raise UserError("--score only turns votes into pairs: remove --prompt and --file")


def main():
    _, comparison_args, args = start("chat", __doc__, ComparisonArguments, ChatArguments, listing=print_runs)
    check(args, comparison_args)

    from preflab.chat.votes import VotesFile, score
    from preflab.judging.vote_pairs import check_agreement

    check_agreement(args.min_agreement)
    if args.score:
        return print(score(args.score, Path(args.pairs), args.min_agreement, comparison_args.overwrite))

    from preflab.chat.models import opened
    from preflab.chat.prompts import prompts_of
    from preflab.chat.screen import screen
    from preflab.chat.session import Session
    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.two_models import TwoModels
    from preflab.judging.answers import answering_models

    comparison = resolve(comparison_args, answers_only=True, alone=True)
    prompts = prompts_of(args, comparison_args)
    pairs_file = Path(args.pairs) if args.pairs else comparison.path("chat_pairs", ".jsonl")
    votes = VotesFile(pairs_file, args.annotator, args.min_agreement, comparison.name)
    models = TwoModels(comparison)
    answering = answering_models(models, args)
    with opened(models, answering, {**args.sampling(comparison_args.seed), "top_k": args.top_k}) as answer_of:
        session = Session(answer_of, screen(len(answer_of)), votes, args, comparison_args.seed)
        if prompts is None:
            session.converse()
        else:
            session.answer_all(prompts)
    print(votes.closing(), end="")


if __name__ == "__main__":
    run(main, "give fewer models, or --dtype bfloat16")
