"""Ctrl-C and SIGTERM between two steps rather than within one."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

PATIENCE = 1.0  # seconds that a step may still take


class Interrupt:
    """While this context is open, Ctrl-C raises KeyboardInterrupt at a moment that can be saved.

        with Interrupt() as interrupt:
            while …:
                with interrupt.hold():      what must not be cut in two
                    …
                                            KeyboardInterrupt is raised here, not inside

    A hold that outlasts PATIENCE is cut after all; `clean` is then False. A second Ctrl-C does not
    wait. `signal` is the one that came (SIGTERM is treated alike), 0 before.

    With `agree` (a signal or 0 -> what all processes of the run got) it is raised at the end of the
    hold in which all of them know, and a second one changes nothing: torchrun kills whom it has
    waited for in vain.
    """

    agree: Callable[[int], int] | None = None

    def __init__(self) -> None:
        self.signal = 0
        self.clean = True

    def __enter__(self) -> "Interrupt":
        self.before: dict[int, Any] = {
            number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)
        }
        self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._impatient)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hold(self) -> "_Hold":
        return _Hold(self)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = bool(self.signal), number
        if self.agree is not None:
            return
        if self.clean or again:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def _impatient(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


class _Hold:
    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def __enter__(self) -> None:
        self.interrupt.clean = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None:
            return  # cut in two: stays unclean
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.interrupt.clean = True
        if self.interrupt.agree is not None:
            self.interrupt.signal = self.interrupt.agree(self.interrupt.signal)
        if self.interrupt.signal:
            raise KeyboardInterrupt
