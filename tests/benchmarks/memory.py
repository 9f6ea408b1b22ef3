"""Peak memory of a few training steps, in a process of its own; started by run.py."""

import importlib
import json
import sys

from run import helper

helper("host/boot.py").declare_missing_torchvision_operators()
job, words = sys.argv[1:]
importlib.import_module(job).measure_memory(*json.loads(words))
