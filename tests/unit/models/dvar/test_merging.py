"""The constrained merge: constraints are met, captions change least, and the authors' formula where it is defined."""

import torch

from comfyui_personalize.models.dvar.merging import ConstrainedMerge


def example(tokens=40, words=3, dim=8, out=5):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(*shape, generator=generator) for shape in ((tokens, dim), (words, dim), (out, dim), (words, out))
    )


def test_words_get_their_values_and_captions_change_least():
    captions, words, own, values = example()
    merged = ConstrainedMerge(captions, words).weight(own, values)
    torch.testing.assert_close(words @ merged.T, values, rtol=1e-4, atol=1e-5)
    changed = (captions @ (merged - own).T).square().sum()
    # Any other weight that meets the constraints differs by rows orthogonal to the words.
    free = torch.linalg.svd(words.double())[2][3:].float()
    for step in (1e-2, -1e-2):
        for direction in free:
            other = merged + step * direction
            torch.testing.assert_close(words @ other.T, values, rtol=1e-3, atol=1e-4)
            assert (captions @ (other - own).T).square().sum() > changed


def test_the_authors_formula_by_hand():
    captions, words, own, values = (tensor.double() for tensor in example())
    inverse = torch.linalg.inv(captions.T @ captions)
    directions = words @ inverse
    expected = own + (values.T - own @ words.T) @ torch.linalg.inv(directions @ words.T) @ directions
    merged = ConstrainedMerge(captions, words).weight(own, values)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)
    scaled = ConstrainedMerge(captions * 30, words).weight(own, values)
    torch.testing.assert_close(scaled, merged, rtol=1e-6, atol=1e-7)


def test_few_captions_and_words_encoded_alike_are_no_trouble():
    captions, words, own, values = example(tokens=3)
    alike, asked = torch.cat([words, words[:1]]), torch.cat([values, values[:1] + 2])
    merged = ConstrainedMerge(captions, alike).weight(own, asked)
    torch.testing.assert_close(words[:1] @ merged.T, values[:1] + 1, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(words[1:] @ merged.T, values[1:], rtol=1e-3, atol=1e-3)


def test_weights_that_agree_with_the_base_stay():
    captions, words, own, _ = example()
    merged = ConstrainedMerge(captions, words).weight(own.half(), words.half() @ own.half().T)
    assert merged.dtype == torch.float16
    torch.testing.assert_close(merged, own.half(), rtol=1e-2, atol=1e-2)
