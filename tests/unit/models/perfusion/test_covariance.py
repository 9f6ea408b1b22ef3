"""The covariance: properties, its file, and files that are none."""

import io
import math

import numpy as np
import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, FormatError, IncompatibleModelError
from comfyui_personalize.models.formats import write_safetensors
from comfyui_personalize.models.perfusion import Covariance, CovarianceEstimate, read_covariance, write_covariance

DIM = 5


def encodings(captions=12, seed=0):
    return torch.randn(captions, 7, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def covariance():
    estimate = CovarianceEstimate(DIM)
    estimate.add(encodings())
    return estimate.covariance({"personalize.family": "sd15"})


def saved(path, matrix):
    return write_safetensors(path, {"inverse": matrix}, {"personalize.format": "perfusion-covariance/1"})


def test_batches_do_not_matter():
    whole, parts = CovarianceEstimate(DIM), CovarianceEstimate(DIM)
    whole.add(encodings())
    for part in encodings().split(5):
        parts.add(part)
    torch.testing.assert_close(whole.matrix(), parts.matrix(), rtol=1e-12, atol=1e-12)
    rows = encodings().double().flatten(0, 1)
    torch.testing.assert_close(whole.matrix(), rows.T @ rows / 12, rtol=1e-12, atol=1e-12)


def test_the_inverse_is_one(covariance):
    estimate = CovarianceEstimate(DIM)
    estimate.add(encodings())
    torch.testing.assert_close(covariance.inverse @ estimate.matrix(), torch.eye(DIM, dtype=torch.float64))
    vector = torch.arange(1.0, DIM + 1)
    torch.testing.assert_close(estimate.matrix() @ covariance.dual(vector).double(), vector.double(), rtol=1e-5, atol=0)


def test_nothing_is_taken_in_of_what_is_no_number():
    estimate = CovarianceEstimate(DIM)
    estimate.add(encodings())
    before = estimate.matrix()
    broken = encodings(seed=1)
    broken[3, 2, 1] = math.nan
    for wrong, message in ((broken, "no numbers"), (encodings()[..., :3], "expected"), (encodings()[0], "expected")):
        with pytest.raises(ConfigError, match=message):
            estimate.add(wrong)
    assert estimate.captions == 12 and torch.equal(estimate.matrix(), before)


def test_too_few_captions_are_refused():
    estimate = CovarianceEstimate(DIM)
    with pytest.raises(ConfigError, match="needs captions"):
        estimate.covariance()
    estimate.add(encodings(captions=1)[:, : DIM - 1])
    with pytest.raises(ConfigError, match="1 captions with 4 tokens do not determine"):
        estimate.covariance()


def test_the_file_is_read_as_written(covariance, tmp_path):
    path = write_covariance(tmp_path / "c.safetensors", covariance)
    again = read_covariance(path)
    assert torch.equal(again.inverse, covariance.inverse)
    assert again.fingerprint == covariance.fingerprint
    assert again.metadata["personalize.captions"] == "12"
    again.check_family("sd15")
    with pytest.raises(IncompatibleModelError, match="estimated for sd15, the base model is sdxl"):
        again.check_family("sdxl")
    with pytest.raises(ConfigError, match="exists already"):
        write_covariance(path, covariance)


def test_the_authors_array_is_the_same_covariance(covariance, tmp_path):
    for dtype in (np.float64, np.float32):
        np.save(tmp_path / "C_inv.npy", covariance.inverse.numpy().astype(dtype))
        assert read_covariance(tmp_path / "C_inv.npy").fingerprint == covariance.fingerprint
    np.save(tmp_path / "order.npy", np.asfortranarray(covariance.inverse.numpy()))
    assert torch.equal(read_covariance(tmp_path / "order.npy").inverse, covariance.inverse)


def test_other_values_have_another_fingerprint(covariance):
    other = covariance.inverse.clone()
    other[0, 0] *= 1.0001
    assert Covariance(other).fingerprint != covariance.fingerprint


def test_a_vector_of_another_width_is_refused(covariance):
    with pytest.raises(IncompatibleModelError, match="width 5"):
        covariance.dual(torch.ones(6))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.diag(torch.tensor([1.0, 1.0, -1.0])), "not positive definite"),
        (torch.zeros(3, 3), "not positive definite"),
        (torch.eye(3)[:2], "expected a square matrix"),
        (torch.zeros(0, 0), "expected a square matrix"),
        (torch.eye(3)[0], "expected a square matrix"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.full((2, 2), math.nan), "no numbers"),
        (torch.eye(3).half(), "32-bit or 64-bit"),
        (torch.eye(3, dtype=torch.int64), "32-bit or 64-bit"),
    ],
)
def test_matrices_that_are_no_inverse_covariance_are_refused(matrix, message, tmp_path):
    path = saved(tmp_path / "c.safetensors", matrix)
    with pytest.raises(FormatError, match=message) as refusal:
        read_covariance(path)
    assert "c.safetensors" in str(refusal.value)


def npy(array, **settings):
    file = io.BytesIO()
    np.save(file, array, **settings)
    return file.getvalue()


HUGE = npy(np.eye(3)).replace(b"(3, 3), }" + 14 * b" ", b"(99999999, 99999999), }")  # the header stays as long
assert HUGE != npy(np.eye(3))


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\x93NUMPY",
        b"not an array at all",
        npy(np.eye(4))[:-9],
        npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        npy(np.eye(3, dtype=np.int32)),
        npy(np.eye(3, dtype=complex)),
        HUGE,
    ],
    ids=["empty", "header", "text", "truncated", "objects", "integers", "complex", "huge"],
)
def test_damaged_arrays_are_refused(contents, tmp_path):
    path = tmp_path / "C_inv.npy"
    path.write_bytes(contents)
    with pytest.raises(FormatError, match="C_inv.npy: could not be read"):
        read_covariance(path)


def test_other_files_are_refused(covariance, tmp_path):
    path = write_safetensors(tmp_path / "lora.safetensors", {"inverse": torch.eye(3)}, {"personalize.format": "lora/1"})
    with pytest.raises(FormatError, match="found lora/1, expected perfusion-covariance/1"):
        read_covariance(path)
    with pytest.raises(FormatError, match="missing.npy"):
        read_covariance(tmp_path / "missing.npy")
