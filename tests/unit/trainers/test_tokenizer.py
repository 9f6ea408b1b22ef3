"""The CLIP tokenizer built from the merges file: known ids, and the same ids as the host's files."""

import subprocess
import sys

import pytest

from comfyui_personalize.models.errors import FormatError, MissingDependencyError
from comfyui_personalize.trainers.tokenizer import load_tokenizer

PROMPTS = [
    "a photo of a dog",
    "",
    "   ",
    "it's five o'clock, don't they'll we've I'm he'd you're !!",
    "Ünïcödé ÀÉ Dvořák naïve café ½ ² ǅ",
    "日本語 한국어 русский العربية",
    "🐶🔥 emoji — em dash … “quotes”",
    "123 4567 3.14 1,000 -- ... v2.1",
    "tabs\tand\nnew  lines\u00a0nbsp",
    "<dog> <|startoftext|> x <|endoftext|> y",
    '(par:1.2) [b] {c} a_b-c/d\\e @#$%^&* "q"',
]


@pytest.fixture(scope="module")
def built():
    try:
        return load_tokenizer()
    except MissingDependencyError:
        pytest.skip("open_clip_torch is not installed")


def test_known_ids(built):
    # Ids of these words in the published vocabulary.
    assert built("a photo of a dog")["input_ids"] == [49406, 320, 1125, 539, 320, 1929, 49407]
    assert (built.bos_token_id, built.eos_token_id, len(built)) == (49406, 49407, 49408)


def test_same_ids_as_the_hosts_files(built, comfyui):
    from_files = load_tokenizer(comfyui / "comfy" / "sd1_tokenizer")
    for prompt in PROMPTS:
        assert built(prompt)["input_ids"] == from_files(prompt)["input_ids"], prompt
    assert built.get_vocab() == from_files.get_vocab()


def test_saved_tokenizer_loads_again(built, tmp_path):
    built.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for prompt in PROMPTS:
        assert again(prompt)["input_ids"] == built(prompt)["input_ids"]


def test_package_is_found_without_importing_it(built):
    code = (
        "import sys; from comfyui_personalize.trainers.tokenizer import _find_merges; _find_merges(); "
        "sys.exit('open_clip' in sys.modules or 'torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError, match="install the package open_clip_torch"):
        load_tokenizer()


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FormatError, match="holds no CLIP tokenizer"):
        load_tokenizer(tmp_path)


def test_single_json_file_is_enough(built, tmp_path):
    """What transformers 5 saves."""
    from transformers import CLIPTokenizerFast

    built.save_pretrained(tmp_path / "any")
    CLIPTokenizerFast.from_pretrained(tmp_path / "any").save_pretrained(tmp_path / "one")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "one" / name).unlink(missing_ok=True)
    again = load_tokenizer(tmp_path / "one")
    for prompt in PROMPTS[:4]:
        assert again(prompt)["input_ids"] == built(prompt)["input_ids"]


def test_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text('{"a": 1,')
    with pytest.raises(FormatError, match="its tokenizer could not be read"):
        load_tokenizer(tmp_path)
