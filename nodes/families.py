"""Which family of models users know a host's model as, and which one a LoRA was made for."""

import re
from collections.abc import Mapping

import comfy.supported_models
from torch import Tensor


def model_label(model) -> str:
    """What users call this model's family."""
    config = model.model.model_config
    for label, family in (
        ("SDXL", comfy.supported_models.SDXL),
        ("SDXL refiner", comfy.supported_models.SDXLRefiner),
        ("SD2.1", comfy.supported_models.SD20),
        ("SD1.5", comfy.supported_models.SD15),
    ):
        if isinstance(config, family):
            return label
    return type(model.model).__name__


_METADATA_FAMILIES = (  # the first match wins
    (r"stable-diffusion-xl|sdxl", "SDXL"),
    (r"stable-diffusion-v1|sd_v1|sd_1|sd15|sd1\.5", "SD1.5"),
    (r"stable-diffusion-v2|sd_v2|sd_2|sd21|sd2\.1", "SD2.1"),
    (r"stable-diffusion-3|sd3", "SD3"),
    (r"flux", "Flux"),
    (r"wan", "Wan"),
    (r"hunyuan", "Hunyuan"),
    (r"qwen", "Qwen-Image"),
)
_KEY_FAMILIES = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks", "SD3"),
    (r"lora_unet__?blocks_\d+_(self|cross)_attn", "Wan"),
    (r"input_blocks_[78]_1_transformer_blocks_9", "SDXL"),
    (r"lora_te2_|text_encoder_2\.", "SDXL"),
)
_CONTEXT_FAMILIES = {768: "SD1.5", 1024: "SD2.1", 2048: "SDXL"}


def lora_family(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """The family a LoRA was made for, by its metadata, its keys or its cross-attention width; None if unknown."""
    for entry in ("personalize.family", "modelspec.architecture", "ss_base_model_version"):
        for pattern, family in _METADATA_FAMILIES:
            if re.search(pattern, metadata.get(entry, ""), re.IGNORECASE):
                return family
    for pattern, family in _KEY_FAMILIES:
        if any(re.search(pattern, key) for key in tensors):
            return family
    for key, tensor in tensors.items():
        if re.search(r"attn2.to_k.*(lora_down|lora_A|lora\.down)", key) and tensor.ndim >= 2:
            return _CONTEXT_FAMILIES.get(tensor.shape[1])
    return None
