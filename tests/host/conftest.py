"""Fixtures of tests that run inside the host: the host's own classes in this process, without a server."""

import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session")
def host_modules(comfyui, load_helper, tmp_path_factory):
    """Import the host once into this process, on the CPU and with folders of its own."""
    load_helper("host/boot.py").declare_missing_torchvision_operators()
    base = tmp_path_factory.mktemp("comfyui-in-process")
    (base / "custom_nodes").mkdir()
    # First on the path, since names such as `nodes` and `server` must be the host's; it stays, as imports come late.
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

    load_helper("host/tinymodels/__init__.py")
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


@pytest.fixture
def comfy(host_modules, tiny_checkpoint):
    """The host's modules, and `load(family)` -> (model, clip, vae), the first two fresh clones of tiny models.

    The whole test runs in torch.inference_mode(), and the weights were made in it, as in the host's executor.
    """

    def load(family: str):
        if family not in host_modules.loaded:
            loader = host_modules.sd.load_checkpoint_guess_config
            host_modules.loaded[family] = loader(str(tiny_checkpoint(family)))[:3]
        model, clip, vae = host_modules.loaded[family]
        return model.clone(), clip.clone(), vae

    with torch.inference_mode():
        yield SimpleNamespace(**vars(host_modules), load=load)
