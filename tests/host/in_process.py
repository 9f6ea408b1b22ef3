"""The host's own classes in this process, on the CPU, without a server."""

import sys
from pathlib import Path
from types import SimpleNamespace


def import_host(comfyui: Path, base: Path) -> SimpleNamespace:
    """Import the host once, with folders of its own below ``base``; the missing torchvision operators must be declared.

    The checkout stays first on the path, since names such as ``nodes`` and ``server`` must be the host's and some
    imports come late.
    """
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(comfyui))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401 - reads sys.argv now
    finally:
        sys.argv = arguments
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import folder_paths

    import nodes

    return SimpleNamespace(
        base=base,
        folder_paths=folder_paths,
        model_management=comfy.model_management,
        nodes=nodes,
        sample=comfy.sample,
        samplers=comfy.samplers,
        sd=comfy.sd,
        loaded={},
    )
