"""The folder of a run: made, kept from others, and nothing in it lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from odconv.files import check_writable
from odconv.train.files import BEST, LAST, PREVIOUS

LOCK = ".lock"
LOCK_WAIT = 10
"""Seconds; processes that read images for a run that was killed hold its lock for some 5 s longer."""

CONFIG, RESULT = "config.yaml", "result.json"


@contextmanager
def claim(out: Path, resume: str | None) -> Iterator[None]:
    """Make the folder of the run and keep others out of it; see that it holds nothing that would be lost.

    Raises:
        FileExistsError: it holds something that the run does not go on with.
        OSError: another run is writing to it, or it cannot be written.
    """
    check_writable(out)
    _check_content(out, resume)
    lock = FileLock(out / LOCK, timeout=LOCK_WAIT)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"another run is writing to {out}") from error
    try:
        _check_content(out, resume)  # another run may have been quicker
        for partial in out.glob(".*.partial"):  # of a run that was killed
            partial.unlink()
        yield
    finally:
        lock.release()


def _check_content(out: Path, resume: str | None) -> None:
    names = {path.name for path in out.iterdir()} - {LOCK}
    if resume == "auto":
        # a run that was killed before its first checkpoint begins anew; somebody else's folder is left alone
        if names and not names & {LAST, PREVIOUS, CONFIG}:
            raise FileExistsError(f"the output folder {out} is not empty and holds no run to go on with")
        if (out / BEST).exists() and not names & {LAST, PREVIOUS}:
            raise FileNotFoundError(f"{out} holds {BEST} but neither {LAST} nor {PREVIOUS}: there is nothing to resume")
    elif names and (resume is None or out.resolve() not in Path(resume).resolve().parents):
        raise FileExistsError(f"the output folder {out} is not empty; resume=auto goes on with a run that is in it")
