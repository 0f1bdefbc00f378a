"""Do the next items in a thread while the last ones are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    pass


def read_ahead(items: Iterable[Item], number: int) -> Generator[Item]:
    """Yield items that a thread makes, at most ``number`` ahead of their user.

    An exception of the thread is raised where its item would have come. Close the generator to
    end the thread.
    """
    ahead: queue.Queue[Item | BaseException | _End] = queue.Queue(number)
    is_wanted = threading.Event()
    is_wanted.set()

    def put(item: Item | BaseException | _End) -> None:
        while is_wanted.is_set():
            try:
                return ahead.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if not is_wanted.is_set():
                    return
            put(_End())
        except Exception as error:  # raised again where the items are used
            put(error)

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ahead.get(), _End):
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_wanted.clear()
        thread.join()
