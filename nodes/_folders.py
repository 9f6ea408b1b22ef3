"""The kinds of model files that are ours, registered with the host when this module is imported."""

import os

import folder_paths

ENCODERS = "lookahead_encoders"
IDENTITIES = "identities"
FACE_NETWORKS = "arcface"
FACE_MODELS = "insightface"
CONCEPTS = "perfusion_concepts"
COVARIANCES = "perfusion_covariances"
CUSTOM_DIFFUSIONS = "custom_diffusion"
JUDGES = "scoring"
SEGMENTERS = "clipseg"
ENDINGS = {
    ENCODERS: {".safetensors", ".pt", ".bin", ".pth"},
    IDENTITIES: {".safetensors"},
    FACE_NETWORKS: {".pth", ".pt", ".bin", ".safetensors"},
    FACE_MODELS: {".onnx"},
    CONCEPTS: {".safetensors", ".ckpt", ".pt"},
    COVARIANCES: {".safetensors", ".npy"},
    CUSTOM_DIFFUSIONS: {".safetensors", ".bin", ".pt"},
    JUDGES: {".safetensors", ".bin"},
    SEGMENTERS: {".safetensors", ".bin"},
}
"""Folder kind, which is also the folder's name below ``models``, -> endings of its files."""


def _register(kind: str, endings: set[str]) -> None:
    # Folders of extra_model_paths.yaml are known by now and stay; new files are saved in our own.
    folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind), is_default=True)
    paths, known = folder_paths.folder_names_and_paths[kind]
    # A kind that the host has not heard of is registered without endings, which would list every file.
    folder_paths.folder_names_and_paths[kind] = (paths, endings | set(known))


for _kind, _endings in ENDINGS.items():
    _register(_kind, _endings)
