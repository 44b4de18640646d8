"""Memory that was freed is not asked of the system again."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / 'linvision' / 'train' / 'freed_memory.py'
FAULTS = """
import resource, runpy, sys
kept = sys.argv[2] == 'keep' and runpy.run_path(sys.argv[1])['keep_freed_memory']()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**25)
before = faults()
for _ in range(4):
    bytearray(2**25)
print(kept, faults() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='another C library')
def test_arrays_that_were_freed_cost_no_page_faults_again():
    found = {}
    for way in ('plain', 'keep'):
        out = subprocess.run([sys.executable, '-c', FAULTS, str(FILE), way], capture_output=True, text=True, check=True)
        found[way] = out.stdout.split()
    if found['keep'][0] != 'True':
        pytest.skip('this C library has no mallopt')
    assert int(found['keep'][1]) < 100 < int(found['plain'][1])
