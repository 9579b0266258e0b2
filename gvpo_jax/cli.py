"""The command `gvpo-jax`: what each of its commands does, and what becomes of errors."""

import argparse
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.buckets import is_address
from gvpo_jax.cli_arguments import make_parser, parse
from gvpo_jax.errors import Page, UserError, one_line, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit status is 0, 1 if `compile` finds what does not fit, `inspect` what is broken or
    `doctor` what will not work, 2 for the user's mistakes, 75 if another host of the run died, 130
    if interrupted, 143 if ended by SIGTERM, saved where it was training.
    """
    for stream in (sys.stdout, sys.stderr):  # what they can't show must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    interrupted = "gvpo-jax: interrupted"
    try:
        arguments = parse(argv)
        if arguments.command is None:
            make_parser().print_help()
            raise UserError("a COMMAND is missing; see gvpo-jax --help")
        if arguments.command in _WITHOUT_TRAINER:
            return _WITHOUT_TRAINER[arguments.command](arguments)
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
        _tell(str(error), error.page)
        return 2
    if told := _out_of_memory(error):
        _tell(told, Page.MEMORY)
        return 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        _tell(f"{str(error.filename)[:40]!r}... is too long a name for a file")
        return 2
    raise error


def _out_of_memory(error: Exception) -> str | None:
    """The line for it, if this is what the error means: of the machine, or of a device."""
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    text = str(error).strip().partition("\n")[0][:250]
    if not isinstance(error, MemoryError) and not (of_jax and "RESOURCE_EXHAUSTED" in text):
        return None
    reason = text.removeprefix("RESOURCE_EXHAUSTED: ").removeprefix("Out of memory ")
    return (
        f"out of memory ({reason or 'the machine has no more'}); train.micro_batches, "
        "model.remat=layer or a smaller rollout.slots need less; the same command goes on from the "
        "last checkpoint"
    )


def _tell(problem: str, page: Page | None = None) -> None:
    """One line; behind it, where there is a page that says more, its address."""
    more = f"\nsee {page.url}" if page else ""
    tell(f"gvpo-jax: error: {one_line(problem)}{more}", error=True)


_GOES_ON = (
    "; the same command goes on from the last checkpoint, or starts over where there is none yet"
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
    from gvpo_jax.config_file import check_trusted

    if arguments.step is not None and not of_run:
        raise UserError(f"--step: {arguments.config} is a config; only a run has checkpoints")
    if of_run and not arguments.trust_rewards:
        check_trusted(arguments.config, arguments.overrides, arguments.sets)
    if not of_run and config.model.name == "debug":
        told = "model.name=debug is a tiny random model; give yours, e.g. model.name=org/name"
        tell(f"gvpo-jax: {told}", error=True)
    print(
        json.dumps(_on_screen(evaluate(config, checkpoint=of_run, step=arguments.step)), indent=2)
    )


def _report(arguments: argparse.Namespace) -> None:
    run_dirs = [_run_folder(name) for name in arguments.run_dir]
    from gvpo_jax.report import write_comparison, write_report
    from gvpo_jax.rundir.bucket import pull, push

    if len(run_dirs) > 1:
        folders = [pull(run_dir) for run_dir in run_dirs]
        print(write_comparison(folders, arguments.out or "comparison.html"))
        return
    (run_dir,) = run_dirs
    if arguments.out is not None:
        raise UserError("--out is for the page of several runs; that of one lies in its folder")
    report = write_report(pull(run_dir))
    push(run_dir, only="report.html")
    print(f"{report}, and in {run_dir}" if is_address(run_dir) else report)


def _inspect(arguments: argparse.Namespace) -> int:
    run_dir = _run_folder(arguments.run_dir)
    from gvpo_jax.commands import inspect
    from gvpo_jax.config_file import open_run

    text, whole = inspect(open_run(run_dir))
    print(text)
    return 0 if whole else 1


def _export(arguments: argparse.Namespace) -> None:
    run_dir = _run_folder(arguments.run_dir)
    if arguments.private and not arguments.push:
        raise UserError("--private is for --push NAME: give that too")
    from gvpo_jax import commands
    from gvpo_jax.config_file import open_run

    config, step = open_run(run_dir), arguments.step
    if is_address(run_dir) and not arguments.folder:
        raise UserError(f"{run_dir} is in a bucket: give the folder here that is to be written")
    folder = Path(arguments.folder or Path(run_dir) / "export")
    if not arguments.push:
        write = commands.export_adapter if arguments.adapter else commands.export
        print(write(config, folder, step))
        return
    how: dict[str, Any] = {"step": step, "adapter": arguments.adapter}
    how |= {"private": arguments.private or None}
    url = commands.push(config, folder, arguments.push, **how)
    print(f"{folder}, and at {url}")


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


def _init(arguments: argparse.Namespace) -> int:
    from gvpo_jax.starter import next_steps, write_starter

    written = write_starter(arguments.folder)
    print(next_steps(written))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from gvpo_jax.doctor.examine import examine
    from gvpo_jax.doctor.findings import as_json, as_text

    found = examine(lambda: _config(arguments) if arguments.config else None)
    print(as_json(found) if arguments.json else as_text(found))
    return 1 if any(finding.level == "problem" for finding in found) else 0


def _run_folder(name: str) -> str:
    """What the command was given; a folder, or an address."""
    from gvpo_jax.config_file import check_run_address, no_run

    if is_address(name):
        check_run_address(name)
    elif not os.path.isdir(name):
        raise no_run(Path(name))
    return name


def _is_run(name: str) -> bool:
    """Whether it is the place of a run, and no config."""
    return is_address(name) or os.path.isdir(name)


def _config(arguments: argparse.Namespace):
    from gvpo_jax.config_file import load_config, open_run

    sets = getattr(arguments, "sets", None)
    if _is_run(arguments.config):
        to_train = arguments.command == "train"
        return open_run(arguments.config, arguments.overrides, to_train=to_train, sets=sets)
    return load_config(arguments.config, arguments.overrides, sets=sets)


_COMMANDS = {
    "eval": _eval,
    "report": _report,
    "inspect": _inspect,
    "export": _export,
    "compile": _compile,
}
# These say what is missing, or need nothing.
_WITHOUT_TRAINER = {"init": _init, "doctor": _doctor}
