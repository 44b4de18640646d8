"""How far a long command is: a bar on a terminal; elsewhere, a plain line every so many seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Self, TypeVar

from tqdm import tqdm

Item = TypeVar('Item')


class Meter:
    """How much of a long piece of work is done, on the standard error stream.

    Args:
        what: What is being done, as 'scoring'.
        total: How much there is to do.
        unit: Of what, in the plural.
        shows: Whether this process shows anything.
        seconds: Between two lines, where there is no terminal.
    """

    def __init__(self, what: str, total: int, unit: str, shows: bool = True, seconds: float = 10.0) -> None:
        self.what, self.total, self.unit, self.seconds = what, total, unit, seconds if shows else float('inf')
        self.start = self.said = time.perf_counter()
        bar = shows and sys.stderr.isatty()
        self.bar: Any = tqdm(desc=what, total=total, unit=f' {unit}', leave=False) if bar else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()

    def at(self, done: float) -> None:
        """So much is done."""
        done, now = min(done, self.total), time.perf_counter()
        with suppress(OSError):  # the terminal is closed, or the reader of a pipe has gone: the work goes on
            if self.bar is not None:
                self.bar.update(done - self.bar.n)
            elif now - self.said > self.seconds:
                self.said = now
                left = (now - self.start) / done * (self.total - done) / 60 if done else float('nan')
                print(
                    f'{self.what} {done:,.0f} of {self.total:,} {self.unit}, {left:.1f} min left',
                    file=sys.stderr,
                    flush=True,
                )

    def say(self, words: str) -> None:
        """A line of the standard output that leaves the bar whole."""
        if self.bar is None:
            print(words, flush=True)
        else:
            self.bar.write(words)


def counted(
    items: Iterable[Item], what: str, total: int, unit: str, step: int = 1, shows: bool = True, seconds: float = 10.0
) -> Iterator[Item]:
    """Items, each of which is `step` units of the work; see `Meter`. One is done when the next is asked for."""
    with Meter(what, total, unit, shows, seconds) as meter:
        for i, item in enumerate(items):
            if i:
                meter.at(i * step)
            yield item
