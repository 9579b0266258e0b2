"""The command `gvpo-jax`: train, eval, report, inspect, export, compile."""

import argparse
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gvpo_jax import __version__
from gvpo_jax.buckets import is_address
from gvpo_jax.config_trl import TRL_NAMES
from gvpo_jax.errors import UserError, one_line, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit status is 0, 1 if `compile` finds what does not fit or `inspect` what is broken, 2 for
    the user's mistakes, 75 if another host of the run died, 130 if interrupted, 143 if ended by
    SIGTERM, saved where it was training.
    """
    for stream in (sys.stdout, sys.stderr):  # what they can't show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    interrupted = "gvpo-jax: interrupted"
    try:
        arguments = _parse(argv)
        if arguments.command is None:
            _parser().print_help()
            raise UserError("a COMMAND is missing; see gvpo-jax --help")
        from gvpo_jax.installed import check_trainer
        from gvpo_jax.noise import without_tracebacks
        from gvpo_jax.parallel.preemption import end_when_stuck

        check_trainer()
        without_tracebacks()
        if arguments.command == "train":
            interrupted += _GOES_ON
        with end_when_stuck(interrupted):
            if arguments.command != "train":
                return _COMMANDS[arguments.command](arguments) or 0
            config = _config(arguments)  # here: see CONTRIBUTING.md on the way to the gradient
            from gvpo_jax import commands
            from gvpo_jax.parallel.distributed import is_first

            summary = commands.train(config)
            if is_first():
                tell(json.dumps(_on_screen(summary), indent=2))
                if (config.run.folder / "report.html").is_file():
                    tell(f"report: {config.run.dir}/report.html")
            return 0
    except Exception as error:
        return _ended_by(error)
    except KeyboardInterrupt as error:
        if not error.args:  # else the run has said what is saved
            tell(interrupted, error=True)
        return 130


def _ended_by(error: Exception) -> int:
    """Says what the user has to know, and gives the status; raises what is nobody's mistake."""
    from gvpo_jax.parallel import lost_host

    if what := lost_host.what_was_lost(error):
        try:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                sys.stdout.flush()
            tell(f"gvpo-jax: error: {what}", error=True)
            lost_host.dismiss_witness()
        finally:
            os._exit(lost_host.STATUS)  # JAX would wait for the others, then abort
    if isinstance(error, UserError):
        tell(f"gvpo-jax: error: {one_line(str(error))}", error=True)
        return 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)[:40]
        tell(f"gvpo-jax: error: {name!r}... is too long a name for a file", error=True)
        return 2
    raise error


_GOES_ON = (
    "; the same command goes on from the last checkpoint, or starts over where there is none yet"
)


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        """With all settings, where the command takes some."""
        text = super().format_help()
        if "key=value" not in text:
            return text
        from gvpo_jax.config_file import settings_help

        return f"{text}\n{settings_help()}\n"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also stand behind options, where argparse does not expect them."""
    parser = _parser()
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gvpo-jax",
        description="GVPO post-training of language models in JAX.",
        epilog="gvpo-jax COMMAND --help says more; start with: gvpo-jax train quickstart",
    )
    parser.add_argument("--version", action="version", version=f"gvpo-jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
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
    _add_step(evaluate)
    compiling = _compile_command(commands)
    for command in (train, evaluate, compiling):
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="e.g. loss.beta=0.2"
        )
    report = _command(
        commands,
        "report",
        "draw report.html again",
        "Write the page of a run, report.html, anew from its files.",
        "gvpo-jax report runs/beta02",
    )
    report.add_argument("run_dir", help="a run folder")
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
        "Write the model of a run's last checkpoint: safetensors, config and tokenizer. A run's\n"
        "adapter (model.lora) is merged into the weights, or written alone with --adapter.",
        "gvpo-jax export runs/beta02 my-model",
    )
    export.add_argument("run_dir", help="a run folder")
    export.add_argument("folder", nargs="?", help="where to write; default: RUN/export")
    _add_step(export)
    export.add_argument(
        "--adapter", action="store_true", help="write the adapter alone, as PEFT loads it"
    )
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


def _compile_command(commands: Any) -> _Parser:
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


def _command(commands: Any, name: str, short: str, description: str, example: str) -> _Parser:
    where = "settings: all are in docs/settings.md"
    if name in ("train", "eval", "compile"):
        where += ", and listed below;\na YAML file holds them, section.name=value changes one"
    return commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=f"example: {example}\n\n{where}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _on_screen(values: Mapping[str, Any]) -> dict[str, Any]:
    """A summary or metrics to be read: rounded, and without what was not left out."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in values.items()
        if value or not name.startswith("left_out/")
    }


# The imports below are late: --help and a misspelt config should not wait for transformers.


def _eval(arguments: argparse.Namespace) -> None:
    config, of_run = _config(arguments), _is_run(arguments.config)
    from gvpo_jax.commands import evaluate
    from gvpo_jax.config_file import check_rewards

    if arguments.step is not None and not of_run:
        raise UserError(f"--step: {arguments.config} is a config; only a run has checkpoints")
    if of_run and not arguments.trust_rewards:
        check_rewards(arguments.config, arguments.overrides)
    print(
        json.dumps(_on_screen(evaluate(config, checkpoint=of_run, step=arguments.step)), indent=2)
    )


def _report(arguments: argparse.Namespace) -> None:
    run_dir = _run_folder(arguments)
    from gvpo_jax.report import write_report
    from gvpo_jax.rundir.bucket import pull, push

    report = write_report(pull(run_dir))
    push(run_dir, only="report.html")
    print(f"{report}, and in {run_dir}" if is_address(run_dir) else report)


def _inspect(arguments: argparse.Namespace) -> int:
    run_dir = _run_folder(arguments)
    from gvpo_jax.commands import inspect
    from gvpo_jax.config_file import open_run

    text, whole = inspect(open_run(run_dir))
    print(text)
    return 0 if whole else 1


def _export(arguments: argparse.Namespace) -> None:
    run_dir = _run_folder(arguments)
    from gvpo_jax.commands import export, export_adapter
    from gvpo_jax.config_file import open_run

    config, write = open_run(run_dir), export_adapter if arguments.adapter else export
    if is_address(run_dir) and not arguments.folder:
        raise UserError(f"{run_dir} is in a bucket: give the folder here that is to be written")
    print(write(config, Path(arguments.folder or Path(run_dir) / "export"), arguments.step))


def _compile(arguments: argparse.Namespace) -> int:
    if arguments.diff:
        if arguments.config or arguments.topology:
            raise UserError("--diff compares two reports: leave out the config and --topology")
        from gvpo_jax.tpu_compile.text import diff, read_report

        print(diff(*map(read_report, arguments.diff)))
        return 0
    if not arguments.config or not arguments.topology:
        missing = "--topology CHIP:SHAPE" if arguments.config else "a config"
        raise UserError(f"compile needs {missing}; see gvpo-jax compile --help")
    config = _config(arguments)
    from gvpo_jax.tpu_compile.report import compile_run, write_report
    from gvpo_jax.tpu_compile.text import as_text

    report = compile_run(
        config,
        arguments.topology,
        slices=arguments.slices,
        model_config=arguments.model_config,
        only=arguments.only or (),
    )
    print(as_text(report))
    if arguments.out:
        write_report(report, Path(arguments.out))
        print(f"\nreport: {arguments.out}")
    return 0 if report["fits"] else 1


def _run_folder(arguments: argparse.Namespace) -> str:
    """What the command was given; a folder, or an address."""
    from gvpo_jax.config_file import check_run_address, no_run

    if is_address(arguments.run_dir):
        check_run_address(arguments.run_dir)
    elif not os.path.isdir(arguments.run_dir):
        raise no_run(Path(arguments.run_dir))
    return arguments.run_dir


def _is_run(name: str) -> bool:
    """Whether it is the place of a run, and no config."""
    return is_address(name) or os.path.isdir(name)


def _config(arguments: argparse.Namespace):
    from gvpo_jax.config_file import load_config, open_run

    if _is_run(arguments.config):
        return open_run(arguments.config, arguments.overrides)
    return load_config(arguments.config, arguments.overrides)


_COMMANDS = {
    "eval": _eval,
    "report": _report,
    "inspect": _inspect,
    "export": _export,
    "compile": _compile,
}
