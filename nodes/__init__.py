"""The nodes of the extension: thin adapters between ComfyUI and models/ and trainers/."""

from comfy_api.latest import ComfyExtension, io

from .dco import KSamplerRewardGuidance, LoadDCOLoRA, LoadLearnedTokens, RewardGuiderNode

NODES: list[type[io.ComfyNode]] = [
    LoadDCOLoRA,
    LoadLearnedTokens,
    RewardGuiderNode,
    KSamplerRewardGuidance,
]


class PersonalizeExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
