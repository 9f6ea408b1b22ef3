"""Fixtures of tests that run inside the host: the host's own classes in this process, without a server."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def host_modules(comfyui, load_helper, tmp_path_factory):
    """Import the host once into this process, on the CPU and with folders of its own."""
    load_helper("host/boot.py").declare_missing_torchvision_operators()
    host = load_helper("host/in_process.py").import_host(comfyui, tmp_path_factory.mktemp("comfyui-in-process"))
    load_helper("host/tinymodels/__init__.py")
    return host


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint, load_helper):
    """name -> path of a checkpoint: a family's tiny one, or "world_sd15" or "world_sdxl" of the small world.

    Those are the trained ones.
    """
    weights = load_helper("world/weights.py")

    def path_of(name):
        return weights.path_of(f"{name}.safetensors") if name.startswith("world_") else tiny_checkpoint(name)

    return path_of


@pytest.fixture
def comfy(host_modules, checkpoint):
    """The host's modules, and `load(name)` -> (model, clip, vae), the first two fresh clones of small models.

    The whole test runs in torch.inference_mode(), and the weights were made in it, as in the host's executor.
    """

    def load(name: str):
        if name not in host_modules.loaded:
            loader = host_modules.sd.load_checkpoint_guess_config
            host_modules.loaded[name] = loader(str(checkpoint(name)))[:3]
        model, clip, vae = host_modules.loaded[name]
        return model.clone(), clip.clone(), vae

    with torch.inference_mode():
        yield SimpleNamespace(**vars(host_modules), load=load)


@pytest.fixture(scope="module")
def graphs(load_helper):
    """Builders of the graphs that train, and of those that sample to see that nothing has changed."""
    return load_helper("host/training_graphs.py")


@pytest.fixture(scope="module")
def sampling_is_unchanged(comfy_server, graphs, load_helper):
    """The plain model gives the same picture before and after all tests of a module."""
    with load_helper("host/client.py").Client(comfy_server.url, timeout=graphs.SERVER_TIMEOUT) as client:

        def sample(prefix):
            run = client.run(graphs.sampling("sd15", prefix=prefix))
            assert run.status == "success", run.error
            return np.asarray(client.images(run, "save")[0])

        before = sample("before_the_module")
        yield
        assert np.array_equal(before, sample("after_the_module"))


@pytest.fixture
def control_net(comfy):
    """control_net(model) -> the host's ControlNet with random weights, fitting a tiny model."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    def make(model, seed=0):
        config = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
        network = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, operations=comfy.ops.disable_weight_init, device=torch.device("cpu")
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            scale = 0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        return comfy.controlnet.ControlNet(network.float(), load_device=torch.device("cpu"))

    return make
