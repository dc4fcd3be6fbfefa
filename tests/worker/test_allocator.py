"""What a process costs the kernel: in processes of their own, as the setting stays."""

from __future__ import annotations

import platform
import sys

import pytest

from tests.support.programs import run

STEPS = """
import ctypes, resource, sys, threading, torch
from scpl_dist.worker.allocator import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault, where the kernel gives them
if sys.argv[1] == "keeping":
    assert keep_freed_memory()
torch.set_num_threads(1)

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(30 << 20)  # 120 MB, which glibc maps in any case, and then frees
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steps():
    print([step() for _ in range(20)][-1])  # a few are needed to find a place for it

steps()
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_does_not_fault_in_again_what_the_step_before_has_freed_in_whatever_thread() -> None:
    usual, keeping = (
        [int(faults) for faults in run(sys.executable, "-c", STEPS, how).stdout.split()]
        for how in ("usual", "keeping")
    )
    assert len(usual) == len(keeping) == 2
    assert max(keeping) < 100 < min(usual)
