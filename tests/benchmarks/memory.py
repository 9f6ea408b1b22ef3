"""Peak memory of a few training steps, in a process of its own; started by run.py."""

import sys

from run import helper

helper("host/boot.py").declare_missing_torchvision_operators()
from dco_step import measure_memory  # noqa: E402 - after the operators are declared

name, path, pixels, device, learned, complete = sys.argv[1:]
measure_memory(name, path, int(pixels), device, learned == "1", complete == "1")
