"""Calling a function ahead of time, in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


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
