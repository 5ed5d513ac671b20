"""Ctrl-C and SIGTERM as a wish that is granted between two updates, when everything is consistent and can be saved."""

import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the process to end; raised where Ctrl-C raises KeyboardInterrupt."""


class Interruption:
    """Holds Ctrl-C and SIGTERM back, as a context manager, until they are asked for; a second one acts at once.

    Outside of the main thread, where Python allows no signal handlers, signals act as ever.
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.signals = tuple(signals)
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in self.signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        if error is None:  # it came after the last update
            self.raise_received()

    def raise_received(self) -> None:
        """Raise what was held back, KeyboardInterrupt or `Terminated`; nothing where there was no signal."""
        if self.received is not None:
            raise _exception(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise _exception(number)
        self.received = number


def _exception(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
