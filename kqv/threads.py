"""
How many threads compute on a CPU: one a core that is free when the command starts.

The threads of OpenMP, which torch uses, spin while they wait for each other. Where another process keeps one
of two cores busy, two threads are several times slower than one: the one that runs waits for the one that
does not.
"""

import os
import time

STAT = "/proc/stat"  # what each core has done since the machine started

SHARE = "/sys/fs/cgroup/cpu.max"  # of the CPU, that a container may take

begun = None  # what `reading` gave last


def begin():
    """Begin to count what other processes do. A command does so before its slow imports."""
    global begun
    begun = reading()


def choose(device, saved=None, repeatable=False):
    """
    Set how many threads compute, where the device is a CPU -> lines about it for the user.

    It is the number in OMP_NUM_THREADS, which torchrun sets too. Else it is `saved`, that of the run to go on
    with, if there are so many cores: so results stay the same bit for bit. Else it is one a free core; or one
    a core, where results are to be `repeatable` whatever else runs.
    """
    import torch  # slow, and preparing text does without

    if device.type != "cpu":
        return []
    given, limit = bool(os.environ.get("OMP_NUM_THREADS")), core_limit()
    most = torch.get_num_threads() if given else min(torch.get_num_threads(), limit)
    free = min(most, free_cores())
    if given:
        count = most
    elif saved and saved <= limit:
        count = saved
    else:
        count = most if repeatable else free
    torch.set_num_threads(count)
    begin()
    if saved and count != saved:
        return [f"the run had {named(saved)} and has {named(count)} now: results differ in their last bits"]
    if given or count == free == most:
        return []
    if count == free:
        return [f"{named(count)}, as other processes keep cores busy; OMP_NUM_THREADS={most} overrules that"]
    return [
        f"{named(count)}, so that results repeat bit for bit; OMP_NUM_THREADS={free} may be faster just now"
    ]


def crowded(device):
    """Lines for the user where other processes have come to use cores that threads need."""
    import torch

    count, free = torch.get_num_threads(), free_cores()
    begin()
    if device.type != "cpu" or free >= count:
        return []
    return [
        f"other processes keep cores busy, and {named(count)} wait for each other: stop the run "
        f"and resume it with OMP_NUM_THREADS={free}, which is faster"
    ]


def named(count):
    return f"{count} thread{'s' * (count > 1)}"


def core_limit():
    """How many cores this process may use: what it may run on, or its container's share of the CPU."""
    try:
        with open(SHARE) as file:
            quota, period = map(int, file.read().split())
    except (OSError, ValueError):  # there is no limit
        return len(own_cores())
    return max(1, min(len(own_cores()), quota // period))


def free_cores():
    """How many of the cores that this process may run on no other process has used since `begin`, or 1."""
    if not begun:  # not a command but a notebook
        return len(own_cores())
    seconds, all_used, used_here = (now - then for now, then in zip(reading(), begun, strict=True))
    return max(1, round(len(own_cores()) - (all_used - used_here) / seconds))


def reading():
    """
    (seconds, CPU seconds that all processes have used on the cores of this one, CPU seconds of this process).
    Where the system does not tell the second, it is 0, and all cores are free.
    """
    ticks, names = 0, {f"cpu{core}" for core in own_cores()}
    try:
        with open(STAT) as file:
            for name, *numbers in map(str.split, file):
                if name in names:
                    user, nice, system, _idle, _io_wait, *others = map(int, numbers[:8])
                    ticks += user + nice + system + sum(others)  # interrupts, and what other machines took
    except (OSError, ValueError):
        pass
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def own_cores():
    """The numbers of the cores that this process may run on."""
    known = hasattr(os, "sched_getaffinity")
    return os.sched_getaffinity(0) if known else range(os.cpu_count() or 1)
