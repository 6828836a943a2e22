"""One training run from the command line to its artifacts: the part that the DPO and the SFT script share."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config

from preflab.data.template_date import choose_template_date, template_date
from preflab.evaluation.runs import HELD_OUT_ROWS
from preflab.models.card import model_card
from preflab.models.checks import check_ids, check_length, fit_pad_token, largest_and_longest
from preflab.models.loading import (
    describe,
    identify,
    load_adapter,
    load_for_training,
    load_tokenizer,
    locate,
    quantised_as,
)
from preflab.models.start_adapter import StartAdapter, merge_start_adapter, resolve_start_adapter
from preflab.training.hub_uploads import HubUploads
from preflab.training.lora_targets import check_targets
from preflab.training.memory import free_bytes
from preflab.training.memory_parts import Weights
from preflab.training.next_steps import next_commands
from preflab.training.plan import part_of_epoch
from preflab.training.planner import publish_plan
from preflab.training.preflight import run_preflight
from preflab.training.preflight_checks import refuse_fatal
from preflab.training.run_config import RunConfig, check_run_config, fit_global_batch, unsharded_base
from preflab.training.run_folder import (
    Launch,
    RunFolders,
    checkpoint_to_resume,
    claim_run,
    launch_of,
    run_identity,
)
from preflab.training.sharding import Shards
from preflab.training.splits import Splits
from preflab.training.throughput import (
    REFERENCE_OPERATIONS,
    STEP_OPERATIONS,
    model_flops,
    model_flops_utilisation,
    slower_than_float32,
)
from preflab.training.training_table import first_and_last_tenth
from preflab.training.universal_checkpoint import convert, load_converted
from utils import stage as stages
from utils.artifacts import RowFile, all_arguments, read_json, read_published, write_json, write_rows
from utils.cli import run_name
from utils.distributed import keep_fsdp_on_cpu, on_main_process, settle_launch
from utils.errors import Stopped, UserError, exit_code, first_line, is_main_process
from utils.stage import Report, Stage, print_main
from utils.tables import paragraphs, terminal_width


@dataclass
class TrainingRun:
    """A training run: its arguments, its folders, and what it starts from.

    Attributes:
        stage: name in artifacts ("train" for preference training, "sft", "reward_model"), arguments and clock.
        data_args: which rows are trained on.
        config: the stage's RunConfig; `output_dir` is the run's own folder once the run is open.
        model_args: TRL's ModelConfig; names the merged model where a start adapter is merged.
        folders: where weights and results go, locked for this process.
        checkpoint: the checkpoint that training continues from, or None.
        start_adapter: the adapter that training starts from, or None.
        published: published results for the model card, or None.
        notes: sentences that the preflight shows.
        uploads: to the hub, or None.
        tokenizer: None until `load_splits`.
        phases: {name of a phase before the first step: its seconds}, in order.
    """

    stage: Stage
    data_args: object
    config: RunConfig
    model_args: ModelConfig
    folders: RunFolders
    checkpoint: Path | None
    start_adapter: StartAdapter | None
    published: dict | None
    notes: list[str]
    uploads: HubUploads | None
    tokenizer: object = None
    phases: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, page: str, data_type: type, config_type: type) -> "TrainingRun":
        """Parse and check the command line, then claim the run's folders, before anything large is loaded.

        With --plan it prints the plan instead and exits.

        Args:
            name: the stage's name in artifacts.
            page: the script's docstring.
            data_type, config_type: dataclasses of the data arguments and of the RunConfig, each with `check`.

        Raises:
            UserError: bad arguments, or folders that belong to something else.
        """
        launch_notes = settle_launch()
        stage, data_args, config, model_args = stages.start(
            name, page, data_type, config_type, ModelConfig, runs_bare=False
        )
        check_run_config(config, model_args)
        data_args.check()
        config.check()
        config.adapt_data(data_args)
        suffix = "-".join(config.objectives)
        if config.plan is not None:
            planned = run_name(config.run_name, model_args.model_name_or_path, suffix, data_args.limit)
            publish_plan(stage, data_args, config, model_args, planned)
            sys.exit(0)
        # Making the config has set accelerate's state; the trainer is not made yet.
        keep_fsdp_on_cpu()
        notes = launch_notes + fit_global_batch(config) + unsharded_base(config, model_args)
        published = read_published(config.published, list) if config.published else None
        # Before resolve_start_adapter, which replaces the model's name by that of the merged folder.
        config.run_name = run_name(config.run_name, model_args.model_name_or_path, suffix, data_args.limit)
        # A wrong model or adapter name fails here, before the data are read.
        locate(model_args.model_name_or_path, model_args.model_revision)
        # With `merge`, model_args names the merged folder from here on; it is written in `build_trainer`.
        start_adapter = resolve_start_adapter(config, model_args)
        global_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
        identity = run_identity(stage.arguments, global_batch) | (start_adapter.identity() if start_adapter else {})
        claim = (config.run_name, config.output_dir, config.eval_out, identity, config.resume, config.overwrite)
        # Rank 0 claims the folders and checks the checkpoint; its error is raised on every rank.
        folders = on_main_process(lambda: claim_run(*claim))
        checkpoint = None if folders.finished else checkpoint_for(folders, config, notes)
        uploads = HubUploads(config, model_args.model_name_or_path) if config.push_to_hub else None
        if uploads and not (config.preflight_only or folders.finished):
            # A missing login shows here, before a model is loaded.
            on_main_process(uploads.create)
        # The trainer writes its checkpoints below output_dir; identity and claim above use the parent folder.
        config.output_dir = str(folders.weights)
        run = cls(stage, data_args, config, model_args, folders, checkpoint, start_adapter, published, notes, uploads)
        run.end_phase("start")
        return run

    def end_phase(self, name: str) -> None:
        """Record the time since the last phase, or since the script started, under `name`."""
        self.phases[name] = round(self.stage.seconds - sum(self.phases.values()), 1)

    @property
    def row_log(self) -> RowFile:
        """One row per logged step."""
        return RowFile(self.folders.results / "train_log.jsonl")

    @property
    def continues_adapter(self) -> bool:
        """Whether the start adapter itself is trained further."""
        return self.start_adapter is not None and self.start_adapter.use == "continue"

    def print_results(self) -> None:
        """Print the results of a finished run.

        Raises:
            UserError: local data files changed since it was trained.
        """
        results = read_json(self.folders.results / "train.json")
        self.folders.ensure_data_unchanged(results["data"])
        print_main(
            f"{self.folders.weights} is finished, nothing to train; from {self.folders.results}/train.json:\n\n"
            f"{results['text']}"
        )
        self.print_next(held_out="pairs" in (results["data"].get("test") or {}))

    def load_splits(self, load: Callable[..., Splits]) -> Splits:
        """Load the tokenizer and both splits, and tie the run to its data.

        Args:
            load: `load_pair_splits`, `load_reward_splits` or `load_conversation_splits`.
        """
        home = self.model_args.model_name_or_path, self.model_args.model_revision
        self.tokenizer = load_tokenizer(
            *(self.start_adapter.tokenizer if self.start_adapter else home),
            # TRL's SFTConfig has this key; for pairs it is one of the data arguments.
            all_arguments([self.data_args, self.config])["chat_template_path"],
            trust_remote_code=self.config.trust_remote_code,
        )
        # Fixed before the first row is rendered, and stored, so that resume and evaluations render the same prompts.
        choose_template_date(on_main_process(lambda: self.folders.template_date(self.config.template_date)))
        splits = load(self.data_args, self.config, self.tokenizer)
        day = template_date(self.tokenizer.chat_template)
        self.folders.record_data_hash(splits.sha256, **splits.facts, **({"template_date": day} if day else {}))
        self.notes += [f"the chat template prints a date: {day} in this run and in its evaluations"] if day else []
        if splits.held_out_rows is not None:
            # Beside the weights: evaluations read these rows as the run's test split, wherever the folder is moved.
            write_rows(self.folders.weights / HELD_OUT_ROWS, splits.held_out_rows)
        self.end_phase("rows")
        return splits

    def build_trainer(self, trainer_type: type, splits: Splits):
        """Load the policy (and a reference model where one is kept) and make the trainer.

        Whether memory requires gradient checkpointing is decided here and added to the notes.

        Raises:
            UserError: the model or its arguments cannot be used.
        """
        config, model_args, start = self.config, self.model_args, self.start_adapter
        if start and start.merged:
            merge_start_adapter(start, model_args.dtype, model_args.attn_implementation, config.trust_remote_code)
        model = (model_args.model_name_or_path, self.tokenizer, model_args.model_revision)
        on_main_process(lambda: self.folders.record_model(identify(*model)))
        if splits.test_ids is None:
            # transformers refuses an evaluation strategy without an evaluation dataset.
            config.eval_strategy = "no"
        keeps_reference = config.keeps_reference_model(model_args.use_peft)
        try:
            policy = load_for_training(config, model_args)
            if model_args.use_peft and not self.continues_adapter:
                check_targets(policy, model_args)
            # {split: (its largest token id, tokens of its longest sequence)}.
            sizes = {
                name: largest_and_longest(ids, trainer_type.SEQUENCES)
                for name, ids in (("train", splits.train_ids), ("test", splits.test_ids))
                if ids is not None
            }
            # Decided before the trainer is made, since its constructor reads gradient_checkpointing.
            weights = Weights.of(policy.config, config, model_args)
            note = config.fit_memory(
                weights,
                config.largest_row(splits.train_ids),
                sizes["train"][1],
                free_bytes(policy),
                Shards.of_run(config),
            )
            self.notes += [note] if note else []
            if self.continues_adapter:
                # The loaded adapter becomes the policy; TRL freezes a copy of it as the reference.
                policy = load_adapter(policy, start.adapter, is_trainable=True)
            self._check_model_reads(policy, sizes)
            return trainer_type(
                model=policy,
                # SFTTrainer has no argument ref_model, so the key is passed only with a reference.
                **({"ref_model": load_for_training(config, model_args)} if keeps_reference else {}),
                args=config,
                train_dataset=splits.train_ids,
                eval_dataset=splits.test_ids,
                processing_class=self.tokenizer,
                # With a LoRA config TRL would add a second, new adapter to the loaded one.
                peft_config=None if self.continues_adapter else get_peft_config(model_args),
                row_log=self.row_log,
            )
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{model_args.model_name_or_path}: {first_line(error)}") from error

    def _check_model_reads(self, policy, sizes: dict[str, tuple[int, int]]) -> None:
        """Raise UserError, before the first forward, for token ids or lengths that the model cannot read.

        Args:
            sizes: of `largest_and_longest`, by split.
        """
        fit_pad_token(policy, self.tokenizer)
        for name, (largest, longest) in sizes.items():
            check_ids(policy, self.tokenizer, largest)
            check_length(policy, longest, "--max_length {}", f"the longest sequence of the {name} split")
        if getattr(self.config, "packing", False):
            check_length(policy, self.config.max_length, "--max_length {}", "a packed row")

    def preflight(self, trainer, splits: Splits, describe_rows) -> dict:
        """Check everything that can be known before the first step; write preflight.json and print it.

        Args:
            describe_rows: of preflab.training.preflight: `describe_pairs`, `describe_reward_pairs` or
                `describe_conversations`.

        Raises:
            UserError: a fatal finding, without --allow_fatal.
        """
        self.end_phase("model")
        if self.start_adapter:
            self.notes.append(self.start_adapter.summary())
        if self.config.use_cpu and self.config.precision != "fp32":
            slow = slower_than_float32(self.config.dtype_name, "cpu")
            self.notes += [slow] if slow else []
        flight, text = run_preflight(describe_rows, trainer, splits, self.stage.arguments, self.notes)
        write_json(self.folders.results / "preflight.json", flight)
        print_main(text)
        self.end_phase("preflight")
        # The preflight is what was requested then: its files stay, with a fatal finding too.
        self.folders.keep_preflight = self.config.preflight_only
        refuse_fatal(flight, self.config.allow_fatal)
        return flight

    def describe_preflight_only(self) -> str:
        """What --preflight_only leaves, and how to continue."""
        return paragraphs(
            f"preflight only, nothing trained; it left {self.folders.results}/preflight.json and"
            f" {self.folders.weights}/run.json. The same command without --preflight_only trains; other settings may"
            f" take the name {self.config.run_name} too."
        )

    def describe_model(self, trainer) -> dict:
        """Name, revision and hashes of the model and its tokenizer."""
        model_args = self.model_args
        return describe(model_args.model_name_or_path, trainer.model, self.tokenizer, model_args.model_revision)

    def model_identity(self, trainer) -> dict:
        """What identifies the untrained model in a cache of its log-probabilities."""
        identity = {
            **self.describe_model(trainer),
            **quantised_as(self.model_args),
            "precision": self.config.precision,
        }
        # A merged adapter is part of the described weights.
        return identity | ({"start": self.start_adapter.describe()} if self.continues_adapter else {})

    def train(self, trainer, flight: dict) -> None:
        """Train to the last step and save the weights.

        Where a signal stopped it, it exits after a checkpoint, with `utils.errors.exit_code`.

        Args:
            flight: the preflight; gets the step-0 figures of a sharded model, which exist only now.
        """
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.phases.items())
        print_main(paragraphs(f"before training: {phases}", width=terminal_width()))
        if self.checkpoint:
            print_main(f"resuming from {self.checkpoint}")
        trainer.continue_from(self.checkpoint)
        if self.uploads:
            trainer.add_callback(self.uploads)
        with trainer.stopper:
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if trainer.stopper.stopped_by:
            print_main(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in"
                f" {self.folders.weights}; the same command (without --overwrite) continues from there"
            )
            sys.exit(exit_code(trainer.stopper.stopped_by))
        trainer.save_model(self.config.output_dir)
        if trainer.stopper.received:
            # It arrived after the last step. The evaluation of the end can take longer than a cluster waits.
            raise Stopped(trainer.stopper.received)
        if trainer.step0_reward is not None:
            measured = {"largest_reward": trainer.step0_reward, "checked": "on the first micro-batch of training"}
            flight["step0"] |= measured
            write_json(self.folders.results / "preflight.json", flight)

    def title(self, splits: Splits, unit: str) -> str:
        """The title of tables and pictures. `unit`: what a row is, in the plural."""
        method = "LoRA" if self.model_args.use_peft else "full fine-tuning"
        names = {"sft": "SFT", "reward_model": "reward model"}
        objective = names.get(self.stage.name) or "+".join(self.config.objectives)
        model = self.model_args.model_name_or_path
        return f"{self.config.run_name}: {model}, {method}, {objective}, {len(splits.train_ids)} {unit}"

    def publish(
        self,
        trainer,
        splits: Splits,
        flight: dict,
        metrics: dict,
        rows: list[dict],
        report: Report,
        *,
        title: str,
        curves: Callable[[Path, list[dict], str, str | None], None],
        curves_name: str,
        training: dict,
        flight_keys: tuple[str, ...],
    ) -> None:
        """Write rows, curves, model card and last train.json, which declares the run complete. Rank 0 only.

        Args:
            title: the title of the curves.
            curves: draws the rows of train_log.jsonl under `title` and the report's warning, and saves the picture.
            training: train.json's section on the training itself.
            flight_keys: sections of the preflight that train.json repeats.
        """
        if not is_main_process():
            return
        results, log = self.folders.results, self.row_log.read()
        if part := part_of_epoch(flight["plan"]):
            report.text = f"{report.text}\n\n{part}"
            report.printed = report.printed and f"{report.printed}\n\n{paragraphs(part, width=terminal_width())}"
        summary = self.stage.summary(
            self.describe_model(trainer),
            metrics,
            report,
            run={"run_name": self.config.run_name, "limit": self.data_args.limit},
            seed=self.config.seed,
            training={**training, "seconds_before": self.phases},
            **{key: flight[key] for key in ("plan", "dropout", "precision", "parameters", *flight_keys)},
            start=self.start_adapter.describe() if self.start_adapter else None,
            published=self.published,
            data=splits.summary,
        )
        # A training run's summary has this key even without a warning.
        summary.setdefault("warning", None)
        names = (str(self.folders.weights), self.model_args.use_peft, splits.is_text, self.config.base_hub_id)
        card = model_card(summary, log, *names)
        files = {self.folders.weights / "README.md": card}
        if any(row["split"] == "train" for row in log):
            files[results / curves_name] = lambda path: curves(path, log, title, report.warning)
        if rows:
            files[results / "heldout_rows.jsonl"] = rows
        print_main("")
        earlier = [results / name for name in ("preflight.json", "train_log.jsonl", "samples.md")]
        earlier += [self.folders.weights / HELD_OUT_ROWS]
        self.stage.write(results / "train.json", summary, files, report.printed, [p for p in earlier if p.exists()])
        # After train.json, which the same command prints from then on.
        self.folders.finish()
        places = f"weights and tokenizer are in {self.folders.weights}/, all results in {results}/"
        print_main(paragraphs(places, width=terminal_width()))
        print_main(f"training took {trainer.seconds:.0f} s, the command in total {self.stage.seconds:.0f} s")
        # Evaluations of held-out rows read pairs; those of thumbs are evaluated at the end of training.
        self.print_next(held_out="pairs" in (splits.summary["test"] or {}))
        if self.uploads:
            print_main(self.uploads.finish(self.folders.weights))

    def print_next(self, held_out: bool) -> None:
        """Print the commands that evaluate, compare or continue this run."""
        kind = {"stage": self.stage.name, "held_out": held_out, "lora": self.model_args.use_peft}
        print_main(f"\n{next_commands(self.folders.weights, self.folders.results, **kind)}")


def checkpoint_for(folders: RunFolders, config: RunConfig, notes: list[str]) -> Path | None:
    """The checkpoint to resume from, converted where this launch needs it (which is noted); None for step 0."""
    launch = Launch(config.sharding, config.world_size)
    checkpoint = on_main_process(lambda: checkpoint_to_resume(folders, config.resume, launch))
    if checkpoint and launch.converts(launch_of(checkpoint) or launch):
        on_main_process(lambda: convert(checkpoint))
        load_converted(config)
        notes.append(f"{checkpoint}, saved under {launch_of(checkpoint)}, is converted for {launch}")
    return checkpoint


def training_summary(trainer, flight: dict, unit: str, tokens: int, reference_in_step: bool = False) -> dict:
    """Figures of the training itself, from train_log.jsonl: steps, tokens, speed, loss of its first and last tenth.

    Speed is over all processes and the entire training, evaluations and saves included; mfu is its share of the
    measured rate of matrix products, None where that was not measured. {} on ranks other than 0.

    Args:
        unit: what a row is, in the plural.
        tokens: tokens that count as work, each row's stored once.
        reference_in_step: whether every step includes the reference's forward.
    """
    if not is_main_process():
        return {}
    # `trainer.row_log` holds every step once, also those of calls before a resume.
    first, last = first_and_last_tenth(trainer.row_log.read(), "loss") or (None, None)
    plan = flight["plan"]
    operations = STEP_OPERATIONS + (REFERENCE_OPERATIONS if reference_in_step else 0)
    flops = model_flops(flight["parameters"]["total"], tokens, operations)
    dtype, device = trainer.args.dtype_name, trainer.accelerator.device.type
    return {
        "steps": trainer.state.global_step,
        # The wall time of all calls of this run, those before a resume included; the rates below are over it.
        "seconds": round(trainer.seconds, 1),
        "num_tokens": trainer._total_train_tokens,
        f"{unit}_per_second": round(plan["rows_seen"] / trainer.seconds, 3),
        "tokens_per_second": round(tokens / trainer.seconds, 1),
        "mfu": model_flops_utilisation(flops, trainer.seconds, dtype, device, plan["batch"]["processes"]),
        "loss_first_tenth": first,
        "loss_last_tenth": last,
    }
