"""The progress bar of a run, on stderr: a bar on a terminal, and a line now and then in a file.

What is left is estimated from the time between steps, without that of compilation and of whatever
comes before the first step.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Self, TextIO

from tqdm import tqdm

# Seconds from one update to the next; a file keeps them all. What begins, as a compilation, is
# shown earlier.
_ON_TERMINAL, _IN_FILE, _ACTIVITY = 0.5, 10.0, 1.0
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_COUNTS = " {n_fmt}/{total_fmt}"


class ProgressBar:
    """A bar over steps, or over other units of work.

    Args:
      total: number of units.
      initial: number of units that are done.
      has_counts: whether the numbers of units are shown.
      is_hidden: whether nothing is shown.
      file: the file to write to, by default stderr.
      now: clock, in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        has_counts: bool = True,
        is_hidden: bool = False,
        file: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = sys.stderr if file is None else file
        self._is_terminal = self._file.isatty()
        form = _BAR if self._is_terminal else _LINE
        self._form = form if has_counts else form.replace(_COUNTS, "")
        self._total, self._done, self._is_hidden = total, initial, is_hidden
        self._now, self._begin, self._paused = now, now(), 0.0
        self._description = self._postfix = self._activity = ""
        self._first: tuple[int, float] | None = None  # units and seconds at the first update
        self._drawn, self._width = -1e9, 0  # when it was drawn last, and how wide

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, units: int = 1) -> None:
        """Counts units of work that have been done."""
        self._done += units
        if self._first is None:
            self._first = self._done, self._measure()
        self._draw_if_due(_ON_TERMINAL if self._is_terminal else _IN_FILE)

    def skip(self, units: int) -> None:
        """Counts units that took no time here, as those that were done before a run goes on."""
        self._done += units
        if self._first is not None:
            self._first = self._first[0] + units, self._first[1]

    @contextlib.contextmanager
    def during(self, activity: str, *, is_work: bool = False) -> Iterator[None]:
        """Shows what goes on in the block, whose time is that of steps only if it is work."""
        begin, before, self._activity = self._now(), self._activity, activity
        wait = _IN_FILE if is_work else _ACTIVITY
        self._draw_if_due(0.0 if self._is_terminal else wait)
        try:
            yield
        finally:
            self._activity = before
            self._paused += 0.0 if is_work else self._now() - begin
            if before and self._is_terminal:
                self._draw_if_due(0.0)

    def describe(self, text: str) -> None:
        """Sets the text before the bar, which the next update shows."""
        self._description = f"{text}: " if text else ""

    def show(self, text: str) -> None:
        """Sets the text behind the bar, which the next update shows."""
        self._postfix = text

    def write(self, text: str) -> None:
        """Writes a line above the bar."""
        if not self._is_hidden:
            self._clear()
            self._put(f"{text}\n")

    def close(self) -> None:
        """Shows how far it came, and ends the line."""
        self._draw_if_due(0.0)
        if self._is_terminal and not self._is_hidden:
            self._put("\n")
        self._is_hidden = True

    def _draw_if_due(self, seconds: float) -> None:
        if self._is_hidden or self._now() - self._drawn < seconds:
            return
        self._drawn = self._now()
        line = self._format()
        if self._is_terminal:
            self._clear()
            self._width = len(line)
        self._put(line if self._is_terminal else f"{line}\n")

    def _clear(self) -> None:
        if self._is_terminal:
            self._put("\r" + " " * self._width + "\r")

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def _format(self) -> str:
        return tqdm.format_meter(
            n=self._done,
            total=self._total,
            elapsed=self._now() - self._begin,
            rate=self._estimate_rate(),
            prefix=self._description,
            postfix=self._activity or self._postfix,
            bar_format=self._form,
            ncols=shutil.get_terminal_size().columns - 1 if self._is_terminal else None,
        )

    def _measure(self) -> float:
        """Measures the seconds so far that were none of a pause."""
        return self._now() - self._begin - self._paused

    def _estimate_rate(self) -> float:
        """Estimates units per second; 0 if it is too early to say."""
        if self._first is None:
            return 0.0
        units, seconds = self._done - self._first[0], self._measure() - self._first[1]
        return units / seconds if units > 0 and seconds > 0 else 0.0
