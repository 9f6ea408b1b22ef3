"""The tiny checkpoints are the same everywhere, small, and free of anything a loader could stumble over."""

import hashlib

import pytest
import torch

FAMILIES = ("sd15", "sd21", "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_depends_on_family_and_seed_alone(load_helper, tiny_checkpoint, tmp_path, family):
    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    write = load_helper("tiny/checkpoints.py").write_tiny_checkpoint
    assert digest(write(family, tmp_path / "again.safetensors")) == digest(tiny_checkpoint(family))
    assert digest(write(family, tmp_path / "other.safetensors", seed=1)) != digest(tiny_checkpoint(family))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "other.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_finite_and_none_is_left_at_zero(load_helper, family):
    tensors = load_helper("tiny/checkpoints.py").tiny_state_dict(family)
    exempt = {"v_pred", "first_stage_model.vae_shift"}
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor.half()).all(), name
        assert name in exempt or tensor.ne(0).any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_files_stay_small(tiny_checkpoint, family):
    assert tiny_checkpoint(family).stat().st_size < 50e6
