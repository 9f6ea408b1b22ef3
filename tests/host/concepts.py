"""Random Perfusion concepts for the host's tiny models, which their words really call up."""

import torch

COVARIANCE = "identity"
"""Fingerprint of the covariance that all of them pretend to: C = 1."""


def make_concept(model, clip, word, superclass, *, seed=0, positions=1, rows=1, gain=3.0):
    """A concept whose place among the text encodings is that of its word in "a <word>"."""
    from comfyui_personalize.models.learned_embeddings import LearnedEmbedding
    from comfyui_personalize.models.perfusion import VALUE, Concept, ConceptParts
    from comfyui_personalize.nodes.learned_tokens import encoder_widths, teach
    from comfyui_personalize.nodes.unet_names import host_names

    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for key, width in encoder_widths(clip).items():
        table = getattr(clip.cond_stage_model, key).transformer.get_input_embeddings().weight
        tables[key] = torch.randn(rows, width, generator=generator) * table.float().std()
    embedding = LearnedEmbedding(word, tables)

    def encoding(prompt, taught, place=2):
        return taught.encode_from_tokens_scheduled(taught.tokenize(prompt))[0][0][0, place].float()

    target = encoding(f"a {word}", teach(clip, [embedding], "random"), 1 + rows)
    if not target.any():  # a model without weights
        target = torch.randn(target.shape, generator=generator)
    network, outputs = model.model.diffusion_model, {}
    for name, own in host_names(model).items():
        if name.endswith(VALUE):
            width = network.get_submodule(own).weight.shape[0]
            outputs[name] = torch.randn(positions, width, generator=generator) * gain
    parts = ConceptParts(target, target.clone(), outputs, encoding(f"a {superclass}", clip)[None])
    return Concept(embedding, superclass, parts, COVARIANCE, None, f"{word}.safetensors", {})
