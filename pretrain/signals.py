"""A request to stop, remembered until a step's boundary.

What is not caught kills, and importing torch takes seconds. So this imports nothing heavy, and
`__main__` makes the one `Signals` before it imports anything heavy.
"""

import os
import signal
from types import FrameType


class Signals:
    """Remembers that somebody asked the run to stop; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def leave_with(self, code: int) -> None:
        """Declare the run over: whoever interrupts from here on ends the process at once, with its exit
        code."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(code))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.received = signal.Signals(number).name
