"""`gvpo-jax compile`: a run's programs compiled for a TPU that is not there, and what they need."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from gvpo_jax.config import Config
from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import param_shapes
from gvpo_jax.models.known import model_shape
from gvpo_jax.rundir.files import write_text
from gvpo_jax.tpu_compile.advice import to_fit, to_speed_up
from gvpo_jax.tpu_compile.clock import clock_of
from gvpo_jax.tpu_compile.hlo import collectives, loops, memory
from gvpo_jax.tpu_compile.lowering import Program, batch_sizes, run_programs
from gvpo_jax.tpu_compile.roofline import CHIPS, RESERVED, Chip, Work, estimate, program_work

# Nothing here may look for a TPU, or for the service that tells one its topology.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

ASSUMPTIONS = (
    "compute: FLOP counted from shapes, what is computed twice included, at the chip's bfloat16 "
    "peak",
    "hbm: XLA's bytes accessed, times the rounds of the main loop (micro-batches, tokens); other "
    "loops, also those over layers, count once; of decoding, weights and cache read once a token",
    "ici, dcn: bytes received by ring algorithms, with all links of a chip busy, none waiting",
    "time: the largest of the four, as if they overlapped perfectly; MFU: model FLOP over peak in "
    "that time, so an upper bound",
    "clock: the cycles that the compiler gives its own schedule, loops as often as they run, of "
    "branches the dearest; Pallas kernels by their products at half of the peak or by their bytes; "
    "collectives as far as the schedule does not hide them",
    "every prompt and every completion has its greatest length",
)


def compile_run(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    model_config: str | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Compiles a run's programs for a TPU topology, from shapes alone.

    Args:
        config: of the run.
        topology: chip and shape, e.g. "v5e:4x4".
        slices: of that topology, joined by the data centre's network.
        model_config: a config.json to take in place of model.name.
        only: beginnings of the names of the programs wanted; default: all.

    Returns:
        The report, ready for JSON; `fits` says whether all programs do.

    Raises:
        UserError: libtpu is missing, there is no such topology, or a batch or parameter does not
            divide over it.
    """
    if slices < 1:
        raise UserError(f"--slices must be at least 1, got {slices}")
    chip, devices = tpu_devices(topology, slices)
    model = model_shape(config.model.name, model_config)
    mesh = config.mesh.mesh(devices)
    batch = {name: dataclasses.asdict(sizes) for name, sizes in batch_sizes(config).items()}
    how = {
        "remat": config.model.remat != "none",
        "two_passes": config.train.completion_parts > 1,
        "frozen": config.model.lora.rank is not None,
    }
    rows = []
    for program in run_programs(config, model, mesh):
        if not only or program.name.startswith(tuple(only)):
            work = program_work(program.name, model, batch, **how)
            rows.append(_row(program, chip, work, mesh.size, slices))
    fits = all(row["fits"] for row in rows)
    advice = to_speed_up(config, rows) if fits else to_fit(config, rows, dict(mesh.shape))
    return {
        "topology": topology,
        "slices": slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "chip": dataclasses.asdict(chip),
        "model": Path(model_config).name if model_config else config.model.name,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(model))),
        "batch": batch,
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
        "programs": rows,
        "fits": fits,
        "advice": advice,
        "config": dataclasses.asdict(config),
        "assumptions": list(ASSUMPTIONS),
    }


def prepare() -> None:
    """Keep JAX off real devices; call it before JAX first looks for any."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is missing, the compiler for TPUs: pip install 'gvpo-jax[compile]'")
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def tpu_devices(topology: str, slices: int = 1) -> tuple[Chip, Sequence[Any]]:
    """The kind of chip and the devices of a topology that is not there; see `compile_run`."""
    prepare()
    kind = topology.split(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise UserError(
            f"--topology is CHIP:SHAPE, e.g. v5e:4x4 or v5p:2x2x2, with a chip of "
            f"{', '.join(CHIPS)}; got {topology}"
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.endswith(":1x1"):  # libtpu thinks of whole hosts, of 2 x 2 chips at least
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **options)
    except Exception as error:  # jaxlib's own, without a common class for a wrong name
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"there is no topology {topology}: {reason}") from None
    return CHIPS[kind], found.devices


def _row(program: Program, chip: Chip, work: Work, devices: int, slices: int) -> dict[str, Any]:
    start = time.monotonic()
    hlo, buffers, costs, error = _compile(program.lower())
    seconds = time.monotonic() - start
    held, largest = memory(buffers, hlo)
    traffic = collectives(hlo, devices=devices, slices=slices, trips=program.loop)
    accessed = costs.get("bytes accessed")
    read = program.reads or accessed or held["arguments"] + held["outputs"]
    limits, bound = estimate(
        chip,
        flops=work.executed / devices,
        hbm_bytes=read * program.loop,
        ici_bytes=sum(c.wire_bytes for c in traffic if not c.between_slices),
        dcn_bytes=sum(c.wire_bytes for c in traffic if c.between_slices),
    )
    slowest = limits[bound]

    def mfu(seconds: float) -> float | None:
        return work.model / devices / chip.flops / seconds if seconds else None

    clock = clock_of(hlo, chip, devices=devices, slices=slices, trips=program.loop)
    peak, usable = held["total"] + program.beside, chip.hbm - RESERVED
    return {
        "name": program.name,
        "compile_seconds": round(seconds, 1),
        "fits": error is None and peak <= usable,
        "error": error,
        "hbm": held | {"beside": program.beside, "peak": peak, "usable": usable},
        "largest": [dataclasses.asdict(buffer) for buffer in largest],
        "cost_analysis": {"flops": costs.get("flops"), "bytes_accessed": accessed},
        "main_loop": program.loop,
        "loops": loops(hlo),
        "flops": dataclasses.asdict(work),
        "collectives": [dataclasses.asdict(c) for c in traffic],
        "seconds": limits | {"estimate": slowest},
        "bound": bound,
        "mfu": mfu(slowest),
        "clock": clock and dataclasses.asdict(clock) | {"mfu": mfu(clock.seconds)},
    }


def _compile(lowered: Any) -> tuple[str, str, dict[str, float], str | None]:
    """The program's text, its buffers, XLA's cost analysis, and why it does not fit, if so."""
    costs, error = {}, None
    with tempfile.TemporaryDirectory(prefix="gvpo-jax-compile-") as folder, _without_cache():
        try:
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as caught:
            if "RESOURCE_EXHAUSTED" not in str(caught):
                raise
            error = str(caught).strip().partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
            hlo = _dumped(folder, "optimizations.txt")
        else:
            hlo, costs = compiled.as_text() or "", compiled.cost_analysis() or {}
        return hlo, _dumped(folder, "optimizations-buffer-assignment.txt"), costs, error


@contextlib.contextmanager
def _without_cache():
    """A program from the cache would come without the dump that tells its memory."""
    setting = "jax_enable_compilation_cache"
    before = getattr(jax.config, setting)
    jax.config.update(setting, False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update(setting, before)
        compilation_cache.reset_cache()


def _dumped(folder: str, ending: str) -> str:
    """The dump with this ending, of the largest module."""
    found = sorted(Path(folder).glob(f"*.after_{ending}"), key=lambda file: file.stat().st_size)
    return found[-1].read_text() if found else ""


def _libtpu_version() -> str:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_report(report: dict[str, Any], path: Path) -> None:
    """The report as JSON."""
    write_text(path, json.dumps(report, indent=2) + "\n")
