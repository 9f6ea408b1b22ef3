"""Merging Custom Diffusions on tiny checkpoints: words read as trained, the rest as in the base, bad files refused."""

from dataclasses import replace

import pytest
import torch

from comfyui_personalize.models.custom_diffusion import (
    CustomDiffusion,
    compressed,
    is_trained,
    read_custom_diffusion,
    write_authors_file,
    write_custom_diffusion,
)
from comfyui_personalize.models.errors import ConfigError, DatasetError, FormatError, IncompatibleModelError
from comfyui_personalize.models.formats import read_header
from comfyui_personalize.models.learned_embeddings import LearnedEmbedding
from comfyui_personalize.models.templates import ordinary_captions
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.dvar.merge import merge, read_captions, read_concept
from comfyui_personalize.trainers.progress import Cancelled, SilentProgress
from comfyui_personalize.trainers.text import PromptEncoder

WIDTHS = {"sd15": {"clip_l": 64}, "sdxl": {"clip_l": 64, "clip_g": 128}}
CPU = torch.device("cpu")


class Cook:
    """Makes concepts that change a base at random."""

    def __init__(self, tiny, family):
        self.tiny, self.family, self.base = tiny, family, tiny.base(family)
        self.own = {n: w for n, w in self.base.load_unet().state_dict().items() if is_trained(n)}

    def concept(self, name, word, *, seed, authors=False, share=1.0):
        generator = torch.Generator().manual_seed(seed)
        changes = {n: 0.1 * torch.randn(w.shape, generator=generator) for n, w in self.own.items()}
        rows = {k: torch.randn(2, n, generator=generator) for k, n in WIDTHS[self.family].items()}
        token = LearnedEmbedding(word, rows)
        if share < 1:
            changed = CustomDiffusion({}, (token,), {n: compressed(c, share) for n, c in changes.items()})
        else:
            changed = CustomDiffusion({n: self.own[n] + c for n, c in changes.items()}, (token,))
        path = self.tiny.folder / name
        write = write_authors_file if authors else lambda path, changed: write_custom_diffusion(path, changed, {})
        return write(path, changed)

    def merge(self, *concepts, name="merged", **more):
        place = self.tiny.place(name)
        return merge(concepts, self.base, place, device=CPU, **more)

    def encode(self, changed, prompt):
        """(tokens, dim) of a prompt with the words of a Custom Diffusion, up to the end token."""
        tokens = [LearnedToken(t.trigger, "", 2) for t in changed.tokens]
        widths = WIDTHS[self.family]
        rows = {key: torch.cat([t.fit(widths, "")[key] for t in changed.tokens]) for key in widths}
        tokenizer = self.base.tokenizer()
        encoder = PromptEncoder(
            self.base.family, self.base.load_text_encoders(), tokenizer, tokens, rows=rows, context=False
        )
        end = encoder.token_ids(prompt, self.base.family.encoders[0]).index(tokenizer.eos_token_id)
        return encoder.encode_frozen([prompt]).embeds[0, 1 : end + 1]


@pytest.mark.parametrize("family", WIDTHS)
def test_words_are_read_as_trained_and_captions_as_before(family, tiny):
    cook = Cook(tiny, family)
    one = read_concept(cook.concept("one.safetensors", "<one>", seed=1))
    two = read_concept(cook.concept("two.safetensors", "<two>", seed=2, share=0.9), "<two> dog")
    path, words = cook.merge(one, two)
    assert words == ("<one>", "<two>") and one.phrase == "<one>"
    merged = read_custom_diffusion(path)
    assert merged.names == set(cook.own)
    assert read_header(path).metadata["personalize.family"] == family
    ordinary = [cook.encode(merged, caption) for caption in ordinary_captions()[::40]]
    moved = {"one": 0.0, "merged": 0.0}
    for name, own in cook.own.items():
        weight = merged.weights[name].float()
        for concept in (one, two):
            rows = cook.encode(merged, concept.phrase)
            expected = rows @ concept.changed.weight(name, own).T
            assert (rows @ weight.T - expected).abs().max() < 0.02 * (expected - rows @ own.T).abs().max()
        for rows in ordinary:
            moved["one"] += float((rows @ (one.changed.weight(name, own) - own).T).square().sum())
            moved["merged"] += float((rows @ (weight - own).T).square().sum())
    assert moved["merged"] < moved["one"] / 4


def test_a_word_of_two_files_is_numbered(tiny):
    cook = Cook(tiny, "sd15")
    paths = [cook.concept(f"{i}.bin", "<new1>", seed=i, authors=True) for i in range(3)]
    concepts = [read_concept(path, "<new1> cat") for path in paths]
    path, words = cook.merge(*concepts)
    assert words == ("<new1>", "<new12>", "<new13>")
    rows = [token.rows["clip_l"] for token in read_custom_diffusion(path).tokens]
    assert all(
        torch.equal(found, concept.changed.tokens[0].rows["any"]) for found, concept in zip(rows, concepts, strict=True)
    )


def test_values_that_half_precision_cannot_hold_are_merged(tiny):
    cook = Cook(tiny, "sd15")
    wild = read_custom_diffusion(cook.concept("wild.safetensors", "<wild>", seed=1))
    weights = {name: 1e6 * weight for name, weight in wild.weights.items()}
    path = write_custom_diffusion(tiny.folder / "wild.safetensors", replace(wild, weights=weights), {}, overwrite=True)
    merged, _ = cook.merge(read_concept(path), read_concept(cook.concept("two.safetensors", "<two>", seed=2)))
    assert all(weight.isfinite().all() for weight in read_custom_diffusion(merged).weights.values())


class Cancelling(SilentProgress):
    def cancelled(self):
        return True


def test_bad_input_is_refused_and_leaves_no_file(tiny):
    cook = Cook(tiny, "sd15")
    one, two = (read_concept(cook.concept(f"{i}.safetensors", f"<w{i}>", seed=i)) for i in range(2))
    with pytest.raises(ConfigError, match="merging needs two concepts or more, and there is 1"):
        cook.merge(one)
    with pytest.raises(Cancelled):
        cook.merge(one, two, progress=Cancelling())
    other = read_concept(Cook(tiny, "sdxl").concept("other.safetensors", "<other>", seed=0))
    with pytest.raises(IncompatibleModelError, match=r"other.safetensors: .* does not fit the base model's"):
        cook.merge(one, other)
    wordless = write_custom_diffusion(tiny.folder / "bare.safetensors", CustomDiffusion(one.changed.weights), {})
    with pytest.raises(ConfigError, match="bare.safetensors brings no word; write the phrase"):
        read_concept(wordless)
    name = next(iter(cook.own)).rsplit(".", 2)[0] + ".to_q.weight"
    more = write_custom_diffusion(tiny.folder / "more.safetensors", CustomDiffusion({name: torch.rand(4, 4)}), {})
    with pytest.raises(ConfigError, match="only keys and values can be merged"):
        read_concept(more, "dog")
    with pytest.raises(ConfigError, match="the phrase 'cat' lacks the word of 0.safetensors; write <w0> in it"):
        read_concept(tiny.folder / "0.safetensors", "cat")
    with pytest.raises(FormatError):
        read_concept(tiny.folder / "nothing.safetensors")
    empty = tiny.folder / "captions.txt"
    empty.write_text("\n \n")
    with pytest.raises(DatasetError, match="captions.txt: holds no captions; write one a line"):
        read_captions(empty)
    assert not tiny.place("merged").lora_path.exists()
    cook.merge(one, two)
    with pytest.raises(ConfigError, match="exists already"):
        cook.merge(one, two)
