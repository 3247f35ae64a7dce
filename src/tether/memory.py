"""Memory: the most that was held at once in a phase, what is freed, and what Python's collector looks through.

Held is what torch's tensors hold of a GPU, on a CPU what the whole process does. The system keeps one such figure, and
whoever measures begins it anew; so every measurement goes through here, that of the whole process as well. Where the
system cannot be asked there is no figure: resident memory is known on Linux alone.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

MIB = 2**20
WORTH = 128 * MIB
GROUP = Path("/sys/fs/cgroup")

_measuring: WeakSet[PeakMemory] = WeakSet()
_keeps = False  # whether memory that is freed stays with the process
_apart = True  # whether it is given back between phases all the same
_left_alone = False  # whether `old_objects_left_alone` holds; Python 3.12 has frozen objects of its own
_resident_after = 0  # bytes that the process held when memory was given back last
_of_process: dict[torch.device, int] = {}  # bytes: the most before the figure was begun anew


class PeakMemory:
    """The most memory held since it was made and since each `lap`. Several may measure at once.

    Args:
        device: whose memory: that of this GPU, or for `cpu` the resident memory of this process, model and all.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = _one(device)
        self._apart = _begin_apart()
        self._before = 0  # bytes, before another measurement began the figure anew
        _begin_anew(self.device)
        _measuring.add(self)

    def peak(self) -> float | None:
        """MiB since the last lap; None where the system does not tell, or where what was freed before may count."""
        known = _begin_anew(self.device) and (self._apart or self.device.type != "cpu")
        return self._before / MIB if known else None

    def lap(self) -> float | None:
        """The same, and what follows is measured anew."""
        peak = self.peak()
        self._apart = _begin_apart()
        if _keeps:
            _begin_anew(self.device)
        self._before = 0
        return peak


@contextmanager
def phases_apart(apart: bool) -> Iterator[None]:
    """Whether, within this context, much memory that is free goes back to the system where a phase ends.

    Only then is it not taken for the next phase's, so only then is that one's peak known. But it takes time to have the
    memory anew: a twentieth of an iteration of PPO.
    """
    global _apart
    before, _apart = _apart, apart
    try:
        yield
    finally:
        _apart = before


def process_peak(device: torch.device | str = "cpu") -> float | None:
    """MiB since the process began, whatever has been measured meanwhile; None where the system does not tell.

    What others ask the system for, such as `ru_maxrss` of getrusage, begins anew with each measurement.
    """
    device = _one(device)
    now = _peak(device)
    return None if now is None else max(_of_process.get(device, 0), now) / MIB


def _one(device: torch.device | str) -> torch.device:
    """The device by its number, so that `cuda` and `cuda:0` are the same."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _peak(device: torch.device) -> int | None:
    """Bytes since the figure was begun anew."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu":
        try:
            status = Path("/proc/self/status").read_bytes()
        except OSError:  # no Linux
            return None
        for line in status.splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _begin_anew(device: torch.device) -> bool:
    """Begin the figure anew, once everyone who measures has it; False where that cannot be done."""
    peak = _peak(device)
    if peak is None:
        return False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            # proc_pid_clear_refs(5): sets the peak to the present; no page is looked at, so it costs microseconds
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a kernel without it, or one that forbids it
            return False
    _of_process[device] = max(_of_process.get(device, 0), peak)
    for measurement in _measuring:
        if measurement.device == device:
            measurement._before = max(measurement._before, peak)
    return True


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that could be had now; None where the system does not tell. A container's own limit counts."""
    device = _one(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        words = Path("/proc/meminfo").read_text(encoding="utf-8").split()
        free = int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return None
    try:
        return min(free, _left_to_group())
    except (OSError, ValueError):  # no limit ("max"), or no such file
        return free


def _left_to_group() -> int:
    """Bytes up to the limit of the control group (cgroup v2); files that the system keeps at hand count as free."""
    limit, used = (int((GROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
    lines = (GROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
    kept = {name: int(size) for name, _, size in (line.partition(" ") for line in lines)}
    return limit - used + kept.get("active_file", 0) + kept.get("inactive_file", 0)


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory it frees for what it allocates next; returns whether the system can do that.

    glibc gives every large block back to the system at once, and each minibatch then pays again for the first touch of
    every page: a fifth of PPO's time on a CPU. Only between phases is memory given back then, where a `PeakMemory`
    laps and there is much of it. False: as glibc does it by itself.
    """
    global _keeps
    set_option = _from_c("mallopt")
    if set_option is None:
        return False
    # the default values of malloc.h, where there is no environment variable to set others
    mapped_blocks, trim_threshold = (0, 2**31 - 1) if keep else (65536, 128 * 1024)
    _keeps = bool(set_option(-4, mapped_blocks)) and bool(set_option(-1, trim_threshold)) and keep  # M_MMAP_MAX, M_TRIM
    _give_back()
    return _keeps == keep


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Within this context Python's garbage collector does not look through the objects that there were before it.

    A run makes many short-lived objects, and from time to time the collector goes through all others, too: hundreds of
    thousands of imported ones, a tenth of a second, 6 % of training CartPole. Within another such context nothing
    changes.
    """
    global _left_alone
    if _left_alone:
        yield
        return
    _left_alone = True
    gc.collect()
    gc.freeze()
    thaw = gc.unfreeze  # where the interpreter ends within this context, the module's own names are gone by then
    try:
        yield
    finally:
        _left_alone = False
        thaw()


def _begin_apart() -> bool:
    """Give back what is free where that is wanted; whether a phase begins without much of what the last one held."""
    if not _keeps or _resident() - _resident_after < WORTH:
        return True
    if _apart:
        _give_back()
    return _apart


def _give_back() -> None:
    """Return what is free to the system."""
    global _resident_after
    if (trim := _from_c("malloc_trim")) is not None:
        trim(0)
    _resident_after = _resident()


def _resident() -> int:
    """Bytes that this process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * mmap.PAGESIZE
    except OSError:  # no Linux
        return 0


def _from_c(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
