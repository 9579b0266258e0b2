"""The command `gvpo-jax`: train, eval, report, export."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gvpo_jax import __version__
from gvpo_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for the user's mistakes, 130 if interrupted."""
    # Else transformers advises everyone to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        print(f"gvpo-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "gvpo-jax: interrupted; the same command goes on from the last checkpoint, "
            "or starts over where there is none yet",
            file=sys.stderr,
        )
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gvpo-jax", description="GVPO post-training of language models in JAX.")
    parser.add_argument("--version", action="version", version=f"gvpo-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train, or go on with a run")
    train.add_argument(
        "config", help="a YAML config, e.g. configs/quickstart.yaml, or a run folder to go on with"
    )
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("eval", help="accuracy on the held-out rows")
    evaluate.add_argument(
        "config", help="a run folder (its last checkpoint), or a config (the model it starts from)"
    )
    evaluate.set_defaults(run=_eval)
    for command in (train, evaluate):
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. loss.beta=0.2")
    report = commands.add_parser("report", help="draw report.html again")
    report.add_argument("run_dir", help="a run folder")
    report.set_defaults(run=_report)
    export = commands.add_parser(
        "export", help="write the trained model as a folder that transformers loads"
    )
    export.add_argument("run_dir", help="a run folder")
    export.add_argument("folder", nargs="?", help="where to write; default: RUN/export")
    export.set_defaults(run=_export)
    return parser


# The imports below are late: --help and a misspelt config should not wait for JAX and transformers.


def _train(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from gvpo_jax.distributed import is_first
    from gvpo_jax.runs import train

    summary = train(config)
    if is_first():
        print(json.dumps(summary, indent=2))
        print(f"report: {Path(config.run.dir) / 'report.html'}")


def _eval(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from gvpo_jax.runs import evaluate_model, evaluate_run

    evaluate = evaluate_run if Path(arguments.config).is_dir() else evaluate_model
    print(json.dumps(evaluate(config), indent=2))


def _report(arguments: argparse.Namespace) -> None:
    from gvpo_jax.report import write_report

    print(write_report(Path(arguments.run_dir)))


def _export(arguments: argparse.Namespace) -> None:
    from gvpo_jax.runfolder import open_run
    from gvpo_jax.runs import export

    config = open_run(arguments.run_dir)
    print(export(config, Path(arguments.folder or Path(arguments.run_dir) / "export")))


def _config(arguments: argparse.Namespace):
    from gvpo_jax.config import load_config
    from gvpo_jax.runfolder import open_run

    if Path(arguments.config).is_dir():
        return open_run(arguments.config, arguments.overrides)
    return load_config(arguments.config, arguments.overrides)
