"""What a face encoder asks of a model, and the LoRA that it brings along."""

from ..models.errors import IncompatibleModelError
from ..models.lookahead.encoder import LookaheadEncoder
from .families import model_label
from .lora_layers import LayerPatch
from .switchable_lora import SwitchableLora, require_unet
from .unet_names import host_names


def check_fit(model, encoder: LookaheadEncoder) -> None:
    """Raise IncompatibleModelError unless the encoder was made for this MODEL's UNet."""
    require_unet(model, f"{encoder.name} needs", "use another kind of adapter")
    network = model.model.diffusion_model
    if network.num_classes is None:
        raise IncompatibleModelError(
            f"{encoder.name} is for SDXL, this model is an {model_label(model)}; load an SDXL one"
        )
    channels = network.input_blocks[0][0].weight.shape[1]
    if channels != model.model.latent_format.latent_channels:
        raise IncompatibleModelError(
            f"{encoder.name} is for SDXL, this model takes {channels} channels as inpainting models do; load an "
            "ordinary SDXL model and give the latent a noise mask"
        )
    attentions = {name: own for name, own in host_names(model).items() if ".attn" in name}
    shapes = {name: network.get_submodule(own).weight.shape for name, own in attentions.items()}
    encoder.check_fit(shapes)


def encoder_lora(model, encoder: LookaheadEncoder) -> SwitchableLora:
    """The encoder's LoRA, to be on in the encoder pass alone."""
    names = host_names(model)
    layers = {names[module]: LayerPatch(low_rank=delta) for module, delta in encoder.lora.items()}
    return SwitchableLora(encoder.name, layers, 1.0)
