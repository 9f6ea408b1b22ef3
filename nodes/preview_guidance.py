"""The node of training-free lookahead guidance."""

from comfy_api.latest import io

from ..models.errors import ConfigError
from ..models.formats import read_weights
from . import _host, _sampling_inputs
from ._choices import known
from ._sockets import PreviewLosses
from .lora_layers import match_lora
from .preview_gradient import Decoder, PreviewGuidance, guide_by_preview
from .switchable_lora import SwitchableLora, require_unet

NO_LORA = "none"
THROUGH_MODEL, FAST = "through the model", "fast"
GRADIENTS = [THROUGH_MODEL, FAST]


class LookaheadPreviewGuidance(io.ComfyNode):
    """Any guider, and a loss on previews beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLookaheadPreviewGuidance",
            display_name="Lookahead Preview Guidance",
            category="personalize/lookahead",
            description="Steers sampling without training (arXiv 2404.03620): an LCM LoRA previews the finished "
            "picture in one step, and what the preview lacks moves the latent. Takes any guider and returns one.",
            inputs=[
                io.Guider.Input(
                    "guider", tooltip="Any guider of an SD1.5, SD2.1 or SDXL model. It is not changed itself."
                ),
                PreviewLosses.Input(
                    "losses", tooltip="What the picture should come closer to, from one or several Preview Loss nodes."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *_host.model_files("loras")],
                    default=NO_LORA,
                    tooltip="The LCM LoRA of this model family; it is on for previews alone. 'none' takes the plain "
                    "estimate of the model, which is blurred while there is much noise.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.5,
                    min=0.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How far each step pulls, in standard deviations of the latent. The same for every loss, "
                    "model and number of steps. 0 is the guider alone, at its cost.",
                ),
                *_sampling_inputs.percents(
                    "the guidance sets in. 0 is from the start, where the layout is decided.",
                    "it stops. Steps outside its range cost nothing, and the last ones repair what the guidance left "
                    "unnatural.",
                    last=0.8,
                ),
                io.Combo.Input(
                    "gradient",
                    options=GRADIENTS,
                    default=THROUGH_MODEL,
                    tooltip="'through the model' asks how the noisy latent has to change for a better preview: keeps "
                    "pictures natural, costs about four passes of the model a step. 'fast' takes the model's "
                    "prediction for constant: one pass with an LCM LoRA, none without.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="What decodes previews. A TAESD needs a hundredth of the full VAE's time and memory. Not "
                    "connected: the taesd_decoder or taesdxl_decoder file from the folder models/vae_approx.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None, gradient=None) -> bool | str:
        lora = known("LoRA", lora_name, [NO_LORA, *_host.model_files("loras")])
        return lora if lora is not True else known("gradient", gradient, GRADIENTS)

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_others) -> str:
        return _host.model_version("loras", lora_name)

    @classmethod
    def execute(cls, guider, losses, lora_name, scale, start_percent, end_percent, gradient, vae=None) -> io.NodeOutput:
        model = getattr(guider, "model_patcher", None)
        if model is None or "positive" not in getattr(guider, "original_conds", {}):
            raise ConfigError(
                f"a {type(guider).__name__} says neither its model nor its positive prompt in the host's way; use "
                "CFGGuider, BasicGuider, DualCFGGuider or a guider of this extension"
            )
        require_unet(model)
        if not losses:
            raise ConfigError("all preview losses have weight 0, so there is nothing to follow; raise one of them")
        if not scale or start_percent >= end_percent:
            return io.NodeOutput(guider)
        lcm = None
        if lora_name != NO_LORA:
            path = _host.model_path("loras", lora_name)
            layers = match_lora(path.name, *read_weights(path), model).unet
            lcm = SwitchableLora(path.name, layers, 1.0)
        decoder = Decoder.approximate(model) if vae is None else Decoder.of_vae(vae, model)
        guidance = PreviewGuidance(
            losses,
            decoder,
            lcm,
            scale=scale,
            start_percent=start_percent,
            end_percent=end_percent,
            through_model=gradient == THROUGH_MODEL,
        )
        return io.NodeOutput(guide_by_preview(guider, guidance))
