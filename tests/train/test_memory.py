"""What a step frees is there for the next one, without a page to clear."""

import os
import subprocess
import sys

_PROGRAM = """
import resource, sys
import numpy as np
from jtl.train.memory import keep_freed_memory

print(keep_freed_memory())
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(16 * 2**20)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_a_block_that_was_freed_is_taken_again():
    kept, count = faults(JTL_KEEP_MEMORY="1")
    assert kept and count < 10


def test_it_is_left_as_it_is_unasked():
    kept, count = faults(JTL_KEEP_MEMORY="0")
    assert not kept and count > 40  # 128 MiB in pages of 2 MiB at the most


_TRIM = """
import pathlib
import numpy as np
from jtl.train.memory import give_back_memory, keep_freed_memory

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

keep_freed_memory()
block = np.ones(16 * 2**20)
above = np.ones(2**10)  # the block is a gap below it
del block
before = resident()
print(give_back_memory(), before - resident())
"""


def test_what_was_kept_goes_back_between_phases():
    def given_back(keep):
        environment = {**os.environ, "JTL_KEEP_MEMORY": keep}
        command = [sys.executable, "-c", _TRIM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        did, mib = done.stdout.split()
        return did == "True", int(mib)

    did, mib = given_back("1")
    assert did and mib > 100  # of 128
    assert given_back("0") == (False, 0)
