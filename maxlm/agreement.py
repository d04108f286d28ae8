"""When a signal, a clock or a callback is obeyed: by all hosts at one and the same place of their work."""

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from maxlm import heartbeat, hosts

SAVE = "save"
"""The wish for a temporary save; every other one stops the run and says who wishes it."""
TERM = "SIGTERM"
"""The wish of a machine that will not wait. Ctrl-C may come from a notebook, whose process must not end."""
POLL_S = 0.5
"""Hosts look so often, in seconds, whether another one wishes something."""
_RUNS = itertools.count()  # of this process: all hosts train them in the same order


class Agreement:
    """Finds the place at which all hosts do what one of them wishes.

    All hosts start the same programs in the same order, and count them: `due` comes before each. When a host wishes
    something, every host stops counting and tells its count, from a thread, since its main one may wait for the others
    in a collective. The highest count is the place: no host is beyond it, and who is behind goes on up to it. It
    takes about a second and no collective of the devices. On a single host a wish is due at once.

    A SIGTERM that comes before any host has finished a step would save nothing new, and compiling may take longer than
    the machine is still there: then all processes end at once.
    """

    def __init__(self, leave: Callable[[str], None]):
        """Prepares it; entering it as a context manager starts it.

        Args:
            leave: is called with the wish, before the process ends because no step was finished.
        """
        self.begun = False
        self._leave = leave
        self._wish: str | None = None
        self._count, self._round = 0, 0
        self._frozen, self._said, self._place, self._agreed = False, "", 0, ""
        self._changed = threading.Condition()
        self._client, self._host, self._num_hosts = hosts.service()
        self._folder = f"maxlm/wish/{next(_RUNS)}/"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="maxlm-agreement", daemon=True)

    def __enter__(self) -> "Agreement":
        if self._num_hosts > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(10 * POLL_S)

    @property
    def asked(self) -> bool:
        """Whether this host is to stop, and is alone: then it need not finish what others would wait for."""
        return self._num_hosts == 1 and self._wish not in (None, SAVE)

    def ask(self, wish: str) -> None:
        """Wishes something, from any thread: SAVE, or what stops the run. A stop replaces the wish for a save."""
        with self._changed:
            if self._wish in (None, SAVE):
                self._wish = wish
        if self.asked and not self.begun and wish == TERM:
            self._end(wish)

    def due(self) -> str | None:
        """The wish to obey here; None: the next program may start, and is counted."""
        with self._changed:
            if self._num_hosts == 1:
                wish, self._wish = self._wish, None if self._wish == SAVE else self._wish
                return wish
            self._changed.wait_for(lambda: not self._frozen or self._agreed)
            if self._frozen and self._count == self._place:
                wish, self._agreed, self._frozen = self._agreed, "", False
                self._round += 1
                if self._wish == SAVE:  # wished again by a clock, before it was obeyed
                    self._wish = None
                return wish
            self._count += 1
            return None

    # ---- inside: the thread of each of many hosts

    def _run(self) -> None:
        while not self._closing.wait(POLL_S / 5 if self._frozen else POLL_S):
            with contextlib.suppress(*hosts.NO_ANSWER):  # a service that is gone for good ends the process itself
                self._look()

    def _look(self) -> None:
        with self._changed:
            if self._agreed:  # and not yet obeyed
                return
            folder = f"{self._folder}{self._round}/"
        if not self._frozen:
            if self._wish is not None:
                self._client.key_value_set(f"{folder}asked", "", allow_overwrite=True)
            if not self._client.key_value_dir_get(folder):
                return
            with self._changed:
                self._said = json.dumps([self._count, self._wish, self.begun])
                self._frozen, self._wish = True, None
        self._client.key_value_set(f"{folder}at/{self._host}", self._said, allow_overwrite=True)
        found = self._client.key_value_dir_get(f"{folder}at/")
        if len(found) == self._num_hosts:
            self._agree({int(key.rpartition("/")[2]): json.loads(text) for key, text in found})
            if self._host == 0 and self._round:  # all hosts are beyond it
                self._client.key_value_delete(f"{self._folder}{self._round - 1}/")

    def _agree(self, said: dict[int, Any]) -> None:
        stops = [host for host, (_, wish, _) in sorted(said.items()) if wish not in (None, SAVE)]
        wish = SAVE
        if stops:
            wish = said[self._host][1] if self._host in stops else f"another host ({said[stops[0]][1]})"
            if any(said[host][1] == TERM for host in stops) and not any(begun for _, _, begun in said.values()):
                self._end(wish)
        with self._changed:
            self._place, self._agreed = max(count for count, _, _ in said.values()), wish
            self._changed.notify_all()

    def _end(self, wish: str) -> None:
        try:
            heartbeat.beat(heartbeat.STOPPED, 0)
            self._leave(wish)
            hosts.linger(self._host if self._num_hosts > 1 else None)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)
