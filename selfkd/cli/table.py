"""Every command but `help` and `completion`, which need the whole table: its line in the list, the function that it calls, and its arguments."""

from __future__ import annotations

from pathlib import Path

from selfkd.cli import collecting, commands, exporting, forking, reading, reporting, rescoring, starting, sweeping, talking
from selfkd.cli.arguments import (
    CONTROL,
    JSON,
    LOG,
    NOTIFY,
    ON,
    OVERRIDES,
    RECIPE,
    RUN,
    RUNS,
    SMALL,
    STEPS_OF,
    Argument,
    Command,
    at_least_one,
    flag,
    from_zero,
)

TABLE = {
    "init": Command(
        "make a first recipe for a file of questions",
        starting.init,
        Argument("data", type=Path, metavar="DATA", help="rows: .jsonl, .json, .csv or .parquet"),
        Argument(
            "folder", type=Path, nargs="?", metavar="FOLDER", help="where the recipe is to lie; default: the name of the file"
        ),
        Argument("--prompt", metavar="COLUMN", help="which column is the question, where its name does not tell"),
        Argument("--answer", metavar="COLUMN", help="which column is the gold answer"),
        Argument(
            "--kind",
            choices=("number", "choice", "code", "short", "text"),
            help="of what kind the answers are; default: what most of them look like",
        ),
        Argument(
            "--model", metavar="MODEL", help="a hub id, a folder or a GGUF file; default: one that this machine can train"
        ),
    ),
    "run": Command(
        "start a run, or go on with it",
        commands.run,
        RECIPE,
        OVERRIDES,
        Argument("--name", help="name of the run and of its folder; default: the recipe's name"),
        ON,
        SMALL,
        flag("--plan", "print estimated rows, tokens, memory, disk and hours; start nothing"),
        flag("--amend", "go on with a changed recipe where the change touches only steps not made yet"),
        CONTROL,
        STEPS_OF,
        LOG,
        NOTIFY,
        RUNS,
        JSON,
    ),
    "sweep": Command(
        "run methods and their controls, each as often",
        sweeping.sweep,
        Argument(
            "words",
            nargs="+",
            metavar="FILE | RECIPE … key=value",
            help="a sweep file (docs/sweeps.md); or recipes, and fields: of a field with commas each value is tried",
        ),
        Argument("--seeds", type=at_least_one, default=3, metavar="N", help="seeds of each trial, from 0; default: 3"),
        Argument(
            "--controls",
            default="",
            metavar="NAMES",
            help="controls of every recipe that has something for them: random-reward,gold-sft",
        ),
        Argument("--budget", metavar="tokens=2M,hours=10", help="what all trials together may take"),
        Argument("--metric", metavar="dev/SCORE", help="what chooses; default: that of `best` in the first recipe"),
        Argument("--name", help="name of the sweep and of its folder; default: that of the file, or sweep"),
        ON,
        flag("--plan", "list the trials; start nothing"),
        RUNS,
        JSON,
    ),
    "resume": Command("go on with a run as it was frozen", commands.resume, RUN, ON, LOG, NOTIFY),
    "status": Command(
        "show rounds, state and progress of runs",
        commands.status,
        Argument(
            "run",
            type=Path,
            nargs="?",
            metavar="RUN",
            help="a run: its folder, or its name under --runs; without it, all runs are listed",
        ),
        flag("--follow", "keep showing the run until its driver ends"),
        RUNS,
        JSON,
    ),
    "show": Command(
        "read samples or training rows of a round",
        reading.show,
        RUN,
        Argument("--round", dest="index", type=int, metavar="K", help="which round; default: the newest that holds such rows"),
        Argument("--step", metavar="NAME", help="only what this step made; `measure` shows the held-out answers"),
        Argument("--where", metavar="EXPR", help='a SQL expression: "correct = 0 AND tokens > 100" or "NOT kept"'),
        Argument("-n", type=at_least_one, default=5, metavar="N", help="rows to show; default: 5"),
        flag("--training-rows", "show what the model was trained on instead of samples"),
        flag("--as-prompted", "show exactly what the model saw: its chat template applied, control tokens written out"),
        flag("--tokens", "with --training-rows: which tokens are learned, and which are masked"),
        flag("--ids", "with --as-prompted or --tokens: the token ids too"),
        JSON,
    ),
    "trace": Command(
        "go back from a row or checkpoint, and forward",
        reading.trace,
        RUN,
        Argument(
            "id",
            metavar="ID",
            help="a training row, sample, judgment or prompt by its id or how that begins; or a checkpoint: policy@2, best, base, or how its digest begins",
        ),
        Argument(
            "--round", dest="index", type=int, metavar="K", help="of a training row that several rounds hold, that of this one"
        ),
        Argument("-n", type=at_least_one, default=5, metavar="N", help="things of one kind to list at one place; default: 5"),
        JSON,
    ),
    "logs": Command(
        "show what happened, and what engines and ranks said",
        reading.logs,
        RUN,
        Argument("--attempt", type=at_least_one, metavar="N", help="which attempt; default: the newest"),
        Argument(
            "--of", dest="name", metavar="NAME", help="only this log, such as engine-0 or trainer-0; default: events and driver"
        ),
        Argument("-n", type=at_least_one, metavar="N", help="only the last lines of each log"),
        flag("--follow", "keep showing new lines until the driver ends"),
        JSON,
    ),
    "chat": Command(
        "ask checkpoints the same thing, side by side",
        talking.chat,
        RUN,
        Argument(
            "--rounds",
            default="base,now",
            metavar="NAMES",
            help="which checkpoints: base, now, best, a number for a round, or role@when; default: base,now",
        ),
        Argument("--prompt", metavar="TEXT", help="ask this and end; default: ask what is typed, or each line of a pipe"),
        Argument("--system", metavar="TEXT", help="a system message before the first question"),
        Argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"),
        Argument("--max-tokens", type=at_least_one, default=256, metavar="N", help="longest answer; default: 256"),
        Argument("--seed", type=int, default=0, metavar="N", help="the seed of every answer; default: 0"),
        ON,
        JSON,
    ),
    "compare": Command(
        "set runs side by side on one metric",
        sweeping.compare,
        Argument(
            "runs",
            type=Path,
            nargs="+",
            metavar="RUN",
            help="two runs or more: folders, or names under runs/; the first is what others are compared with. Or one sweep: its folder, its sweep file, which shows arms that have not run too, or a file of its results (JSONL)",
        ),
        Argument(
            "--metric",
            metavar="SPLIT/SCORE",
            help="such as dev/correct; default: the first that all runs measured, test before dev",
        ),
        Argument(
            "--round",
            dest="which",
            default="last",
            metavar="K",
            help="last: the newest accepted round (default); best: by this metric; or a number",
        ),
        *(
            Argument(
                f"--{form}",
                dest="form",
                action="store_const",
                const=form,
                default="text",
                help=f"write {text}",
            )
            for form, text in {
                "csv": "CSV",
                "latex": "LaTeX",
                "markdown": "Markdown",
                "json": "JSON",
                "jsonl": "the results of a sweep, one a line",
            }.items()
        ),
    ),
    "report": Command(
        "write a page of a run, of several, or of a sweep",
        reporting.report,
        Argument(
            "places", type=Path, nargs="+", metavar="RUN", help="a run, or several side by side; or one sweep, or its results"
        ),
        Argument("--out", type=Path, metavar="FILE", help="where to; default: RUN.html here, and with --md the terminal"),
        flag("--md", "write Markdown instead of HTML: the figures without charts, samples and recipe"),
    ),
    "verify": Command(
        "prove that a run is as it was committed",
        commands.verify,
        RUN,
        flag("--quick", "check records, links and sizes only; read no data"),
        flag("--data", "also make every selection and training row again from the stored tables"),
        JSON,
    ),
    "export": Command(
        "write a model or the rows of a run for others",
        exporting.export,
        RUN,
        Argument("folder", type=Path, nargs="?", metavar="FOLDER", help="where the model is to lie: a new or an empty folder"),
        Argument("--model", metavar="ROLE@WHEN", help="which model: policy@best, policy@base, policy@round-2"),
        Argument("--round", dest="index", type=int, metavar="K", help="the policy of this round; of a table: only its rows"),
        Argument(
            "--dtype", choices=("bf16", "fp32"), help="format of the weights; default: the one in which they were measured"
        ),
        flag("--merge", "make full weights of an adapter and what lies beneath it"),
        Argument("--samples", type=Path, metavar="FILE", help="write the samples with their scores: .parquet or .jsonl"),
        Argument("--rows", type=Path, metavar="FILE", help="write the training rows as TRL reads them: .parquet or .jsonl"),
        Argument("--where", metavar="EXPR", help="only rows of the table for which a SQL expression holds"),
    ),
    "fork": Command(
        "begin a run as another was after a round",
        forking.fork,
        RUN,
        OVERRIDES,
        Argument(
            "--after", type=from_zero, required=True, metavar="K", help="the round after which it is another run; 0: the base"
        ),
        Argument("--name", help="name of the new run and of its folder; default: the old name and -fork"),
        RUNS,
    ),
    "gc": Command(
        "take away what no record names",
        collecting.collect,
        RUN,
        flag("--delete", "take it away; without it, it is listed"),
        JSON,
    ),
    "score": Command(
        "score stored samples by another function",
        rescoring.score,
        RUN,
        Argument("--with", dest="function", required=True, metavar="FILE.py:FN", help="a reward function"),
        Argument("--as", dest="name", metavar="NAME", help="the score that it stands for; default: the function's name"),
        Argument("--round", dest="index", type=int, metavar="K", help="which round; default: the newest sealed one"),
        Argument("-n", type=at_least_one, default=3, metavar="N", help="samples of another verdict to show; default: 3"),
        JSON,
    ),
    "track": Command(
        "tell the rounds of a run to a tracker",
        commands.track,
        RUN,
        Argument(
            "--to",
            action="append",
            required=True,
            metavar="TRACKER",
            help="trackio, wandb, tensorboard or mlflow, NAME:PROJECT",
        ),
    ),
    "lint": Command(
        "check a recipe without a model",
        commands.lint,
        RECIPE,
        OVERRIDES,
        SMALL,
        flag("--dry-run", "also walk two rounds on a fake model, in a temporary folder"),
        ON,
        CONTROL,
        STEPS_OF,
        JSON,
    ),
    "try": Command(
        "run a reward on a few rows",
        commands.try_reward,
        Argument("function", metavar="FILE.py:FN", help="a reward function"),
        Argument(
            "data", type=Path, metavar="DATA", help="a file of rows: completion; prompt, answer and what the function asks"
        ),
        Argument("-n", type=at_least_one, default=5, metavar="N", help="rows to score and show; default: 5"),
        Argument("--out", type=Path, metavar="FILE", help="score every row on all cores; write line, value, why as JSONL"),
        ON,
        JSON,
    ),
    "recipes": Command("list recipes", commands.recipes, JSON),
    "cp": Command(
        "copy a recipe with its files",
        commands.cp,
        Argument("name", metavar="NAME", help="a recipe (selfkd recipes)"),
        Argument("folder", type=Path, metavar="DIR", help="where to"),
    ),
    "doctor": Command("check this machine", commands.doctor, RUNS, JSON),
}
