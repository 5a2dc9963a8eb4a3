"""What goes wrong outside of a run, in plain words."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistError

LOST = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")


@contextmanager
def explained(processes: int) -> Iterator[None]:
    """Turn the errors of PyTorch and Lightning that have a cause outside of them into errors that name it.

    An OSError: other processes cannot be reached or were lost, or one that reads images was killed. A SystemExit after
    SIGTERM, of which Lightning would report success. A KeyboardInterrupt, which Lightning turns into an exit.
    """
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if text.startswith("DataLoader worker"):
            raise OSError(f"a process that reads images was killed; is there enough memory? ({text})") from error
        if processes > 1 and (isinstance(error, DistError) or any(word in text for word in LOST)):
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise OSError(
                f"the other processes cannot be reached or were lost; they meet at {place} ({text})"
            ) from error
        raise
