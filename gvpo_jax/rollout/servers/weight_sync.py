"""Bringing new weights to rollout servers through a folder, and making sure that they arrived."""

import contextlib
import functools
import logging
import operator
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.models.adapters import export_adapter
from gvpo_jax.models.export import export_model
from gvpo_jax.models.load import LoadedModel
from gvpo_jax.models.lora import Lora
from gvpo_jax.parallel.distributed import from_first_host, to_first_host
from gvpo_jax.rollout.engine import SamplingParams
from gvpo_jax.rollout.servers.client import Client, Fleet
from gvpo_jax.rollout.servers.dialects import (
    DIALECTS,
    Ask,
    NoAdapters,
    NoPromptLogps,
    Post,
    ServerKind,
    of_adapter,
)

_log = logging.getLogger(__name__)
# (params, sequences) -> log-probs of each sequence's tokens[1:]
SequenceLogps = Callable[[Any, Sequence[Sequence[int]]], list[np.ndarray]]
_SCRATCH = ".writing-"
_KEPT = 2  # versions that stay on disk
_PROBES, _LONGEST_PROBE = 4, 128  # sequences, and tokens of each
_FRESH = 16  # tokens that a server samples after each
_NOISE = 1e-4  # nats: the least disagreement that is taken to be there anyway


class SyncReport(NamedTuple):
    """A version that all servers have, and how it went."""

    version: int
    difference: float  # of a token's log-prob from the trainer's, in nats: the mean over servers
    largest: float  # the same, at most
    tokens: int  # how many were compared
    write_seconds: float  # for the folder
    load_seconds: float  # for the slowest server


class _Answer(NamedTuple):
    """What a server says under new weights: of the probes, and of what it sampled after them."""

    scores: list[list[float]] | None
    fresh: list[list[int]]
    fresh_logps: list[list[float]]
    load_seconds: float
    adapter: str | None  # by which it now goes; None: those are whole weights


class _Delivered(NamedTuple):
    """A version that all servers have loaded."""

    version: int
    write_seconds: float
    answers: list[_Answer]


# Has a server load what lies in a folder; gives the name of an adapter, None of whole weights.
Load = Callable[[Post, Path], str | None]


@dataclass(eq=False, repr=False)
class WeightSync:
    """Writes each version of the parameters to a folder and has every server load it.

    Then the handshake: the servers give log-probs of a few fixed sequences, and of tokens that they
    sample; the trainer computes the same. The run stops where they differ, and where a server's
    did not change as the trainer's did: so old weights show long before they make a difference.
    """

    fleet: Fleet
    kind: ServerKind  # what the servers understand
    model: LoadedModel  # gives config and tokenizer of the folders
    folder: Path  # where they are written; every server sees it under the same path
    logps: SequenceLogps  # see `sequence_logps`
    # The trainer's parameters -> the model's, on the first process; all call it.
    whole: Callable[[Any], Any] = to_first_host
    # The form of the adapter that those parameters are; None: they are the model's, or can only be
    # sent merged. Servers that take adapters get it alone.
    lora: Lora | None = None
    dtype: str = "float32"  # of the files; or "bfloat16"
    # Mean difference in nats that servers may show; bfloat16 ones come to some 0.02.
    tolerance: float = 0.05
    probes: Sequence[Sequence[int]] = ()  # the fixed sequences; default: the first prompts sampled

    def __post_init__(self) -> None:
        self._dialect, self._folder = DIALECTS[self.kind], self.folder.absolute()
        self._by_adapter = self.lora is not None and self._dialect.load_adapter is not None
        # By which name the servers know the adapter that is there; None: they have whole weights.
        self.adapter: str | None = None
        self._session = secrets.token_hex(4)  # another run's names may be on a server
        self._on_servers: list[weakref.ref[Any]] = []
        self._report: SyncReport | None = None
        self._blind: set[str] = set()
        self._probes = [list(probe) for probe in self.probes]
        # Per server: the trainer's and its log-probs of the probes, at first and when last moved.
        self._moved: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def bring(self, params: Any, prompts: Sequence[Sequence[int]]) -> SyncReport:
        """`sync`, unless the servers have these very arrays already: then its last report.

        prompts: whose samples are wanted; the first ones ever become the fixed sequences.
        """
        leaves = jax.tree.leaves(params)
        there = [ref() for ref in self._on_servers]
        if self._report and len(there) == len(leaves) and all(map(operator.is_, there, leaves)):
            return self._report
        if not self._probes:
            first = [list(map(int, prompt[:_LONGEST_PROBE])) for prompt in prompts[:_PROBES]]
            self._probes = from_first_host(lambda: first)
        return self.sync(params)

    @explained_by(Page.WEIGHTS)
    def sync(self, params: Any, version: int | None = None) -> SyncReport:
        """Write the parameters, have them loaded, and compare.

        Args:
            params: as the trainer has them.
            version: their number; default: the one after the last in the folder.

        Raises:
            UserError: they can't be written, or a server does not load them or has others.
        """
        if not self._probes:
            raise ValueError("sync needs probes: sequences of tokens to compare log-probs of")
        self._on_servers = []
        delivered = self._send_adapter(params, version) if self._by_adapter else None
        if delivered is None:
            self._by_adapter = False
            delivered = self._send_whole(params, version)
        number, seconds, answers = delivered
        self.adapter = answers[0].adapter
        self._report = self._compare(params, number, seconds, answers)
        from_first_host(self._remove_old)
        self._on_servers = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
        return self._report

    def _send_whole(self, params: Any, version: int | None) -> _Delivered:
        whole = self.whole(params)

        def write(folder: Path) -> None:
            export_model(folder, self.model, whole, dtype=self.dtype)

        def load(post: Post, folder: Path) -> None:
            self._dialect.load(post, str(folder))

        return from_first_host(lambda: self._deliver(write, load, version))

    def _send_adapter(self, params: Any, version: int | None) -> _Delivered | None:
        """None: a server takes none."""
        adapter, lora, load_adapter = to_first_host(params), self.lora, self._dialect.load_adapter
        assert lora is not None
        assert load_adapter is not None

        def write(folder: Path) -> None:
            export_adapter(folder, self.model, adapter, lora)

        def load(post: Post, folder: Path) -> str:
            name = f"{self._session}-{folder.name}"
            load_adapter(post, str(folder), name, self.adapter)
            return name

        def deliver() -> _Delivered | None:
            try:
                return self._deliver(write, load, version)
            except NoAdapters:
                _log.warning("a server has LoRA not enabled: all get whole weights, merged")
                return None

        return from_first_host(deliver)

    def _deliver(
        self, write: Callable[[Path], None], load: Load, version: int | None
    ) -> _Delivered:
        """Write a version and have the servers load it; what they then say."""
        start = time.perf_counter()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if version is None:
                version = 1 + max(self._versions().values(), default=0)
            folder = _write(self._folder, version, write)
        except OSError as error:
            raise UserError(f"could not write weights to {self._folder}: {error}") from None
        seconds = time.perf_counter() - start
        answers = self.fleet.each(functools.partial(self._visit, folder, load))
        return _Delivered(version, seconds, answers)

    def _visit(self, folder: Path, load: Load, client: Client) -> _Answer:
        """Have one server load a version, and hear what it makes of it."""
        start = time.perf_counter()
        name = load(functools.partial(client.post, about=f"loading {folder.name}"), folder)
        seconds = time.perf_counter() - start
        post = of_adapter(functools.partial(client.post, about=f"comparing {folder.name}"), name)
        try:
            long = [probe for probe in self._probes if len(probe) > 1]
            scores = [self._dialect.token_logps(post, probe) for probe in long] or None
        except NoPromptLogps:
            scores = None
        fresh, logps = [], []
        vocab_size = self.model.config.vocab_size
        for number, probe in enumerate(self._probes):
            ask = Ask(probe, 1, _FRESH, SamplingParams(), (), vocab_size, key=(number, 0))
            (sample,) = self._dialect.sample(post, ask)
            fresh.append([*probe, *sample.tokens])
            logps.append(sample.logps)
        return _Answer(scores, fresh, logps, seconds, name)

    def _compare(
        self, params: Any, version: int, seconds: float, answers: Sequence[_Answer]
    ) -> SyncReport:
        """The report, if every server has what the trainer has."""
        sampled = [sequence for answer in answers for sequence in answer.fresh]
        scored = self.logps(params, [*self._probes, *sampled])
        ours, rest = _flat(scored[: len(self._probes)]), iter(scored[len(self._probes) :])
        differences = []
        for client, answer in zip(self.fleet.clients, answers, strict=True):
            theirs = answer.fresh_logps
            expected = [next(rest)[-len(row) :] for row in theirs]
            if answer.scores is not None:
                self._check_moved(client.url, version, ours, _flat(answer.scores))
                theirs, expected = [*theirs, *answer.scores], [*expected, ours]
            elif client.url not in self._blind:
                self._blind.add(client.url)
                _log.warning(
                    "%s gives no log-probs of prompts: if it keeps old weights, that shows only "
                    "once they differ by servers.logp_tolerance",
                    client.url,
                )
            differences.append(np.abs(_flat(theirs) - _flat(expected)))
            self._check_close(client.url, version, differences[-1])
        every = np.concatenate(differences)
        return SyncReport(
            version=version,
            difference=float(every.mean()),
            largest=float(every.max()),
            tokens=every.size,
            write_seconds=seconds,
            load_seconds=max(answer.load_seconds for answer in answers),
        )

    def _check_close(self, url: str, version: int, differences: np.ndarray) -> None:
        if not differences.mean() <= self.tolerance:  # also where it is NaN
            raise UserError(
                f"{url} does not sample from version {version} of the weights: its log-probs "
                f"differ from the trainer's by {differences.mean():.3g} nats a token, at most by "
                f"{differences.max():.3g} (servers.logp_tolerance={self.tolerance:g})"
            )

    def _check_moved(self, url: str, version: int, ours: np.ndarray, theirs: np.ndarray) -> None:
        """That a server's log-probs moved as the trainer's did, to within what it rounds away.

        Since the first version, so that weights which never arrive add up; and since the last one
        that moved them visibly.
        """
        then = self._moved.setdefault(url, [(ours, theirs)] * 2)
        noise = _rms(then[0][1] - then[0][0])
        for ours_then, theirs_then in then:
            way, their_way = _rms(ours - ours_then), _rms(theirs - theirs_then)
            astray = _rms((theirs - theirs_then) - (ours - ours_then))
            allowed = 5 * max(noise, _NOISE) + 0.05 * way
            if way > max(noise, _NOISE / 10) and (their_way < 0.5 * way or astray > allowed):
                raise UserError(
                    f"{url} did not load version {version} of the weights, or not all of it: its "
                    f"log-probs moved by {their_way:.2g} nats a token, the trainer's by {way:.2g}, "
                    f"{astray:.2g} away from there; now they differ by "
                    f"{np.abs(theirs - ours).max():.2g} at most"
                )
        if _rms(ours - then[1][0]) > max(noise, _NOISE / 10):
            self._moved[url] = [then[0], (ours, theirs)]

    def _versions(self) -> dict[Path, int]:
        return {path: int(path.name[-8:]) for path in self._folder.glob("version-" + 8 * "[0-9]")}

    def _remove_old(self) -> None:
        with contextlib.suppress(OSError):  # somebody else clears up too
            by_age = sorted(self._versions(), key=lambda path: (path.stat().st_mtime_ns, path.name))
            for path in [*by_age[:-_KEPT], *self._folder.glob(f"{_SCRATCH}*")]:
                shutil.rmtree(path, ignore_errors=True)


def sequence_logps(logps: Callable[..., Any], *, multiple: int = 1) -> SequenceLogps:
    """`SequenceLogps` from `(params, prompts [g, p], lengths [g], completions [g, 1, t]) -> same`.

    multiple: what the number of groups g must be a multiple of.
    """

    def of_sequences(params: Any, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        filled = [*sequences, *[sequences[0]] * (-len(sequences) % multiple)]
        tokens = np.pad(pad_prompts(filled)[0], ((0, 0), (0, 1)))
        first = np.ones(len(filled), np.int32)
        scored = np.asarray(logps(params, tokens[:, :1], first, tokens[:, None, 1:]))[:, 0]
        return [
            row[: len(sequence) - 1].astype(np.float64)
            for row, sequence in zip(scored, sequences, strict=False)
        ]

    return of_sequences


def _write(folder: Path, version: int, write: Callable[[Path], None]) -> Path:
    """A whole version on disk, under its name only then."""
    name = f"version-{version:08d}"
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        new = Path(scratch) / name
        write(new)
        for path in [*new.iterdir(), new]:
            _fsync(path)
        if (folder / name).exists():  # the caller's number comes again
            os.rename(folder / name, Path(scratch) / "old")
        os.rename(new, folder / name)
        _fsync(folder)
    return folder / name


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(rows: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.float64) for row in rows])


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))
