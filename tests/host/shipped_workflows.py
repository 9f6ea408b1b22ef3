"""The workflows that ship with the extension, made small enough for a tiny checkpoint."""

import json
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors.torch import save_file

from comfyui_personalize.models.lora import kohya_tensors
from comfyui_personalize.models.tokens import LearnedToken

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
TRAININGS = [name for name in NAMES if "_train_" in name]
SAMPLINGS = [name for name in NAMES if name not in TRAININGS]
FIRST = {
    "dco_reward_guidance": ["dco_train_style", "dco_train_subject"],
    "dco_subject_in_style": ["dco_train_style", "dco_train_subject"],
    "lookahead_saved_identity": ["lookahead_face_to_portrait"],
    "perfusion_balance": ["perfusion_train_concept"],
    "perfusion_global_locking": ["perfusion_train_concept"],
    "lookahead_train_encoder": ["lookahead_generate_identities"],
    "lookahead_validate_encoder": ["lookahead_train_encoder"],
    "perfusion_two_concepts": ["perfusion_train_concept"],
}
"""Workflows that save what another one reads."""

CHECKPOINT = "tiny_sdxl.safetensors"
SIDE = 64
SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "PersonalizeLoadTrainingBase": {"ckpt_name": CHECKPOINT},
    "PersonalizeTrainDCO": {
        "steps": 2,
        "resolution": SIDE,
        "rank": 2,
        "learning_rate": 1e-2,
        "text_learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "preview_every": 1,
        "preview_steps": 1,
        "overwrite": True,
    },
    "PersonalizeTrainTextualInversion": {
        "steps": 2,
        "batch_size": 1,
        "resolution": SIDE,
        "gradient_checkpointing": False,
        "preview_every": 1,
        "preview_steps": 1,
        "overwrite": True,
    },
    "PersonalizeTrainDreamBoothLoRA": {
        "steps": 2,
        "batch_size": 1,
        "resolution": SIDE,
        "rank": 2,
        "gradient_checkpointing": False,
        "preview_every": 1,
        "preview_steps": 1,
        "overwrite": True,
    },
    "PersonalizeTrainCustomDiffusion": {
        "steps": 2,
        "batch_size": 1,
        "resolution": SIDE,
        "rescale_variants": 1,
        "gradient_checkpointing": False,
        "preview_every": 1,
        "preview_steps": 1,
        "overwrite": True,
        "class_pictures": 1,
        "class_steps": 1,
    },
    "PersonalizeStopFixed": {"preset": "custom", "steps": 2},
    "PersonalizeStopDVAR": {"preset": "custom", "window": 2},
    "PersonalizeStopCLIPPlateau": {
        "preset": "custom",
        "patience": 0,
        "eps": 1.0,
        "every": 1,
        "pictures": 1,
        "sampling_steps": 1,
    },
    "PersonalizeTrainPerfusion": {
        "covariance_name": "text_covariance.safetensors",
        "steps": 2,
        "batch_size": 1,
        "gradient_accumulation": 1,
        "resolution": SIDE,
        "gradient_checkpointing": False,
        "preview_every": 1,
        "preview_steps": 1,
        "overwrite": True,
    },
    "PersonalizeIdentityPrompts": {"vanilla_pictures": 1, "people": 2, "count": 4},
    "PersonalizeTrainLookaheadEncoder": {
        "face_network": "(none)",
        "face_folder": "(none)",
        "identity_weight": 0.0,
        "image_weight": 1.0,
        "steps": 2,
        "batch_size": 2,
        "lookahead_batch_size": 1,
        "resolution": SIDE,
        "gradient_checkpointing": False,
        "preview_every": 2,
        "preview_people": 1,
        "preview_steps": 1,
        "evaluate_every": 2,
        "overwrite": True,
    },
    "PersonalizePersonalizationScores": {"face_folder": "none"},
    "PersonalizeKSamplerMultiConceptLocking": {"steps": 2},
    "PersonalizePerfusionBalance": {"steps": 2, "betas": "0.5, 0.8", "taus": "0.15"},
    "EmptyLatentImage": {"width": SIDE, "height": SIDE},
    "BasicScheduler": {"steps": 2},
    "KSampler": {"steps": 2},
    "PersonalizeKSamplerRewardGuidance": {"steps": 2},
    "PersonalizeEncodeIdentity": {"reference_size": SIDE},
    "PersonalizeKSamplerLookahead": {"steps": 2},
}
"""What is changed in the shipped workflows, by node type; everything else stays as shipped."""


def api(name: str) -> dict:
    """A shipped workflow in API format."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def ui(name: str) -> dict:
    """A shipped workflow in the page's format."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def small(name: str) -> dict:
    """A shipped workflow in API format with the settings of SMALL; every one of them must exist in it."""
    graph = api(name)
    for node in graph.values():
        changes = SMALL.get(node["class_type"], {})
        assert changes.keys() <= node["inputs"].keys(), (name, node["class_type"])
        node["inputs"].update(changes)
    return graph


def nodes(graph: dict, kind: str) -> dict[str, dict]:
    """The nodes of one type by name; at least one."""
    found = {name: node for name, node in graph.items() if node["class_type"] == kind}
    assert found, kind
    return found


def upload_pictures(client, graph: dict) -> None:
    """Draw the pictures that a workflow names, and put them into the host's input folder."""
    named = [node for node in graph.values() if node["class_type"] in ("PersonalizeTrainingPicture", "LoadImage")]
    for index, node in enumerate(named):
        name = node["inputs"]["image"]
        assert client.upload(_face() if node["class_type"] == "LoadImage" else _blob(index), name) == name


def write_models(models: Path, lookahead) -> None:
    """Tiny random files under the names that the lookahead workflows give, into the host's folder of models.

    Args:
        lookahead: the module tests/tiny/lookahead.py.
    """
    lookahead.write_slim(models / "lookahead_encoders" / "lookahead_encoder.safetensors", "sdxl")
    lookahead.write_slim(models / "lookahead_encoders" / "ip-adapter-plus-face_sdxl_vit-h.safetensors", "sdxl", rank=0)
    vision = lookahead.write_clip_vision(models / "clip_vision" / "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    vision.with_suffix(".json").write_text(json.dumps(lookahead.CLIP_VISION_SIZES), encoding="utf-8")
    deltas = {f"unet.{name}": delta for name, delta in lookahead.make_encoder("sdxl", seed=1).lora.items()}
    (models / "loras").mkdir(parents=True, exist_ok=True)
    save_file(kohya_tensors(deltas, "sdxl"), models / "loras" / "lcm-lora-sdxl.safetensors")


def write_concepts(models: Path, perfusion) -> None:
    """What the Perfusion workflows read and do not make themselves.

    Args:
        perfusion: the module tests/tiny/perfusion.py.
    """
    perfusion.write_random_covariance(models / "perfusion_covariances" / "text_covariance.safetensors", "sdxl")
    cat = LearnedToken("<cat>", "cat")
    path = models / "perfusion_concepts" / "my_cat.safetensors"
    perfusion.write_random_concept(path, models / "checkpoints" / CHECKPOINT, cat)


def write_networks(models: Path, judges) -> None:
    """Tiny random networks that make masks and scores, under the names that the workflows give.

    Args:
        judges: the module tests/tiny/judges.py.
    """
    for size in ("base-patch32", "large-patch14"):
        judges.write_clip(models / "scoring" / f"clip-vit-{size}")
    judges.write_clipseg(models / "clipseg" / "clipseg-rd64-refined")


def _blob(index: int) -> Image.Image:
    picture = Image.new("RGB", (96, 80), (40 * index % 256, 90, 200 - 30 * index))
    ImageDraw.Draw(picture).ellipse((10 + 6 * index, 12, 60 + 6 * index, 62), fill=(230, 120, 40))
    return picture


def _face() -> Image.Image:
    picture = Image.new("RGB", (96, 96), (120, 160, 190))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((18, 8, 78, 90), fill=(230, 180, 150))
    for x in (36, 60):
        draw.ellipse((x - 5, 40, x + 5, 50), fill=(40, 30, 30))
    draw.chord((34, 56, 62, 76), 0, 180, fill=(190, 70, 70))
    return picture
