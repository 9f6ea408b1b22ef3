"""The node that trains a face encoder on a folder of people."""

from pathlib import Path

from comfy_api.latest import io

from ..models.errors import ConfigError
from ..trainers.lookahead.config import LookaheadConfig, LookaheadModels, PictureTerm
from ..trainers.lookahead.data import VALIDATION_PROMPTS, FaceDataSettings, FaceSet
from . import _host, _input_folder, _sockets, _trainer
from ._choices import first_refusal, known, known_settings
from ._folders import ENCODERS, FACE_NETWORKS
from ._lines import lines_of
from .faces import face_model_folders

NO_FILE = "(none)"
METADATA = "metadata.json"
# Append only: workflows store widget values by position.
_SETTINGS = (
    "steps", "learning_rate", "adapter_learning_rate", "batch_size", "gradient_accumulation", "resolution",
    "precision", "gradient_checkpointing", "lora_rank", "copy_rank", "train_adapter", "kv_drop_chance",
    "adapter_drop_chance", "text_drop_chance", "lookahead_every", "lookahead_batch_size", "lcm_scale_every",
    "lcm_full_chance", "lcm_min_scale", "crop", "optimizer", "lr_schedule", "warmup_steps", "weight_decay",
    "max_grad_norm", "seed", "save_precision", "preview_every", "checkpoint_every", "checkpoint_limit", "resume",
)  # fmt: skip
_LATER_SETTINGS = ("preview_people", "preview_steps", "evaluate_every", "keep")


def _people(folder: Path, **settings) -> FaceSet:
    """The folder with its metadata, if it has any."""
    metadata = folder / METADATA
    return FaceSet(folder=folder, metadata=metadata if metadata.is_file() else None, **settings)


def _file(name: str, kind: str, tooltip: str, *, needed: bool = True) -> io.Input:
    options = _host.model_files(kind) if needed else [NO_FILE, *_host.model_files(kind)]
    return io.Combo.Input(name, options=options, tooltip=tooltip, **({} if needed else {"default": NO_FILE}))


def _preview_vaes() -> list[str]:
    """The host's VAEs and, behind them, its small decoders for SDXL, which it keeps apart."""
    names = _host.model_files("vae")
    small = [name for name in _host.model_files("vae_approx") if name.startswith("taesdxl") and "_encoder" not in name]
    return [*names, *(name for name in small if name not in names)]


def _preview_vae_kind(name: str | None) -> str:
    """The host's kind of a file among those; of two with one name the VAE."""
    return "vae_approx" if name in _preview_vaes() and name not in _host.model_files("vae") else "vae"


def _weight(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=1e-4, round=False, tooltip=tooltip)


class TrainLookaheadEncoder(io.ComfyNode):
    """Teach a face encoder who people are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrainLookaheadEncoder",
            display_name="Train Lookahead Encoder",
            category="personalize/training",
            description="Trains an LCM-Lookahead face encoder for SDXL (arXiv 2404.03620) on pictures of many people, "
            "from ip-adapter-plus-face or from an earlier encoder. Load Lookahead Encoder loads the file.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                _sockets.Base.Input("base", tooltip="From Load Training Base: SDXL."),
                _file(
                    "encoder_name",
                    ENCODERS,
                    "Where training starts: ip-adapter-plus-face_sdxl_vit-h, or an earlier encoder. From "
                    "models/lookahead_encoders.",
                ),
                _file(
                    "clip_vision_name", "clip_vision", "The image encoder of that file, ViT-H for the published one."
                ),
                _file("lcm_lora_name", "loras", "LCM LoRA for SDXL, which makes the preview.", needed=False),
                io.Combo.Input(
                    "preview_vae_name",
                    options=[NO_FILE, *_preview_vaes()],
                    default=NO_FILE,
                    tooltip="A small autoencoder for the preview, such as TAESD for SDXL: diffusers' file in "
                    "models/vae, or taesdxl_decoder in models/vae_approx. Without one the base's own decodes, with far "
                    "more memory.",
                ),
                _file(
                    "face_network",
                    FACE_NETWORKS,
                    "model_ir_se50.pth, which compares faces, in models/arcface.",
                    needed=False,
                ),
                io.Combo.Input(
                    "face_folder",
                    options=[NO_FILE, *face_model_folders()],
                    default=NO_FILE,
                    tooltip="Folder below models/insightface with networks that find faces.",
                ),
                io.Combo.Input(
                    "people_folder",
                    options=_input_folder.folders(),
                    tooltip="A folder inside the input folder. Its metadata.json says who each picture shows; without "
                    "it every picture is its own reference.",
                ),
                io.Boolean.Input(
                    "prompt_in_filename",
                    default=True,
                    tooltip="Read prompts from file names, such as A_photo_of_conceptname_123.jpg.",
                ),
                io.String.Input("placeholder", default="face", tooltip="What conceptname becomes in these prompts."),
                io.String.Input(
                    "prompt", default="a photo of a face", tooltip="For all pictures, when file names hold no prompts."
                ),
                io.Boolean.Input(
                    "only_vanilla_references",
                    default=False,
                    tooltip="Show the encoder only pictures with vanilla in their path.",
                ),
                io.Boolean.Input(
                    "crop_heads", default=False, tooltip="Show the encoder heads, upright and cut out, if one is found."
                ),
                _weight("identity_weight", 1e-3, "Weight of the face's likeness in the preview. 0 leaves it out."),
                _weight("image_weight", 0.0, "Weight of the pixels' distance from the reference. 0 leaves it out."),
                io.String.Input("output_name", default="my_encoder", tooltip="Name of the encoder file."),
                *_trainer.widgets(LookaheadConfig, *_SETTINGS, preview_every=500),
                _trainer.OVERWRITE,
                io.Combo.Input(
                    "validation_folder",
                    options=[NO_FILE, *_input_folder.folders()],
                    default=NO_FILE,
                    tooltip="People that are not trained on, laid out like people_folder, for previews and "
                    "evaluations.",
                ),
                io.String.Input(
                    "validation_prompts",
                    default="\n".join(VALIDATION_PROMPTS),
                    multiline=True,
                    tooltip="What previews show people as, beside a prompt that is trained on; one per line.",
                ),
                io.Int.Input(
                    "preview_people",
                    default=2,
                    min=1,
                    max=16,
                    tooltip="People that a preview shows, and as many of the validation folder.",
                ),
                *_trainer.widgets(LookaheadConfig, "preview_steps"),
                io.Int.Input(
                    "evaluate_every",
                    default=250,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between evaluations, always on the same pairs and timesteps, so that they tell "
                    "progress where training losses do not; 0 makes none.",
                ),
                *_trainer.widgets(LookaheadConfig, "keep"),
            ],
            outputs=[
                _sockets.Name.Output(
                    display_name="encoder_name",
                    tooltip="Name of the trained file; connect it to Load Lookahead Encoder's encoder_name.",
                ),
                *_trainer.OUTPUTS[1:],
            ],
        )

    @classmethod
    def validate_inputs(
        cls, output_name=None, people_folder=None, precision=None, crop=None, optimizer=None, lr_schedule=None,
        save_precision=None, keep=None, validation_folder=None,
    ) -> bool | str:  # fmt: skip
        chosen = {"precision": precision, "crop": crop, "optimizer": optimizer, "lr_schedule": lr_schedule}
        chosen |= {"save_precision": save_precision, "keep": keep}
        return first_refusal(
            [
                known("folder of people", people_folder, _input_folder.folders()),
                known("folder of people", validation_folder, [NO_FILE, *_input_folder.folders()]),
                _trainer.check_output_name(output_name),
                known_settings(LookaheadConfig, **chosen),
            ]
        )

    @classmethod
    def fingerprint_inputs(
        cls, encoder_name=None, clip_vision_name=None, lcm_lora_name=None, preview_vae_name=None, face_network=None,
        face_folder=None, people_folder=None, validation_folder=None, **_others,
    ) -> str:  # fmt: skip
        kinds = {
            ENCODERS: encoder_name, "clip_vision": clip_vision_name, "loras": lcm_lora_name,
            _preview_vae_kind(preview_vae_name): preview_vae_name, FACE_NETWORKS: face_network,
        }  # fmt: skip
        paths = [_host.find_model_file(kind, name) for kind, name in kinds.items() if name not in (None, NO_FILE)]
        faces = face_model_folders().get(face_folder)
        paths += sorted(faces.glob("*.onnx")) if faces else []
        people = [_input_folder.folder_version(name) for name in (people_folder, validation_folder) if name != NO_FILE]
        return "|".join([_host.file_version(*paths), *people])

    @classmethod
    def execute(
        cls, base, encoder_name, clip_vision_name, lcm_lora_name, preview_vae_name, face_network, face_folder,
        people_folder, prompt_in_filename, placeholder, prompt, only_vanilla_references, crop_heads, identity_weight,
        image_weight, output_name, overwrite=False, validation_folder=NO_FILE, validation_prompts="", **settings,
    ) -> io.NodeOutput:  # fmt: skip
        _trainer.refuse_unknown(cls, settings, (*_SETTINGS, *_LATER_SETTINGS))
        weights = {"identity": identity_weight, "image_l1": image_weight}
        terms = tuple(PictureTerm(name=name, weight=weight) for name, weight in weights.items() if weight)
        if not terms and settings["lookahead_every"]:
            raise ConfigError(
                "identity_weight and image_weight are both 0, so that looking ahead has nothing to learn from; raise "
                "one of them, or set lookahead_every to 0"
            )
        config = LookaheadConfig(**settings, picture_losses=terms)

        def path(kind: str, name: str) -> Path | None:
            return None if name == NO_FILE else _host.model_path(kind, name)

        models = LookaheadModels(
            start=_host.model_path(ENCODERS, encoder_name),
            clip_vision=_host.model_path("clip_vision", clip_vision_name),
            lcm_lora=path("loras", lcm_lora_name),
            preview_vae=path(_preview_vae_kind(preview_vae_name), preview_vae_name),
            face_network=path(FACE_NETWORKS, face_network),
            face_models=None if face_folder == NO_FILE else face_model_folders().get(face_folder),
        )
        told = {"prompt_in_filename": prompt_in_filename, "placeholder": placeholder}
        told["only_vanilla_references"] = only_vanilla_references
        shown = validation_folder != NO_FILE
        people = FaceDataSettings(
            sets=(_people(_input_folder.folder_path(people_folder), **told),),
            crop_heads=crop_heads,
            prompt=prompt,
            validation=_people(_input_folder.folder_path(validation_folder), **told) if shown else None,
            validation_prompts=tuple(lines_of(validation_prompts)) or VALIDATION_PROMPTS,
        )
        place = _trainer.output_place(output_name, overwrite, ENCODERS)
        from ..trainers.lookahead.train import train

        def run(**surroundings):
            return train(config, base, models, people.open(), place, **surroundings)

        return _trainer.run_training(cls, run)
