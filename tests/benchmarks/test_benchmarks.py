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
    assert "| attention sharing | [2, 4], 0 VAE | [2, 2, 2], 1 VAE |" in run.stdout
    assert "| adapter only | [2], 0 VAE | [2, 2], 1 VAE |" in run.stdout
    assert "| 1 UNet, 8 rows, 0 text passes, 0 VAE | 4 UNets, 8 rows, 16 text passes, 4 VAE |" in run.stdout
    assert "| fits 24 GB | yes |" in run.stdout
    differences = re.findall(r"\| ([\d.]+e[+-]\d+) \|$", run.stdout, flags=re.MULTILINE)
    assert len(differences) == 3 and max(map(float, differences)) < 1e-4
    work = dict(re.findall(r"^\| (attention sharing|adapter only|plain guidance) \| ([\d.]+) \|", run.stdout, re.M))
    assert float(work["adapter only"]) < 1.01 * float(work["plain guidance"])
    assert float(work["attention sharing"]) < 3.3 * float(work["plain guidance"])
