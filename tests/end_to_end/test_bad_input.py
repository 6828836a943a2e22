"""Wrong flags and files of every stage: exit code 2 and one line that names the flag, the value or the file."""

import pytest
from conftest import assert_one_line
from stages import ITERATIONS, STAGES, assert_covers_all_scripts, run_stage

# Per stage: the arguments that are added to a small call, and what the error line must name.
CASES = {
    "dpo_train_human_preference.py": [
        (("--max_prompt_length", "64", "--max_length", "64"), ("--max_prompt_length 64", "--max_length 64")),
        (("--beta", "0"), ("--beta 0.0",)),
        (("--beta", "-1"), ("--beta -1.0",)),
        (("--beta", "nan"), ("--beta nan",)),
        (("--loss_type", "sigmoyd"), ("--loss_type sigmoyd", "sigmoid")),
        (("--loss_type", "dpo"), ("--loss_type dpo", "did you mean sigmoid (DPO)?")),
        (("--loss_type", "sigmoid", "ipoo"), ("--loss_type ipoo", "did you mean ipo?")),
        (("--loss_type", "exo_pair"), ("--label_smoothing",)),
        (("--num_train_epochs", "0"), ("--num_train_epochs",)),
        (("--limit", "0"), ("--limit",)),
        (("--load_in_4bit",), ("--use_peft",)),
        (("--lora_r", "4"), ("--lora_r", "--use_peft")),
        (("--f_divergence_type", "foo"), ("--f_divergence_type foo", "reverse_kl")),
        (("--sync_ref_model", "true"), ("--sync_ref_model",)),
        (("--ld_alpha", "0.5", "--precompute_ref_log_probs", "true"), ("--ld_alpha",)),
        (("--run_name", "../x"), ("--run_name",)),
        (("--resume_from_checkpoint", "x"), ("--resume",)),
        (("--global_batch_size", "0"), ("--global_batch_size",)),
    ],
    "sft_train_instruction.py": [
        (("--max_length", "0"), ("--max_length 0",)),
        (("--loss_type", "ntl"), ("--loss_type ntl", "did you mean nll?")),
        (("--assistant_only_loss", "true"), ("--assistant_only_loss", "--loss_on")),
        (("--test_rows", "-1"), ("--test_rows",)),
        (("--test_rows", "999"), ("--test_rows 999",)),
        (("--loss_on", "everythin"), ("--loss_on",)),
        (("--start_adapter", "x"), ("--start_adapter_use", "merge", "continue")),
        (("--packing", "true", "--packing_strategy", "wrapped"), ("--packing_strategy wrapped", "bfd")),
        (("--dataset_test_split", "test"), ("--test_rows", "--dataset_test_split test")),
        (("--chat_template_path", "nowhere.jinja"), ("nowhere.jinja",)),
        (("--published", "nowhere.yaml"), ("nowhere.yaml",)),
    ],
    "train_reward_model.py": [
        (("--margin_per_point", "-1"), ("--margin_per_point -1",)),
        (("--center_rewards_coefficient", "0"), ("--center_rewards_coefficient 0",)),
        (("--start_adapter", "x", "--start_adapter_use", "continue"), ("--start_adapter_use continue", "merge")),
        (("--max_length", "8"), ("--max_length 8", "raise it")),
        (("--neftune_noise_alpha", "5"), ("--neftune_noise_alpha",)),
        (("--sample_prompts", "3"), ("--sample_prompts 3",)),
        (("--center_rewards_coeficient", "0.1"), ("--center_rewards_coeficient",)),
    ],
    "eval_reward_model.py": [
        (("--scorer", "mm:x"), ("--scorer mm:x",)),
        (("--scorer", "columns"), ("--scorer columns",)),
        (("--scorer", "longer", "--against", "longer"), ("--against longer",)),
        (("--benchmark", "rewardbench"), ("--benchmark rewardbench", "--category_key")),
        (("--benchmark", "rewardbench2"), ("--benchmark rewardbench2",)),
        (("--most", "0"), ("--most 0",)),
        (("--dataset_name", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--best_of", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--run_name", "../x"), ("--run_name",)),
    ],
    "generate_preference_pairs.py": [
        (("--temperature", "0"), ("--temperature",)),
        (("--sampling_seeds", "3"), ("--sampling_seeds",)),
        (("--vllm_args", "half"), ("--vllm_args half", "KEY=VALUE")),
        (("--parts", "3"), ("--parts 3", "--part")),
        (("--parts", "3", "--part", "4"), ("--part",)),
        (("--split", "train_{part}"), ("--split train_{part}", "--part")),
        (("--test_prompts", "9"), ("--test_prompts 9",)),
        (("--scorer", "nobody"), ("--scorer nobody",)),
        (("--training_config", "nowhere.yaml"), ("nowhere.yaml",)),
        (("--model_name_or_path", "./nowhere"), ("./nowhere",)),
        (("--adapter_path", "./nowhere"), ("./nowhere",)),
        (("--dataset_name", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--limit", "0"), ("--limit 0",)),
        (("--max_new_tokens", "0"), ("--max_new_tokens 0",)),
    ],
    "eval_win_rate.py": [
        (("--run_name", "quickstart"), ("bash quickstart.sh", "quickstart")),
        (("--run_name", "nowhere"), ("nowhere",)),
        (("--adapter_path", "missing"), ("--adapter_path missing",)),
        (("--adapter_path", "x", "--tuned_model", "y"), ("--adapter_path", "--tuned_model")),
        (("--limit", "0"), ("--limit 0",)),
        (("--beta", "-1"), ("--beta -1",)),
        (("--max_length", "10", "--max_prompt_length", "10"), ("--max_prompt_length 10",)),
        (("--dataset_name", "gone.jsonl"), ("gone.jsonl",)),
        (("--expected", "gone.json"), ("gone.json",)),
        (("--no_such_flag", "1"), ("--no_such_flag",)),
        (("--split", "validation"), ("validation", "test", "train")),
    ],
    "eval_win_rate.py --battle": [
        (("--judge", "oracle"), ("--judge oracle",)),
        (("--judge", "openai:gpt"), ("--judge openai:gpt", "BASE_URL")),
        (("--judge", "longer", "--prompts", "gone.jsonl"), ("gone.jsonl",)),
        (("--judge", "longer", "--models", "nameless"), ("--models nameless", "name=PATH")),
        (("--judge", "longer", "--models", "base=x"), ("--models base=x", "tuned")),
        (("--judge", "longer", "--temperature", "-1"), ("--temperature",)),
        (("--judge", "longer", "--max_new_tokens", "0"), ("--max_new_tokens 0",)),
        (("--judge_prompt", "gone.yaml"), ("gone.yaml",)),
        (("--judge", "longer", "--published", "gone.yaml"), ("gone.yaml",)),
    ],
    "eval_perplexity.py": [
        (("--skip_pairs",), ("--skip_pairs", "--text_file")),
        (("--text_file", "gone.txt"), ("gone.txt",)),
        (("--text_dataset", "gone.jsonl"), ("gone.jsonl",)),
        (("--stride", "0"), ("--stride 0",)),
        (("--window", "16", "--stride", "17"), ("--stride 17", "--window 16")),
        (("--window", "1"), ("--window 1",)),
        (("--bos", "twice"), ("--bos", "once")),
    ],
    "run_alpacaeval_local.py": [
        (("--stage", "dream"), ("--stage", "generate")),
        (("--reference", "gone.jsonl"), ("gone.jsonl",)),
        (("--judge", "oracle"), ("--judge oracle",)),
        (("--vllm_args", "model=other"), ("--vllm_args model=other",)),
        (("--stage", "judge"), ("model_outputs_base.json", "--stage generate")),
        (("--stage", "score"), ("annotations_base.json", "--stage judge")),
        (("--temperature", "-1"), ("--temperature",)),
        (("--lc_resamples", "1"), ("--lc_resamples 1",)),
        (("--annotations", "gone.json"), ("gone.json",)),
        (("--annotations", "gone.json", "--limit", "3"), ("--annotations", "--limit")),
        (("--output_json", "x.json"), ("--output_json", "--output_dir")),
        (("--judge", "claude"), ("--judge claude", "pip install anthropic")),
        (("--published", "gone.yaml"), ("gone.yaml",)),
    ],
    "human_eval.py": [
        (("--pairs_per_prompt", "0"), ("--pairs_per_prompt 0",)),
        (("--repeat_share", "0.9"), ("--repeat_share 0.9", "0 to 0.5")),
        (("--key", "k.json"), ("--key", "--score")),
        (("--models", "dpo=x"), ("--models dpo",)),
        (("--output_json", "x.json"), ("--output_json", "--output_dir")),
        (("--max_new_tokens", "0"), ("--max_new_tokens 0",)),
        (("--score", "votes.json"), ("--score", "--run_name")),
    ],
    "run_lm_eval.sh": [
        (("--suite",), ("--suite", "usage: bash run_lm_eval.sh")),
        (("--suite", "nosuch"), ("--suite nosuch", "eq_bench, generated, nous")),
        (("--tasks", "quick_fact"), ("--tasks quick_fact", "quick_facts")),
        (("--sweet", "x"), ("--sweet", "--suite", "usage:")),
        (("--limit", "0", "--run-name", "r"), ("--limit 0",)),
        (("--limit", "1.5"), ("--limit 1.5", "integer")),
        (("--limit", "nan"), ("--limit nan",)),
        (("--tasks", " , "), ("--tasks", "no task")),
        (("--tasks", "quick_fact,", "--adapter-path", "nowhere"), ("--tasks quick_fact", "quick_facts")),
        (("--suite", "qick", "--adapter-path", "nowhere"), ("--suite qick", "did you mean quick")),
        (("--adapter-path", "nowhere"), ("--adapter_path", "nowhere")),
        (("--tasks", "arc_easy,quick_facts"), ("1 of 2 tasks", "--skip-missing")),
        (("--tasks", "arc_easy", "--skip-missing"), ("arc_easy",)),
    ],
    "run_sppo_iteration.sh": [
        (("x", "--name", "quickstart-sppo"), ("iteration x",)),
        (("0", "--name", "quickstart-sppo"), ("iteration 0",)),
        (("1",), ("--name",)),
        (("1", "--name", "nobody"), ("configs/nobody-iter1.yaml",)),
        (("4", "--name", "quickstart-sppo"), ("configs/quickstart-sppo-iter4.yaml",)),
        (("1", "--nome", "x"), ("--nome",)),
        (("1", "--name"), ("--name",)),
        (("1", "--name", "quickstart-sppo", "--launch", "nowhere.yaml"), ("nowhere.yaml",)),
        (("1", "--name", "quickstart-sppo", "--pairs", "--seed 3 --limit 8"), ("dataset_name",)),
    ],
    "run_online_iteration.sh": [
        (("1", "--name", "quickstart-sppo", "--loss", "dpo"), ("--loss dpo", "did you mean sigmoid (DPO)?")),
        (("1", "--name", "quickstart-sppo", "--loss"), ("--loss", "needs a value")),
        (("1", "--name", "nobody", "--loss", "sigmoid"), ("configs/nobody-iter1.yaml",)),
        (("1", "--name", "quickstart-sppo", "--beta", "2"), ("--beta", "--train")),
    ],
    "chat.py": [
        (("--file", "p.jsonl"), ("--prompt", "--file")),
        (("--top_k", "-1"), ("--top_k -1",)),
        (("--temperature", "-1"), ("--temperature -1",)),
        (("--history", "mine"), ("--history", "mine")),
        (("--limit", "3"), ("--limit", "--file")),
        (("--score", "gone.jsonl"), ("--score", "--pairs")),
        (("--pairs", "x.txt"), ("--pairs x.txt", ".jsonl")),
        (("--min_agreement", "1.5"), ("--min_agreement 1.5",)),
        (("--models", "x=openai:m"), ("--models", "openai:MODEL@BASE_URL")),
        (("--annotator", ""), ("--annotator",)),
    ],
    "report.py": [
        (("--runs", "nobody"), ("--runs nobody", "--list")),
        (("--runs", "r", "r"), ("--runs", "r is named twice")),
        (("--compare", "r"), ("--compare", "--baseline")),
        (("--compare", "r", "s"), ("--compare s",)),
        (("--compare", "r", "--baseline", "q"), ("--baseline q",)),
        (("--baseline", "r"), ("--baseline", "--compare")),
        (("--answers", "-1"), ("--answers -1",)),
        (("--status", "--compare", "r", "s"), ("--status", "--compare")),
        (("--published", "gone.yaml"), ("gone.yaml",)),
        (("--published", "configs/published/juanako-7b-v1.yaml"), ("--published", "juanako")),
    ],
    "release.py": [
        (("--run_name", "nobody"), ("--run_name nobody",)),
        (("--push", "me"), ("--push me", "OWNER/NAME")),
        (("--no_dry_run",), ("--no_dry_run", "--push")),
        (("--temperature", "-1"), ("--temperature -1",)),
        (("--top_k", "-1"), ("--top_k -1",)),
        (("--top_p", "2"), ("--top_p 2",)),
        (("--family", "gguf"), ("--family gguf", "LABEL=OWNER/NAME")),
        (("--tracker", "wandb"), ("--tracker wandb", "http")),
        (("--published", "gone.yaml"), ("gone.yaml",)),
        (("--merged",), ("r-merged", "merge_adapter.py")),
    ],
    "merge_adapter.py": [
        (("--tuned_model", "TINY", "--base_model", "TINY"), ("adapter",)),
        (("--dataset_name", "gone.jsonl"), ("gone.jsonl",)),
        (("--limit", "0"), ("--limit 0",)),
    ],
    "export_gguf.py": [
        (("--types", "F16", "Q4_KM"), ("--types Q4_KM", "did you mean Q4_K_M?")),
        (("--tuned_model", "TINY", "--adapter_path", "x"), ("--adapter_path", "--tuned_model")),
        (("--base_run", "other"), ("--base_run",)),
        (("--limit", "0"), ("--limit 0",)),
    ],
}


def nothing_to_load(inputs, folder):
    """A model and data that do not exist: a bad value is an error before either is looked for."""
    names = ("--model_name_or_path", "nobody/nothing", "--dataset_name", "nowhere")
    return [*names, "--output_dir", folder / "ck", "--eval_out", folder / "out"]


def test_every_script_has_bad_input():
    assert_covers_all_scripts(CASES)


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [(stage, *case) for stage, cases in CASES.items() for case in cases],
    ids=[f"{stage} {' '.join(flags)}" for stage, cases in CASES.items() for flags, _ in cases],
)
def test_bad_input(stage, flags, words, call, inputs, tmp_path):
    flags = [str(inputs.tiny) if flag == "TINY" else flag for flag in flags]
    base = nothing_to_load if stage == "dpo_train_human_preference.py" else STAGES[stage]
    args = list(map(str, base(inputs, tmp_path)))
    if "--judge" in flags and "--judge" in args:
        # Two would be a panel.
        place = args.index("--judge")
        del args[place : place + 2]
    code, out, err = run_stage(call, stage, *args, *flags)
    assert code == 2, out + err
    assert_one_line(err, *words)
    assert not list(tmp_path.rglob("lm_eval")), "lm_eval was not started"


@pytest.mark.parametrize("stage", sorted({stage.split()[0] for stage in STAGES}))
def test_bad_run_names_are_refused_at_the_start(stage, call):
    flags = ("1", "--name") if stage in ITERATIONS else ("--run_name",)
    for name in ("a\nb", "<b>x</b>"):
        code, out, err = run_stage(call, stage, *flags, name)
        assert (code, out) == (2, ""), err
        assert_one_line(err, flags[-1])
