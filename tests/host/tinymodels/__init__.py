"""A ComfyUI custom-node folder, for tests and the demo only, by which the host recognises the tiny checkpoints.

The host knows a model by the sizes of its weights; this adds the tiny sizes. All else is the host's own code.
"""

import importlib.util
import sys
from pathlib import Path

import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip

NODE_CLASS_MAPPINGS = {}


def _load_sizes():
    # Resolved, because the host reaches this file through a link in its custom_nodes folder.
    path = Path(__file__).resolve().parents[2] / "tiny" / "checkpoints.py"
    spec = importlib.util.spec_from_file_location("personalize_tiny_checkpoints", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_checkpoints = _load_sizes()
_SD15, _SD21, _SDXL = (_checkpoints.FAMILIES[name] for name in ("sd15", "sd21", "sdxl"))
_WIDTHS = {encoder.key: encoder.width for family in (_SD15, _SD21, _SDXL) for encoder in family.text_encoders}


def _tiny_options(model_options: dict) -> dict:
    sizes = {
        f"{key}_model_config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": _checkpoints.TEXT_LAYERS,
            "projection_dim": width,
        }
        for key, width in _WIDTHS.items()
    }
    return {**model_options, **sizes}


def _tiny_model(real):
    class TinyTextModel(real):
        def __init__(self, *args, model_options=None, **kwargs):
            super().__init__(*args, model_options=_tiny_options(model_options or {}), **kwargs)

    return TinyTextModel


def _tiny_tokenizer(real):
    class TinyTokenizer(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for key, width in _WIDTHS.items():
                if hasattr(self, key):
                    getattr(self, key).embedding_size = width

    return TinyTokenizer


def _sizes(family) -> dict:
    return {
        "context_dim": family.context_width,
        "model_channels": family.channels,
        "use_linear_in_transformer": family.linear_projections,
        "adm_in_channels": family.vector_width,
        "use_temporal_attention": False,
    }


class TinySD15(comfy.supported_models.SD15):
    unet_config = _sizes(_SD15)

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            _tiny_tokenizer(comfy.sd1_clip.SD1Tokenizer), _tiny_model(comfy.sd1_clip.SD1ClipModel)
        )


class TinySD21(comfy.supported_models.SD20):
    unet_config = _sizes(_SD21)

    def model_type(self, state_dict, prefix=""):
        v_prediction = "v_pred" in state_dict
        return comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            _tiny_tokenizer(comfy.text_encoders.sd2_clip.SD2Tokenizer),
            _tiny_model(comfy.text_encoders.sd2_clip.SD2ClipModel),
        )


class TinySDXL(comfy.supported_models.SDXL):
    unet_config = _sizes(_SDXL) | {
        "transformer_depth": [depth for depth in _SDXL.depths for _ in range(_checkpoints.RESIDUAL_BLOCKS)]
    }

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(
            _tiny_tokenizer(comfy.sdxl_clip.SDXLTokenizer), _tiny_model(comfy.sdxl_clip.SDXLClipModel)
        )


if not any(known.__name__ == "TinySDXL" for known in comfy.supported_models.models):
    # Before the real ones: the first entry that matches wins.
    comfy.supported_models.models[:0] = [TinySD15, TinySD21, TinySDXL]
