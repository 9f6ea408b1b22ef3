"""Run ComfyUI's main.py in this process: `python boot.py <ComfyUI folder> [main.py options]`.

The host imports torchvision. Beside a CPU build of torch its compiled operators may fail to load, and then
its import fails on two operators that the host never calls; here they are declared where they are missing.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import torch

_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # an operator lives as long as the library that declared it


def declare_missing_torchvision_operators() -> None:
    """Make `import torchvision` work even if its compiled operators do not load; does nothing when they do."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _declared:
        return
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            pass  # built for another torch: exactly the case that the declarations below are for
    missing = [schema for name, schema in _OPERATORS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _declared.append(library)


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    declare_missing_torchvision_operators()
    sys.argv = [str(checkout / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(checkout)
    runpy.run_path(sys.argv[0], run_name="__main__")
