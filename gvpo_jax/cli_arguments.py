"""The arguments of the command `gvpo-jax`, and its help."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from gvpo_jax import __version__
from gvpo_jax.config_trl import TRL_NAMES
from gvpo_jax.errors import UserError

_EXAMPLES = """examples:
  gvpo-jax doctor                        what is installed, and what will not work
  gvpo-jax init my-task                  a config, a reward and rows for a task of your own
  gvpo-jax train my-task/config.yaml     train on it; the same command goes on with the run
  gvpo-jax train quickstart loss.beta=0.2 run.dir=runs/beta02    any setting can be given
  gvpo-jax eval runs/beta02              accuracy or reward on held-out rows
  gvpo-jax eval runs/beta02 --sets eval/math             AIME, AMC, MATH500 and others
  gvpo-jax export runs/beta02 my-model   a folder that transformers loads

gvpo-jax COMMAND --help says more; start with: gvpo-jax train quickstart
documentation: https://github.com/gvpo-jax/gvpo-jax/tree/main/docs"""


_LISTS_SETTINGS = ("train", "eval", "compile")


class Parser(argparse.ArgumentParser):
    """Raises UserError for arguments that it does not know."""

    lists_settings = False

    def format_help(self) -> str:
        """With all settings, where the command lists them."""
        text = super().format_help()
        if not self.lists_settings:
            return text
        from gvpo_jax.config_file import settings_help

        return f"{text}\n{settings_help()}\n"

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would end the program."""
        raise UserError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may also stand behind options, where argparse expects none.

    Raises:
        UserError: there is one that it does not know.
    """
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = getattr(arguments, "overrides", None)
    strangers = [arg for arg in rest if overrides is None or arg.startswith("-")]
    if strangers:  # of a command, or of none
        name = strangers[0].lstrip("-").partition("=")[0].replace("-", "_")
        hint = f"; TRL's {name} is {TRL_NAMES[name]} here" if name in TRL_NAMES else ""
        hint += "; settings are written key=value, without dashes" if overrides is not None else ""
        parser.error(f"unrecognized arguments: {' '.join(strangers)}{hint}")
    if overrides is not None:
        arguments.overrides = [*overrides, *rest]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = Parser(
        prog="gvpo-jax",
        description="GVPO post-training of language models in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gvpo-jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    init = _command(
        commands,
        "init",
        "write the files of a task of your own, to start with",
        "Write a commented config, a file with a reward function, ten rows and held-out rows.\n"
        "A file that is there already is never replaced.",
        "gvpo-jax init my-task",
    )
    init.add_argument("folder", nargs="?", default=".", help="where to write; default: here")
    doctor = _command(
        commands,
        "doctor",
        "tell what is there, and what will not work",
        "List versions, devices, memory, disks and extras, and what will not work. With a config:\n"
        "also whether its model is there and fits into memory. No weights are read.",
        "gvpo-jax doctor quickstart",
    )
    doctor.add_argument("config", nargs="?", help="a YAML config, or a run folder")
    doctor.add_argument("--json", action="store_true", help="print JSON, for a report of a fault")
    train = _command(
        commands,
        "train",
        "train, or go on with a run",
        "Train as a config says, into the folder run.dir. Started again, with the config or that\n"
        "folder, it goes on from the last checkpoint.",
        "gvpo-jax train quickstart loss.beta=0.2 run.dir=runs/beta02",
    )
    train.add_argument(
        "config", help="a YAML config, e.g. configs/quickstart.yaml, or a run folder to go on with"
    )
    evaluate = _command(
        commands,
        "eval",
        "accuracy or reward on the held-out rows",
        "Sample answers to the held-out rows, judge them, and print the metrics as JSON.",
        "gvpo-jax eval runs/beta02",
    )
    evaluate.add_argument(
        "config", help="a run folder (its last checkpoint), or a config (the model it starts from)"
    )
    evaluate.add_argument(
        "--trust-rewards",
        action="store_true",
        help="run code that a run folder names, also where it was not trained with here",
    )
    evaluate.add_argument(
        "--sets",
        metavar="CONFIG",
        help="judge a run by a config of evaluation sets, such as eval/math",
    )
    _add_step(evaluate)
    compiling = _compile_command(commands)
    for command in (train, evaluate, compiling, doctor):
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="e.g. loss.beta=0.2"
        )
    report = _command(
        commands,
        "report",
        "draw report.html again, or compare several runs",
        "Write the page of a run, report.html, anew from its files. Of several runs: one page that "
        "compares them.",
        "gvpo-jax report runs/beta02 runs/beta05",
    )
    report.add_argument("run_dir", nargs="+", help="a run folder, or several")
    report.add_argument(
        "--out", metavar="FILE", help="the page of several runs; default: comparison.html"
    )
    inspect = _command(
        commands,
        "inspect",
        "list a run's checkpoints, and whether they are whole",
        "Read every checkpoint of a run, and compare it with its checksums.",
        "gvpo-jax inspect runs/beta02",
    )
    inspect.add_argument("run_dir", help="a run folder")
    export = _command(
        commands,
        "export",
        "write the trained model as a folder that transformers loads",
        "Write the model of a run's last checkpoint: safetensors, config, tokenizer and a card. A\n"
        "run's adapter (model.lora) is merged into the weights, or written alone with --adapter.\n"
        "--push also sends it to the Hugging Face hub: log in before, with hf auth login or by\n"
        "HF_TOKEN.",
        "gvpo-jax export runs/beta02 my-model",
    )
    export.add_argument("run_dir", help="a run folder")
    export.add_argument("folder", nargs="?", help="where to write; default: RUN/export")
    _add_step(export)
    export.add_argument(
        "--adapter", action="store_true", help="write the adapter alone, as PEFT loads it"
    )
    export.add_argument(
        "--push", metavar="NAME", help="send it to this repository of the hub, [OWNER/]NAME"
    )
    export.add_argument("--private", action="store_true", help="where nobody else may see it")
    return parser


def _add_step(parser: argparse.ArgumentParser) -> None:
    def number(text: str) -> int | str:
        return text if text == "best" else int(text)

    parser.add_argument(
        "--step",
        type=number,
        metavar="N",
        help="of this checkpoint; best: of the best held-out score; default: of the last",
    )


def _compile_command(commands: Any) -> Parser:
    compiling = _command(
        commands,
        "compile",
        "compile a run's programs for a TPU that is not there: do they fit?",
        "Compile what a config trains with for a TPU, on a machine without one, and tell its\n"
        "memory and time. Needs the extra compile.",
        "gvpo-jax compile qwen2.5-math-1.5b --topology v5e:4x4",
    )
    compiling.add_argument("config", nargs="?", help="a YAML config, or a run folder")
    compiling.add_argument("--topology", help="chip and shape, e.g. v5e:4x4")
    compiling.add_argument("--slices", type=int, default=1, help="of that topology; default: 1")
    compiling.add_argument(
        "--model-config", metavar="FILE", help="a config.json to take in place of model.name"
    )
    compiling.add_argument(
        "--only",
        action="append",
        choices=("train", "reference", "rollout"),
        help="compile this program alone; may be given twice",
    )
    compiling.add_argument("--out", metavar="FILE", help="where to write the report as JSON")
    compiling.add_argument(
        "--diff",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="compile nothing, but compare two reports of --out",
    )
    return compiling


def _command(commands: Any, name: str, short: str, description: str, example: str) -> Parser:
    where, lists_settings = "settings: all are in docs/settings.md", name in _LISTS_SETTINGS
    if lists_settings:
        where += ", and listed below;\na YAML file holds them, section.name=value changes one"
    parser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=f"example: {example}\n\n{where}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.lists_settings = lists_settings
    return parser
