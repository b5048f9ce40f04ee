"""In which order the emulated threads run, and when their asynchronous copies land."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

from tests.emulation.library import emulator


@dataclass(frozen=True)
class Schedule:
    """order: "forward", "reverse" or "random" (by `seed`); cp_async: "eager" or "lazy"."""

    order: str = "forward"
    seed: int = 0
    cp_async: str = "lazy"

    def __str__(self) -> str:
        seed = f"{self.seed}" if self.order == "random" else ""
        return f"{self.order}{seed}-{self.cp_async}"


ALL_SCHEDULES = tuple(
    Schedule(order, seed, cp_async)
    for cp_async in ("eager", "lazy")
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
)


@contextmanager
def running(schedule: Schedule) -> Iterator[None]:
    """Launch emulated kernels by a schedule."""
    module = emulator()
    assert module is not None, "the emulation was not built"
    before = module.schedule()
    module.set_schedule(**asdict(schedule))
    try:
        yield
    finally:
        module.set_schedule(**before)


def schedule(
    order: str = "forward", *, seed: int = 0, cp_async: str = "lazy"
) -> AbstractContextManager[None]:
    """Launch emulated kernels by the schedule of these settings."""
    return running(Schedule(order, seed, cp_async))
