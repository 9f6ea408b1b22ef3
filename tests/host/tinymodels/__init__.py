"""A ComfyUI custom-node folder, for tests and the demo only, by which the host recognises the tiny checkpoints.

The host knows a model by the sizes of its weights; this adds the tiny sizes. All else is the host's own code.
"""

import importlib.util
import json
import sys
from pathlib import Path

import comfy.clip_vision
import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip

NODE_CLASS_MAPPINGS = {}
# Resolved, because the host reaches this file through a link in its custom_nodes folder.
_TINY = Path(__file__).resolve().parents[2] / "tiny"
_CLIP_VISION_SIZES = _TINY / "clip_vision.json"


def _load_sizes():
    spec = importlib.util.spec_from_file_location("personalize_tiny_checkpoints", _TINY / "checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_checkpoints = _load_sizes()


def _text_options(family, model_options: dict) -> dict:
    sizes = {
        f"{encoder.key}_model_config": {
            "hidden_size": encoder.width,
            "intermediate_size": 4 * encoder.width,
            "num_attention_heads": max(1, encoder.width // 64),
            "num_hidden_layers": encoder.layers,
            "projection_dim": encoder.width,
        }
        for encoder in family.text_encoders
    }
    return {**model_options, **sizes}


def _tiny_text_model(real, family):
    class TinyTextModel(real):
        def __init__(self, *args, model_options=None, **kwargs):
            super().__init__(*args, model_options=_text_options(family, model_options or {}), **kwargs)

    return TinyTextModel


def _tiny_tokenizer(real, family):
    class TinyTokenizer(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for encoder in family.text_encoders:
                getattr(self, encoder.key).embedding_size = encoder.width

    return TinyTokenizer


def _unet_sizes(family) -> dict:
    sizes = {
        "context_dim": family.context_width,
        "model_channels": family.channels,
        "use_linear_in_transformer": family.linear_projections,
        "adm_in_channels": family.vector_width,
        "use_temporal_attention": False,
    }
    if family.kind == "sdxl":
        sizes["transformer_depth"] = [depth for depth in family.depths for _ in range(family.residual_blocks)]
    return sizes


_REAL = {
    "sd15": (comfy.supported_models.SD15, comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sd21": (
        comfy.supported_models.SD20,
        comfy.text_encoders.sd2_clip.SD2Tokenizer,
        comfy.text_encoders.sd2_clip.SD2ClipModel,
    ),
    "sdxl": (comfy.supported_models.SDXL, comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
}


def _tiny_class(family):
    """The host's own class of the family's kind, for tiny sizes."""
    real, tokenizer, text_model = _REAL[family.kind]

    class TinyModel(real):
        unet_config = _unet_sizes(family)

        def model_type(self, state_dict, prefix=""):
            if family.kind != "sd21":
                return super().model_type(state_dict, prefix)
            # The host looks at a weight whose statistics only the trained model has.
            v_prediction = "v_pred" in state_dict
            return comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS

        def clip_target(self, state_dict=None):
            return comfy.supported_models_base.ClipTarget(
                _tiny_tokenizer(tokenizer, family), _tiny_text_model(text_model, family)
            )

    TinyModel.__name__ = TinyModel.__qualname__ = f"Tiny_{family.name}"
    return TinyModel


_classes = [_tiny_class(family) for family in _checkpoints.FAMILIES.values()]
if not {known.__name__ for known in comfy.supported_models.models} & {tiny.__name__ for tiny in _classes}:
    # Before the real ones: the first entry that matches wins.
    comfy.supported_models.models[:0] = _classes


def _knowing_the_tiny_clip_vision(load):
    """The host's loader of image encoders, which knows them by their number of layers in a list of its own."""
    sizes = json.loads(_CLIP_VISION_SIZES.read_text())
    patches = (sizes["hidden_size"], sizes["num_channels"], sizes["patch_size"], sizes["patch_size"])

    def load_clipvision_from_sd(sd, prefix="", convert_keys=False):
        found = sd.get("vision_model.embeddings.patch_embedding.weight")
        if found is None or found.shape != patches:
            return load(sd, prefix, convert_keys)
        model = comfy.clip_vision.ClipVisionModel(_CLIP_VISION_SIZES)
        missing, _ = model.load_sd(sd)  # the text half of the file is left over
        if missing:
            raise ValueError(f"a tiny image encoder without {', '.join(missing)}")
        return model

    return load_clipvision_from_sd


# Once, also where this file is executed twice in one process.
if comfy.clip_vision.load_clipvision_from_sd.__module__ == comfy.clip_vision.__name__:
    comfy.clip_vision.load_clipvision_from_sd = _knowing_the_tiny_clip_vision(comfy.clip_vision.load_clipvision_from_sd)
