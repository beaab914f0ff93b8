"""What a person sees of a run: a progress bar with loss, speed and time left, or plain lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class RunDisplay:
    """A context manager that shows the progress of the steps made inside it. Call `update` after each step, `warn` at any
    time."""

    def __init__(self, title: str, total: int, console: Console | None = None):
        self.console = console or Console()
        self._title, self._total, self._last_line = title, total, -LINE_EVERY_S
        self._progress = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._task = self._progress.add_task(title, total=total, text="")

    def __enter__(self) -> "RunDisplay":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_exception) -> None:
        if self._progress:
            self._progress.stop()

    def start_at(self, step: int) -> None:
        """Sets the step at which a resumed run begins. Only the steps after it are used to estimate the time left."""
        self._started, self._first = time.perf_counter(), step
        if self._progress:
            self._progress.reset(self._task, completed=step, total=self._total, text="")

    def update(self, step: int, text: str) -> None:
        """Shows that `step` steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step, text=text)
            return
        now = time.perf_counter()
        if now - self._last_line >= LINE_EVERY_S or step == self._total:
            self._last_line = now
            left = (now - self._started) / max(1, step - self._first) * (self._total - step)
            self.say(f"{self._title} {step}/{self._total}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Prints a line above the bar, unchanged: brackets in a path are not taken for markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a highlighted line above the bar."""
        self.console.print(f"warning: {text}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)
