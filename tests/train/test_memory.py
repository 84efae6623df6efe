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
