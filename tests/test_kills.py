"""Thirty kills at random moments change no weight: of one process, of one of two, and of one of two nodes."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from small_runs import OPTIONS, RANDOM, checkpoint, children, same_weights
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from odconv.app.cli import main
from odconv.app.data.pack import pack
from odconv.app.engine.checkpoint_io import LAST

KILLS = 30
SECONDS = 600  # that anything may take on a busy machine

# forks processes that have imported everything; what is done before that is none of ours
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["tiny", "odconv.app.classify.run", "test_kills"])


def wait_until(holds: Callable[[], bool], running: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert running(), "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def tree(pid: int) -> Iterator[int]:
    """A process and all that it has started, as they are lost with a machine."""
    yield pid
    for child in children(pid):
        yield from tree(child)


def kill(*pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            continue


def odconv_main(words: list[str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for those that read images; else it is as for this process
    sys.exit(main(words))


def torchrun(options: tuple[str, ...], words: list[str]) -> None:
    """What the command does, but that its processes are forked from this one."""
    arguments = ["--max-restarts=1000", "--start-method=fork", *options, "-m", "odconv"]
    config = config_from_args(get_args_parser().parse_args(arguments))[0]
    elastic_launch(config, odconv_main)(words)


class Alone:
    """One process, and another one that reads images for it; both are killed and started again."""

    commands: tuple[tuple[str, ...], ...] = ((),)

    def __init__(self, words: list[str], random: Random) -> None:
        self.words, self.random = words, random
        self.processes = [self.bring_up(options) for options in self.commands]

    def bring_up(self, options: tuple[str, ...]) -> Any:
        target, arguments = (torchrun, (options, self.words)) if options else (odconv_main, (self.words,))
        process = WARM.Process(target=target, args=arguments)
        process.start()
        return process

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def lose_last(self) -> None:
        """Kill all of the last process, as if its machine were lost, and bring it back."""
        lost = self.processes.pop()
        kill(*tree(lost.pid))
        lost.join()
        self.processes.append(self.bring_up(self.commands[-1]))

    def kill_and_bring_back(self) -> None:
        self.lose_last()

    def kill_all(self) -> None:
        for process in self.processes:
            kill(*tree(process.pid))
            process.join()

    def finish(self) -> int:
        for process in self.processes:
            process.join(SECONDS)
        return max(process.exitcode for process in self.processes)


class TwoProcesses(Alone):
    """Two processes under torchrun; one of them is killed, and torchrun ends the other and starts both again."""

    commands = (("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc_per_node=2"),)  # as --standalone

    def trainers(self) -> set[int]:
        return {pid for process in self.processes for pid in children(process.pid)}

    def kill_and_bring_back(self) -> None:
        wait_until(lambda: len(self.trainers()) == 2, self.running)
        before = self.trainers()
        kill(self.random.choice(sorted(before)))
        wait_until(lambda: not before & self.trainers(), self.running)


class TwoNodes(TwoProcesses):
    """Two torchruns as on two machines, each with one process; one machine is lost and comes back."""

    given_up = 0

    def __init__(self, words: list[str], random: Random) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
        common = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", place, "--local-addr=127.0.0.1")
        # a machine that is lost is missed after five seconds
        conf = "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=5,is_host"
        self.commands = tuple((*common, f"{conf}={host}") for host in ("true", "false"))
        super().__init__(words, random)

    def running(self) -> bool:
        """Start a torchrun again that has given up, as a scheduler does, but not for ever.

        It gives up where the other machine is lost after both have met and before each knows who the other is.
        """
        for node, process in enumerate(self.processes):
            if not process.is_alive():
                process.join()
                self.given_up += 1
                self.processes[node] = self.bring_up(self.commands[node])
        return self.given_up < KILLS

    def kill_and_bring_back(self) -> None:
        before = self.trainers()
        self.lose_last()
        wait_until(lambda: not before & self.trainers(), self.running)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind"),
    [("folder", Alone), ("shards", Alone), ("folder", TwoProcesses), ("folder", TwoNodes)],
    ids=["folder", "shards", "two processes", "two nodes"],
)
def test_kills_at_random_moments_change_no_weight(
    source: str,
    kind: type[Alone],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else gloo meets the addresses of the first start
    data, whole, killed = folder, tmp_path / "whole", tmp_path / "killed"
    if source == "shards":
        data = tmp_path / "shards"
        pack(data=str(folder), out=str(data), shard_mb=0.05, workers=1)
    options = OPTIONS | RANDOM | {"data": data, "workers": 1, "resume": "auto"}
    # these images are noise: at temperature 1 the gradients would soon explode; no schedule depends on the last epoch
    options |= {"temp_epoch": 1000, "lr_decay": "step"}

    def begin(kind: type[Alone], out: Path, **more: object) -> Alone:
        words = [f"--{name}={value}" for name, value in (options | more | {"out": out}).items()]
        return kind(["train", *words], random)

    def written() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    def moment() -> str:
        if written() == before:
            return "starting"
        return "saving" if any(killed.glob(".*.partial")) else "training"

    random, last, steps, moments = Random(0), killed / LAST, [], Counter()
    run = begin(kind, killed, save_every=2, epochs=1000)
    start, before = time.monotonic(), 0
    try:
        wait_until(lambda: moment() != "starting", run.running)
        starting = time.monotonic() - start
        for _ in range(KILLS):
            wanted = random.choice(["starting", "training", "saving"])
            if wanted == "starting":
                time.sleep(random.uniform(0, starting))
            else:
                wait_until(lambda: moment() != "starting", run.running)
                time.sleep(random.uniform(0, 0.5))
            if wanted == "saving":
                wait_until(lambda: moment() == "saving", run.running)
                time.sleep(random.uniform(0, 0.1))
            moments[moment()] += 1
            run.kill_and_bring_back()
            before = written()
            steps.append(checkpoint(last)["global_step"])
    finally:
        run.kill_all()
    epochs = checkpoint(last)["epoch"] + 2
    assert begin(kind, killed, epochs=epochs).finish() == 0
    assert begin(TwoProcesses if kind is TwoNodes else kind, whole, epochs=epochs).finish() == 0
    with capsys.disabled():
        print(f"\n{KILLS} kills, {dict(moments)}; the last checkpoints at steps {steps}, {epochs} epochs")
    assert same_weights(last, whole / LAST)
