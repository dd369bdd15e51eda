"""Iterating ahead in background threads."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], limit: int = 2) -> Generator[T, None, None]:
    """Yield the items of an iterable, which a thread computes up to ``limit`` items ahead (0: without limit).

    NumPy, torch and file reading release Python's global lock, so the thread works while the caller computes. An error
    in the thread is raised here, after the items before it. Close the generator if you stop early
    (`contextlib.closing`): the thread then ends once it has finished its current item.
    """
    line: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(limit)
    stopped = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                line.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:
            put(_END, error)
        finally:
            if isinstance(items, Generator):
                items.close()  # here, so that what it has open is closed in its own thread

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = line.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def in_threads(function: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """Yield ``function(item)`` for each item in order; ``workers`` threads compute (1: the caller's own).

    ``items`` are drawn in the caller's thread, at most ``workers`` ahead of the result that is yielded. An error is
    raised in place of its item's result.
    """
    if workers < 2:
        yield from map(function, items)
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
