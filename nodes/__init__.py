"""The nodes of the extension: thin adapters between ComfyUI and models/ and trainers/."""

from comfy_api.latest import ComfyExtension, io

from .convert_lookahead import ConvertLookaheadCheckpoint
from .custom_diffusion import LoadCustomDiffusion
from .dataset import PersonalizationDataset
from .dco import KSamplerRewardGuidance, RewardGuiderNode
from .dvar import TrainCustomDiffusion, TrainDreamBoothLoRA, TrainTextualInversion
from .export_lookahead import ExportLookaheadEncoder
from .export_lora import ExportLoRA
from .faces import FaceCropAndAlign
from .identity import EncodeIdentity, LoadIdentity, LoadLookaheadEncoder, SaveIdentity
from .identity_set import IdentityPrompts, SaveIdentitySet
from .initializers import ChooseInitializer
from .load_dco import LoadDCOLoRA, LoadLearnedTokens
from .lookahead import KSamplerLookahead, LookaheadGuiderNode
from .loss_curves import CompareLossCurves
from .merge_custom_diffusion import MergeCustomDiffusion
from .perfusion import (
    ApplyPerfusion,
    KSamplerMultiConceptLocking,
    PerfusionEDMSchedule,
    PerfusionTextEncode,
)
from .perfusion_balance import PerfusionBalance
from .perfusion_concepts import InspectPerfusionConcepts, LoadPerfusionConcept
from .plateau import StopCLIPPlateau
from .preview_guidance import LookaheadPreviewGuidance
from .preview_losses import ClipLossNode, IdentityLossNode, PictureLossNode
from .prompts import PromptBatch
from .scores import PersonalizationScores
from .stopping import StopDVAR, StopFixed
from .subject_masks import SoftSubjectMasks
from .train_dco import TrainDCO
from .train_lookahead import TrainLookaheadEncoder
from .train_perfusion import EstimateTextCovariance, TrainPerfusion
from .training_base import LoadTrainingBase
from .training_picture import TrainingPicture

NODES: list[type[io.ComfyNode]] = [
    TrainingPicture,
    PersonalizationDataset,
    ChooseInitializer,
    FaceCropAndAlign,
    LoadTrainingBase,
    StopFixed,
    StopDVAR,
    StopCLIPPlateau,
    TrainDCO,
    TrainTextualInversion,
    TrainDreamBoothLoRA,
    TrainCustomDiffusion,
    EstimateTextCovariance,
    TrainPerfusion,
    ExportLoRA,
    ConvertLookaheadCheckpoint,
    ExportLookaheadEncoder,
    LoadDCOLoRA,
    LoadLearnedTokens,
    LoadCustomDiffusion,
    MergeCustomDiffusion,
    RewardGuiderNode,
    KSamplerRewardGuidance,
    LoadLookaheadEncoder,
    EncodeIdentity,
    SaveIdentity,
    LoadIdentity,
    LookaheadGuiderNode,
    KSamplerLookahead,
    PictureLossNode,
    ClipLossNode,
    IdentityLossNode,
    LookaheadPreviewGuidance,
    PromptBatch,
    LoadPerfusionConcept,
    ApplyPerfusion,
    PerfusionTextEncode,
    KSamplerMultiConceptLocking,
    PerfusionEDMSchedule,
    PersonalizationScores,
    TrainLookaheadEncoder,
    IdentityPrompts,
    SaveIdentitySet,
    SoftSubjectMasks,
    PerfusionBalance,
    InspectPerfusionConcepts,
    CompareLossCurves,
]


class PersonalizeExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
