"""The trainers' command line where torchvision may be built for another torch: `run_trainer.py dco --config …`."""

import importlib.util
import runpy
from pathlib import Path

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("boot", Path(__file__).parents[1] / "host" / "boot.py")
    boot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boot)
    boot.declare_missing_torchvision_operators()
    runpy.run_module("comfyui_personalize.trainers", run_name="__main__", alter_sys=True)
