"""What signals mean to a server: SIGTERM and SIGINT drain it, a second one cuts that short, SIGHUP
reads files again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

from packhorse.serve.engines.processes import end_children

logger = logging.getLogger("packhorse")

LAST_RESORT_S = 5.0


class Signals:
    """Make it in the event loop that is to be told."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._reload: Callable[[], None] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_stop)

    def _on_stop(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
            # What cannot be interrupted, such as the import of vllm, is not waited for.
            self._loop.call_later(LAST_RESORT_S, _end_at_once)
        self.stop.set()

    def take_hangups(self, reload: Callable[[], None] | None) -> None:
        """SIGHUP says that the terminal is gone from which the server was started: it drains.
        Without a terminal it means what it means to daemons: `reload`, if there is anything to.
        Who started the server with SIGHUP ignored (`nohup`) has said what it is to do.
        """
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            return
        self._reload = reload
        has_terminal = sys.stdin is not None and sys.stdin.isatty()
        handler = self._on_stop if has_terminal else self._on_reload
        self._loop.add_signal_handler(signal.SIGHUP, handler)

    def _on_reload(self) -> None:
        if self._reload is None:
            logger.info("SIGHUP: this server has no routes that could be read again")
        else:
            self._reload()


def _end_at_once() -> None:
    end_children()
    os._exit(0)
