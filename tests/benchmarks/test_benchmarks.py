"""The benchmark runs, and the work it counts per step is what we promise; nothing here depends on time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_counts_the_work_of_each_step(comfyui):
    script = Path(__file__).with_name("run.py")
    run = subprocess.run([sys.executable, str(script), "--quick"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = dict(re.findall(r"^\| (subject|style)[^|]*\| ([^|]*) \|", run.stdout, flags=re.MULTILINE))
    assert rows == {
        "subject": "2 rows, 2 text passes, 0 VAE",  # the policy's caption, in both text encoders
        "style": "2 rows, 0 text passes, 0 VAE",
    }
    assert re.search(r"^\| \[3\] \| \[2, 1\] \|", run.stdout, flags=re.MULTILINE)
    difference = float(re.search(r"\| ([\d.]+e[+-]\d+) \|$", run.stdout, flags=re.MULTILINE).group(1))
    assert difference < 1e-4
