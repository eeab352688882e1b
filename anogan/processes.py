"""Several processes that work together under torchrun: ranks, agreement, noted signals, progress bars."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm

from util import InputError

# How long a process waits for another: for the slowest of a search, or for one that writes a file of pictures for all
PATIENCE = timedelta(days=1)


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[None]:
    """Join what torchrun started to one group, in which rank 0 alone prints to stdout. Without torchrun do nothing.

    Raises InputError when another process has ended.
    """
    if not distributed.is_torchelastic_launched():
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # gloo for tensors on the CPU, nccl for gradients
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "Gloo", "NCCL")):
            raise
        raise InputError("another process of this group has ended or cannot be reached: see what it says") from error
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0; 0 if there is one process only."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def largest(*numbers: float) -> list[float]:
    """The largest of all processes' values of each number. Every process must ask."""
    if not distributed.is_initialized():
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def from_all(value: Any) -> list[Any]:
    """Every process's value, by rank. Every process must ask."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def check_agreement(**facts: Any) -> None:
    """Raise InputError, naming the fact, unless it is the same in every process. Every process must ask."""
    for name in facts:
        if len({repr(each[name]) for each in from_all(facts)}) > 1:
            raise InputError(
                f"the processes do not have the same {name.replace('_', ' ')}: every machine needs the same run "
                "folder and data, and a --precision that its hardware allows"
            )


def wait_for_all() -> None:
    """Go on when every process has reached this line."""
    if distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def first_here_first() -> Iterator[None]:
    """Let the first process of each machine do this, such as a download, before the others. Every process must."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM only add their number to this list, so that a loop can stop between two steps.

    A second one stops at once. Under torchrun it does not, since there one Ctrl-C arrives twice.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted and not distributed.is_initialized():
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """Rank 0's bar on stderr: redrawn ten times a second on a terminal, every half minute in a log file."""
    return tqdm(total=total, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 30, disable=rank() > 0, **options)


def say_how_long(shares: list[int], rate: float, what: str) -> None:
    """Before the night is spent: how long a search takes, in which each process has so many images or patches to do, at
    so many a second."""
    seconds = max(max(shares) / rate, 2)
    time_left = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    if seconds > 5400:
        time_left = f"{seconds / 3600:.1f} hours"
    if rank() == 0:
        each = " in each process" if len(shares) > 1 else ""
        tqdm.write(f"{sum(shares)} {what} to search: about {time_left}, at {rate:.3g} a second{each}")
