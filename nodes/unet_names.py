"""Names of the modules of the host's UNets."""

import comfy.utils


def host_names(model) -> dict[str, str]:
    """Modules of a MODEL's UNet that have a weight: diffusers' name -> the host's."""
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {key[: -len(".weight")]: value[: -len(".weight")] for key, value in table.items() if key.endswith(".weight")}
