"""Hosts that do something at one and the same place: threads stand for hosts, a dict for the key-value store."""

import itertools
import random
import threading
import time

import pytest

from maxlm import agreement, hosts
from maxlm.agreement import SAVE, Agreement


class Store:
    """What Agreement uses of jax's coordination service."""

    def __init__(self):
        self.items, self.lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            assert allow_overwrite or key not in self.items
            self.items[key] = value

    def key_value_dir_get(self, folder):
        time.sleep(random.random() * 0.02)
        with self.lock:
            return [(key, value) for key, value in self.items.items() if key.startswith(folder)]

    def key_value_delete(self, folder):
        with self.lock:
            self.items = {key: value for key, value in self.items.items() if not key.startswith(folder)}


@pytest.fixture
def make(monkeypatch):
    """Agreements of a number of hosts."""
    monkeypatch.setattr(agreement, "POLL_S", 0.02)

    def make(count, leave=lambda wish: None, store=None, run=0):
        monkeypatch.setattr(agreement, "_RUNS", itertools.repeat(run))
        store, made = store or Store(), []
        for host in range(count):
            monkeypatch.setattr(hosts, "service", lambda host=host: (store, host, count))
            made.append(Agreement(leave))
        return made, store

    return make


def work(agreements, wishes, steps=10_000):
    """Hosts at work, each at its own pace but never more than two programs apart.

    Args:
        agreements: one per host.
        wishes: what a host wishes, by (host, program).

    Returns:
        Per host what it did, and after how many programs.
    """
    done, found = [0] * len(agreements), [[] for _ in agreements]
    ended = [False] * len(agreements)

    def host(index):
        own, rng = agreements[index], random.Random(index)
        with own:
            own.begun = True
            while done[index] < steps:
                if (index, done[index]) in wishes:
                    own.ask(wishes.pop((index, done[index])))
                if wish := own.due():
                    found[index].append((wish, done[index]))
                    if wish != SAVE:
                        break
                    continue
                done[index] += 1
                while min(d for d in done) < done[index] - 2:  # its collectives wait for the others
                    time.sleep(0.0005)
                time.sleep(rng.random() * 0.002)
        ended[index] = True

    threads = [threading.Thread(target=host, args=(i,), daemon=True) for i in range(len(agreements))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(ended), (done, found)
    return found


def test_alone_a_wish_is_due_at_once_and_a_stop_stays(make):
    (own,), _ = make(1)
    own.begun = True
    with own:
        assert own.due() is None
        own.ask(SAVE)
        assert not own.asked
        assert (own.due(), own.due()) == (SAVE, None)
        own.ask(SAVE)
        own.ask("SIGTERM")
        own.ask(SAVE)
        assert own.asked
        assert (own.due(), own.due()) == ("SIGTERM", "SIGTERM")


@pytest.mark.parametrize("count", [2, 5, 12])
def test_all_stop_after_the_same_program_whoever_wishes_it(make, count):
    for wisher in {0, count - 1}:
        found = work(make(count)[0], {(wisher, 50): "SIGTERM"})
        assert len({at for ((_, at),) in found}) == 1
        assert found[wisher][0][0] == "SIGTERM"
        assert {wish for i, ((wish, _),) in enumerate(found) if i != wisher} == {"another host (SIGTERM)"}


def test_saves_go_on_and_wishes_of_several_hosts_come_together(make):
    agreements, store = make(3)
    found = work(agreements, {(0, 20): SAVE, (1, 20): SAVE, (2, 150): SAVE, (0, 400): SAVE, (1, 600): "SIGTERM"})
    places = [[at for _, at in events] for events in found]
    assert places[0] == places[1] == places[2]
    assert [wish for wish, _ in found[1]] == [SAVE] * (len(places[0]) - 1) + ["SIGTERM"]
    assert len({key.split("/")[2] for key in store.items}) <= 2, "keys of earlier rounds are gone"


def test_before_the_first_step_all_end_at_once_unless_one_has_begun(make, monkeypatch):
    left = []
    monkeypatch.setattr(agreement.os, "_exit", lambda code: left.append(code))
    monkeypatch.setattr(hosts, "linger", lambda host: None)
    (own,), _ = make(1, leave=left.append)
    own.ask("SIGTERM")
    assert left == ["SIGTERM", 0]
    left.clear()
    agreements, _ = make(2, leave=left.append)
    with agreements[0], agreements[1]:
        agreements[1].due()  # compiling
        agreements[0].ask("SIGTERM")
        deadline = time.monotonic() + 20
        while left.count(0) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert left.count(0) == 2
    left.clear()
    assert work(make(2, leave=left.append)[0], {(0, 0): "SIGTERM"}) and not left


def test_a_second_run_does_not_hear_the_wishes_of_the_first(make):
    agreements, store = make(2)
    assert len(work(agreements, {(0, 20): SAVE, (1, 200): "SIGTERM"})[0]) == 2
    assert work(make(2, store=store, run=1)[0], {}, steps=300) == [[], []]


def test_a_save_that_is_wished_again_before_it_is_obeyed_is_one_save(make):
    agreements, _ = make(2)
    found = work(agreements, {(0, at): SAVE for at in range(50, 53)} | {(0, 900): "SIGTERM"})
    assert [wish for wish, _ in found[0]] == [SAVE, "SIGTERM"]
