"""One report of everything in eval_out/: a page that opens from disk, and the same as Markdown.

    python report.py                                  # all runs: eval_out/report.html and .md
    python report.py --runs quickstart mine           # only these
    python report.py --compare lr5e-5 lr1e-4 lr2e-4   # paired differences from the first one
    python report.py --compare lr1e-4 --baseline sft  # from a run of another kind
    python report.py --status                         # what ran, what is stale, what to run next

report.html is one file without a server or network: a page for all runs and one per run, with the
question that each stage answers, base beside tuned with intervals, pictures, warnings, audits of
judges, answers side by side, lineage, time, memory and disk, and the command, commit and versions
behind every figure. Figures come from the JSON artifacts; a missing or damaged one is named, never
shown as 0. Also writes report.json and, of several training runs, report.png with their curves.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  runs     --runs NAME ... (default: all)   --list (all runs with state and figures)
           --checkpoints DIR [checkpoints]   --eval_out DIR [eval_out]
  compare  --compare NAME ...   --baseline NAME (default: the first of --compare)
           --published FILE [configs/published/comparison.yaml]   --seed N [42]
  output   --output_dir DIR (default: --eval_out)   --answers N [100] (prompts shown per stage)
  status   --status (prints only)

Differences are over the same rows of both runs, and Holm's correction is over all tests shown.
Figures made on other data, another base model or other settings are marked as not comparable.
"""

from functools import partial
from pathlib import Path

from preflab.evaluation.run_list import print_runs
from preflab.reporting.arguments import ReportArguments
from utils.errors import run
from utils.stage import start


def main():
    stage, args = start("report", __doc__, ReportArguments, listing=print_runs)
    args.check()

    from preflab.reporting import curves, page, published, stages, summary, view
    from preflab.reporting.artifacts import read_all, select
    from preflab.reporting.lineage import lineage
    from preflab.reporting.status import disk_lines, status_text
    from utils.artifacts import check_writable

    checkpoints, eval_out = Path(args.checkpoints), Path(args.eval_out)
    runs = read_all(checkpoints, eval_out)
    out = Path(args.output_dir or eval_out)
    if args.status:
        return print(status_text(select(runs, args.runs, "--runs"), checkpoints, eval_out, out / "report.html"))

    # Everything that can be wrong comes before the first file is written.
    rows = published.read_comparison(args.published)
    compared = summary.compare_runs(runs, args) if args.compare else None
    trees, runs = lineage(runs), select(runs, args.runs, "--runs")
    check_writable(out, "--output_dir" if args.output_dir else "--eval_out")

    content = view.report_view(runs, trees, rows, args.answers, f"PreferenceLab: {eval_out}", summary.made())
    content.disk = stages.Table(disk_lines(runs, checkpoints, eval_out))
    content.comparison = compared and compared.view
    logs = summary.curves_of(runs, content.problems)
    stage.publish(
        out / "report.json",
        {},
        compared.metrics if compared else {},
        summary.render(content, out / "report.html"),
        run={"run_name": None, "limit": None},
        seed=args.seed,
        figure=logs and partial(curves.draw, logs=logs, title=f"Training curves in {eval_out}"),
        files={
            out / "report.html": partial(summary.write_html, content, logs, args.answers),
            out / "report.md": page.markdown(content, out, out / "report.png" if logs else None),
        },
        problems=content.problems,
    )


if __name__ == "__main__":
    run(main)
