"""Work that runs ahead in a thread: order, errors, and an end in time."""

import threading
import time
from contextlib import closing

import pytest

from nucseg.data.prefetch import ahead, in_threads


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_items_come_in_order(limit):
    assert list(ahead(iter(range(20)), limit)) == list(range(20))
    assert list(ahead([], limit)) == []


def test_work_goes_on_while_the_caller_is_busy_but_not_further_than_the_limit():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    with closing(ahead(items(), 2)) as line:
        assert next(line) == 0
        time.sleep(0.3)
        assert made == [0, 1, 2, 3]  # one taken, two that wait, one that is held


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("damaged")

    line = ahead(items())
    assert next(line) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(line)


def test_the_thread_ends_when_the_caller_stops_and_closes_what_it_ran():
    closed, before = [], threading.active_count()

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    with pytest.raises(KeyboardInterrupt), closing(ahead(items())) as line:
        next(line)
        raise KeyboardInterrupt
    assert threading.active_count() == before
    assert closed and closed[0] != threading.main_thread().name


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_keep_the_order_and_raise_errors_in_their_place(workers):
    def slow(i):
        time.sleep(0.01 * (i % 3))
        return 10 // (i - 7)

    got = []
    with pytest.raises(ZeroDivisionError):
        for result in in_threads(slow, range(20), workers):
            got.append(result)
    assert got == [10 // (i - 7) for i in range(7)]
    assert list(in_threads(slow, [], workers)) == []


def test_threads_compute_at_the_same_time_but_no_further_than_their_number():
    together = threading.Barrier(3, timeout=5)
    started = []

    def meet(i):
        started.append(i)
        if i < 3:
            together.wait()  # passes only if three are under way
        return i

    line = in_threads(meet, iter(range(50)), 3)
    assert next(line) == 0
    time.sleep(0.2)
    assert max(started) <= 3
    line.close()
    assert len(started) <= 4
