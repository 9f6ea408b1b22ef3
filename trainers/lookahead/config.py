"""Settings of the face encoder's training."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_type_hints

from ...models.errors import ConfigError
from ...models.lookahead import DENOISING_ALPHA, PREVIEW_ALPHA
from ...models.lookahead.alignment import Fit
from ..config import TrainConfig, check_type
from ..settings import BaseSettings
from ..weights import Weights
from .data import FaceDataSettings

DenoisingLoss = Literal["noise", "weighted_noise"]
PictureLoss = Literal["identity", "image_l1", "clip", "lpips", "dreamsim"]


@dataclass(frozen=True, kw_only=True)
class DenoisingTerm:
    """A loss on the predicted noise."""

    name: DenoisingLoss
    """``weighted_noise`` leaves out rows whose reference shows no face."""
    weight: float = 1.0
    """Factor of the loss."""

    def __post_init__(self) -> None:
        _check_term(self)


@dataclass(frozen=True, kw_only=True)
class PictureTerm:
    """A loss on the previewed picture."""

    name: PictureLoss
    """``identity``: the face, to the reference's. ``image_l1``, ``lpips``, ``dreamsim``: the picture, to the reference.
    ``clip``: the picture, to its prompt."""
    weight: float = 1.0
    """Factor of the loss."""

    def __post_init__(self) -> None:
        _check_term(self)


def _check_term(term: DenoisingTerm | PictureTerm) -> None:
    """ConfigError for a loss that is not known, or a weight that is no number of 0 or more."""
    for name, kind in get_type_hints(type(term)).items():
        check_type(f"loss {name}", getattr(term, name), kind)
    if term.weight < 0:
        raise ConfigError(f"the weight of the loss {term.name} must be 0 or more, got {term.weight!r}")


@dataclass(frozen=True, kw_only=True)
class LookaheadConfig(TrainConfig):
    """A face encoder. Defaults are the authors' command (OrLichter/lcm-lookahead, README.md and losses.yaml)."""

    steps: int = 10_000
    """Optimizer steps; an iteration that looks ahead takes two."""
    batch_size: int = 4
    """Pairs of pictures per forward pass and process."""
    learning_rate: float = 5e-6
    """Peak rate of the encoder's LoRA and of its copies of keys and values."""
    adapter_learning_rate: float = 1e-5
    """Peak rate of the resampler and of the adapter's keys and values."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less memory, about a third slower."""
    crop: Literal["center", "random"] = "random"
    """Which square of a picture is used, drawn anew whenever the picture is met."""
    train_adapter: bool = True
    """Also train the resampler and the adapter; without it they stay those of the starting file."""
    lora_rank: int = 4
    """Rank of the encoder's LoRA where the starting file has none; 0 leaves it out."""
    copy_rank: int = 4
    """The same for the copies of keys and values; 0 trains full copies, 205 million numbers for SDXL."""
    timestep_alpha: float = DENOISING_ALPHA
    """How much more often noisy timesteps are drawn; 0 draws evenly."""
    noisy_reference: bool = True
    """The encoder sees its picture with the target's noise; else clean."""
    kv_drop_chance: float = 0.05
    """Chance that self-attention does not see a token of the reference."""
    adapter_drop_chance: float = 0.1
    """Chance that the adapter sees nobody, in the denoising half."""
    text_drop_chance: float = 0.0
    """Chance that a row has empty prompts."""
    adapter_scale: float = 1.0
    """Strength of the adapter, in both halves."""
    predict_word: bool = False
    """Also predict a word for the person, which prompts from file names contain where ``placeholder`` is
    "{placeholder}". The previews of this training read it; other samplers take it for text."""
    lookahead_every: int = 1
    """Iterations from one that looks ahead to the next; 0 never looks ahead, and so is a plain face adapter."""
    lookahead_batch_size: int = 4
    """Rows of the batch that are used for looking ahead; it takes more memory than denoising."""
    lookahead_max_timestep: int = 1000
    """Looks ahead from timesteps below this."""
    lookahead_alpha: float = PREVIEW_ALPHA
    """How much more often it looks ahead from noisy timesteps."""
    lcm_scale_every: int = 5
    """Iterations between new strengths of the LCM LoRA, a multiple of ``lookahead_every``; 0 keeps it at full."""
    lcm_full_chance: float = 0.5
    """Chance that the new strength is full; else it is drawn evenly, and scales the loss too."""
    lcm_min_scale: float = 0.1
    """Smallest strength that is drawn."""
    clip: Literal["authors", "all"] = "authors"
    """Whose gradients ``max_grad_norm`` covers in the denoising half: the encoder's alone, or the adapter's too. When
    looking ahead it is always all."""
    face_fit: Fit = "cp2tform"
    """How landmarks are fitted for the face network; "authors" mirrors one face in a hundred by oversight."""
    denoising_losses: tuple[DenoisingTerm, ...] = (DenoisingTerm(name="noise"),)
    """Summed up in the denoising half."""
    picture_losses: tuple[PictureTerm, ...] = (PictureTerm(name="identity", weight=1e-3),)
    """Summed up when looking ahead. The authors add ``dreamsim`` with the same weight."""
    save_precision: Literal["fp16", "fp32"] = "fp16"
    """Type of the saved encoder; fp32 doubles the file."""
    preview_every: int = 0
    """Sample a grid of people every so many steps; 0 samples none."""
    preview_people: int = 2
    """People that it shows, and as many of the validation set."""
    preview_steps: int = 20
    """Sampling steps of its pictures; those with the LCM LoRA take four."""
    evaluate_every: int = 0
    """Steps between evaluations on pairs that are always the same; 0 evaluates nothing."""
    evaluation_pairs: int = 8
    """Pairs of an evaluation."""
    cache_gigabytes: float = 4.0
    """Main memory for encoded pictures, which then need not be encoded again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.adapter_learning_rate > 0, "adapter_learning_rate", "positive")
        for name in ("lora_rank", "copy_rank"):
            self._require(0 <= getattr(self, name) <= 1024, name, "between 0 and 1024")
        for name in ("timestep_alpha", "lookahead_alpha"):
            self._require(-1 <= getattr(self, name) <= 1, name, "between -1 and 1")
        for name in ("kv_drop_chance", "adapter_drop_chance", "text_drop_chance", "lcm_full_chance"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("lookahead_every", "lcm_scale_every", "adapter_scale", "cache_gigabytes", "evaluate_every"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("lookahead_batch_size", "lookahead_max_timestep", "preview_people", "evaluation_pairs"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(0 < self.lcm_min_scale <= 1, "lcm_min_scale", "above 0 and at most 1")
        multiple = not self.lookahead_every or self.lcm_scale_every % self.lookahead_every == 0
        self._require(multiple, "lcm_scale_every", f"a multiple of lookahead_every, which is {self.lookahead_every}")
        self._require(bool(self.denoising_losses), "denoising_losses", "at least one loss")
        self._require(bool(self.picture_losses) or not self.lookahead_every, "picture_losses", "at least one loss")
        for name in ("snr_gamma", "offset_noise"):
            self._require(getattr(self, name) == 0, name, "0, as this training does not know it")
        self._require(not self.flip, "flip", "false, as mirrored faces are other faces")
        compared = self.keep == "last" or self.evaluate_every > 0
        self._require(compared, "keep", '"last" unless evaluate_every is above 0, as training losses say too little')
        for name in ("denoising_losses", "picture_losses"):
            named = [term.name for term in getattr(self, name)]
            self._require(len(set(named)) == len(named), name, "losses of different names")

    def resume_fingerprint(self, steps: int, *more: str) -> str:
        """As TrainConfig's: what a run shows, evaluates and remembers takes no part either."""
        shown = {"keep": "last", "preview_people": 1, "evaluate_every": 0, "evaluation_pairs": 1, "cache_gigabytes": 0}
        return TrainConfig.resume_fingerprint(replace(self, **shown), steps, *more)


@dataclass(frozen=True, kw_only=True)
class LookaheadModels:
    """Further model files, all on disk; nothing is downloaded."""

    start: Path
    """ip-adapter-plus-face_sdxl_vit-h, or an encoder to go on from: a slim file, or the authors' model_ckpt.pt."""
    clip_vision: Path
    """The image encoder that the start was trained with, ViT-H for the published ones: a file, or a folder."""
    lcm_lora: Path | None = None
    """LCM LoRA for SDXL; needed for looking ahead."""
    preview_vae: Path | None = None
    """TAESD for SDXL, diffusers' file or folder or the decoder's file alone, which decodes the preview; without it the
    base's own autoencoder does."""
    face_network: Path | None = None
    """model_ir_se50.pth, for the loss ``identity``."""
    face_models: Path | None = None
    """Folder of insightface's ONNX files, which find faces."""
    clip: Path | None = None
    """Folder of a CLIP model with its tokenizer, such as ViT-B/16, for the loss ``clip``."""
    vgg: Path | None = None
    """torchvision's vgg16 weights, for the loss ``lpips``."""
    dreamsim: Path | None = None
    """Folder of the unpacked ensemble checkpoint of DreamSIM, for the loss ``dreamsim``."""

    @property
    def fingerprint(self) -> str:
        """Identity of what the files hold, wherever they lie; as cheap as Weights.digest."""
        found = []
        for name in type(self).__dataclass_fields__:
            if (path := getattr(self, name)) is not None:
                files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
                found.append(f"{name} {Weights(tuple(files), {}).digest()}")
        return " ".join(found)

    def check(self, config: LookaheadConfig, *, crop_heads: bool) -> None:
        """Raise ConfigError for a file that the settings need and that is not given or not there."""
        ahead = config.lookahead_every > 0
        pictures = {term.name for term in config.picture_losses} if ahead else set()
        faces = "identity" in pictures or crop_heads or any(t.name == "weighted_noise" for t in config.denoising_losses)
        needed = {
            "lcm_lora": ahead,
            "face_network": "identity" in pictures,
            "face_models": faces,
            "clip": "clip" in pictures,
            "vgg": "lpips" in pictures,
            "dreamsim": "dreamsim" in pictures,
        }
        for name in type(self).__dataclass_fields__:
            path = getattr(self, name)
            if path is None and needed.get(name):
                raise ConfigError(f"models.{name} is needed by these losses and settings; give its path")
            if path is not None and not path.exists():
                raise ConfigError(f"models.{name}: there is no {path}; correct the path")


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """Where the encoder goes."""

    name: str
    """Name of the file, without ending."""
    folder: Path = Path("output")
    """Receives lookahead_encoders/ and runs/ with the log, previews and training states."""
    overwrite: bool = False
    """Replace a file of the same name."""


@dataclass(frozen=True, kw_only=True)
class LookaheadRun:
    """A whole training from the command line."""

    base: BaseSettings
    models: LookaheadModels
    data: FaceDataSettings
    output: EncoderOutput
    train: LookaheadConfig = field(default_factory=LookaheadConfig)
    device: str = ""
    """``cuda``, ``cpu`` or ``mps``; empty takes the best there is."""
