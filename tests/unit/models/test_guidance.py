import pytest
import torch

from comfyui_personalize.models.guidance import rescale_guidance, text_guidance


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2)]


def test_text_guidance_runs_through_both_predictions(predictions):
    uncond, text = predictions
    assert torch.equal(text_guidance(uncond, text, 0.0), uncond)
    torch.testing.assert_close(text_guidance(uncond, text, 1.0), text)
    torch.testing.assert_close(text_guidance(uncond, text, 7.0), 7 * text - 6 * uncond)
    assert text_guidance(None, text, 1.0) is text


def test_rescaling_at_strength_zero_changes_nothing(predictions):
    guided, text = predictions
    assert rescale_guidance(guided, text, 0.0) is guided


def test_full_rescaling_gives_each_sample_the_std_of_its_text_prediction(predictions):
    text = predictions[1] * torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1)
    rescaled = rescale_guidance(9 * predictions[0], text, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), text.std(dim=(1, 2, 3)))


def test_rescaling_blends(predictions):
    guided, text = predictions
    full = rescale_guidance(guided, text, 1.0)
    torch.testing.assert_close(rescale_guidance(guided, text, 0.7), 0.7 * full + 0.3 * guided)


def test_rescaling_keeps_half_precision(predictions):
    assert rescale_guidance(predictions[0].half(), predictions[1], 0.7).dtype == torch.float16
