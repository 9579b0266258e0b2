"""What a run tells a program of yours while it trains."""

from collections.abc import Mapping, Sequence

from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import from_first_host


class Callback:
    """To be subclassed: override what you want to hear of.

    The methods are called in the first process alone, between updates. A run with callbacks waits
    for each update to be done before it sends off the next. What a method raises ends the run with
    one line; of a single process the updates before it are saved.
    """

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """An update is done.

        Args:
            step: its number, from 1 on.
            metrics: what metrics.jsonl holds of it.

        Returns:
            True: end the session here. It is saved, and a next start goes on, as after
            `train.stop_at`.
        """

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """The held-out rows have been answered, after so many updates. Returns as `on_step_end`.

        metrics: what metrics.jsonl holds of it, as `eval/reward`.
        """

    def on_save(self, step: int) -> None:
        """A checkpoint of so many updates has been handed over; it is written in the background."""


class Callbacks:
    """All those of a run; `ending` is whether one of them has asked to end the session."""

    def __init__(self, callbacks: Sequence[Callback]):
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise UserError(f"callbacks: {callback!r} is no gvpo_jax.callbacks.Callback")
        self._callbacks, self.ending = tuple(callbacks), False

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Callback`."""
        self._tell("on_step_end", step, metrics)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Callback`."""
        self._tell("on_evaluate", step, metrics)

    def on_save(self, step: int) -> None:
        """See `Callback`."""
        self._tell("on_save", step)

    def _tell(self, event: str, step: int, *metrics: Mapping[str, float]) -> None:
        if self._callbacks:
            self.ending |= from_first_host(lambda: self._ask(event, step, *metrics))

    def _ask(self, event: str, step: int, *metrics: Mapping[str, float]) -> bool:
        ending = False
        for callback in self._callbacks:
            try:
                ending |= bool(getattr(callback, event)(step, *metrics))
            except UserError:
                raise
            except Exception as error:
                what = " ".join(f"{type(error).__name__}: {error}".split())
                name = type(callback).__name__
                raise UserError(f"{name}.{event} failed at step {step}: {what}") from error
        return ending
