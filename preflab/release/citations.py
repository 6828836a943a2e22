"""BibTeX of what a run used: losses, methods, data, scorers, evaluations. Titles and years as on arXiv."""

ENTRIES = {
    "dpo": ("Rafailov, Rafael and others", "Direct Preference Optimization: Your Language Model is Secretly a Reward"
            " Model", 2023, "2305.18290"),
    "ipo": ("Azar, Mohammad Gheshlaghi and others", "A General Theoretical Paradigm to Understand Learning from Human"
            " Preferences", 2023, "2310.12036"),
    "simpo": ("Meng, Yu and Xia, Mengzhou and Chen, Danqi", "SimPO: Simple Preference Optimization with a"
              " Reference-Free Reward", 2024, "2405.14734"),
    "sppo": ("Wu, Yue and others", "Self-Play Preference Optimization for Language Model Alignment", 2024,
             "2405.00675"),
    "hinge": ("Zhao, Yao and others", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", 2023,
              "2305.10425"),
    "robust": ("Ray Chowdhury, Sayak and Kini, Anush and Natarajan, Nagarajan", "Provably Robust DPO: Aligning Language"
               " Models with Noisy Feedback", 2024, "2403.00409"),
    "exo_pair": ("Ji, Haozhe and others", "Towards Efficient Exact Optimization of Language Model Alignment", 2024,
                 "2402.00856"),
    "nca_pair": ("Chen, Huayu and others", "Noise Contrastive Alignment of Language Models with Explicit Rewards", 2024,
                 "2402.05369"),
    "bco_pair": ("Jung, Seungjae and others", "Binary Classifier Optimization for Large Language Model Alignment", 2024,
                 "2404.04656"),
    "apo": ("D'Oosterlinck, Karel and others", "Anchored Preference Optimization and Contrastive Revisions: Addressing"
            " Underspecification in Alignment", 2024, "2408.06266"),
    "lora": ("Hu, Edward J. and others", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"),
    "qlora": ("Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke", "QLoRA: Efficient"
              " Finetuning of Quantized LLMs", 2023, "2305.14314"),
    "ultrafeedback": ("Cui, Ganqu and others", "UltraFeedback: Boosting Language Models with Scaled AI Feedback", 2023,
                      "2310.01377"),
    "hh-rlhf": ("Bai, Yuntao and others", "Training a Helpful and Harmless Assistant with Reinforcement Learning from"
                " Human Feedback", 2022, "2204.05862"),
    "alpaca-gpt4": ("Peng, Baolin and others", "Instruction Tuning with GPT-4", 2023, "2304.03277"),
    "ultrachat": ("Ding, Ning and others", "Enhancing Chat Language Models by Scaling High-quality Instructional"
                  " Conversations", 2023, "2305.14233"),
    "pairrm": ("Jiang, Dongfu and Ren, Xiang and Lin, Bill Yuchen", "LLM-Blender: Ensembling Large Language Models with"
               " Pairwise Ranking and Generative Fusion", 2023, "2306.02561"),
    "armorm": ("Wang, Haoxiang and others", "Interpretable Preferences via Multi-Objective Reward Modeling and"
               " Mixture-of-Experts", 2024, "2406.12845"),
    "alpacaeval": ("Dubois, Yann and others", "Length-Controlled AlpacaEval: A Simple Way to Debias Automatic"
                   " Evaluators", 2024, "2404.04475"),
    "arena-hard": ("Li, Tianle and others", "From Crowdsourced Data to High-Quality Benchmarks: Arena-Hard and"
                   " BenchBuilder Pipeline", 2024, "2406.11939"),
}  # fmt: skip
# Software without a paper of its own.
LM_EVAL = """\
@software{lm-eval,
  author = {Gao, Leo and others},
  title  = {The Language Model Evaluation Harness},
  url    = {https://github.com/EleutherAI/lm-evaluation-harness}
}"""
TRL = """\
@software{trl,
  author = {von Werra, Leandro and others},
  title  = {{TRL: Transformers Reinforcement Learning}},
  url    = {https://github.com/huggingface/trl}
}"""
# TRL's names of losses; those that are missing have only the paper of DPO.
LOSSES = {
    "sppo_hard": "sppo", "sppo": "sppo", "simpo": "simpo", "ipo": "ipo", "hinge": "hinge", "robust": "robust",
    "exo_pair": "exo_pair", "nca_pair": "nca_pair", "bco_pair": "bco_pair", "apo_zero": "apo", "apo_down": "apo",
}  # fmt: skip
# Parts of names of data sets and scorers, in lower case.
NAMES = ("ultrafeedback", "hh-rlhf", "alpaca-gpt4", "ultrachat", "pairrm", "armorm")


def citations(stage: str, args: dict, names: list[str], stages: set[str]) -> str:
    """BibTeX entries of a run, in the order loss, method, data and scorer, evaluations, software.

    Args:
        stage: train or sft.
        args: of the training.
        names: of its data sets and scorers.
        stages: of its evaluations; `arena-hard` for battles with those prompts.
    """
    keys = [LOSSES.get(loss, "dpo") for loss in args.get("loss_type") or []] if stage == "train" else []
    # The papers of the other losses build on DPO's.
    keys += ["dpo"] if keys else []
    keys += ["lora"] if args.get("use_peft") else []
    keys += ["qlora"] if args.get("load_in_4bit") else []
    text = " ".join(names).lower().replace("alpaca_gpt4", "alpaca-gpt4")
    keys += [name for name in NAMES if name in text]
    keys += [name for name in ("alpacaeval", "arena-hard") if name in stages]
    entries = [bibtex(key) for key in dict.fromkeys(keys)]
    return "\n\n".join([*entries, *([LM_EVAL] if "lm_eval" in stages else []), TRL])


def bibtex(key: str) -> str:
    """One entry."""
    author, title, year, number = ENTRIES[key]
    return (
        f"@article{{{key}{year},\n  author  = {{{author}}},\n  title   = {{{{{title}}}}},\n"
        f"  journal = {{arXiv preprint arXiv:{number}}},\n  year    = {{{year}}}\n}}"
    )
