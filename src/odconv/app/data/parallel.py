"""A function over many arguments, in several processes or threads, and how many of these may read images."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def each(function: Callable[[A], R], arguments: Sequence[A], workers: int | None = None) -> Iterator[R]:
    """Call a function that can be pickled with each argument, in processes, and give the results as they come.

    `workers` is how many, by default one a core; one is this process itself. It is an OSError if a process was killed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = min(workers or os.cpu_count() or 1, len(arguments))
    if workers <= 1:
        yield from map(function, arguments)
        return
    with ProcessPoolExecutor(workers, initializer=_depend_on_parent) as pool:
        try:
            for future in as_completed([pool.submit(function, argument) for argument in arguments]):
                yield future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps because memory ran out (fewer workers need less)"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def ahead(function: Callable[[A], R], arguments: Iterable[A], threads: int, count: int) -> Iterator[R]:
    """Call a function with each argument in turn, in threads, and give the results in that order.

    With 0 threads it is called when its result is asked for; else up to `count` results wait for that.
    """
    if threads == 0:
        yield from map(function, arguments)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_readers(processes: int = 1) -> int:
    """Return how many may read images for each of the processes of a machine: a core is left to itself, at most 8."""
    return min(8, max(1, count_cores() // processes - 1))


def _depend_on_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it does: a pool's processes would wait for ever for a parent killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
