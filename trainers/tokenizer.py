"""The CLIP tokenizer of every Stable Diffusion text encoder: from a folder, or built from a package's merges file."""

import gzip
import json
import sys
import tempfile
from pathlib import Path

from ..models.errors import FormatError, MissingDependencyError

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 49408
_MERGES_FILE = Path("open_clip", "bpe_simple_vocab_16e6.txt.gz")
_MERGES = VOCABULARY - 2 * 256 - 2


def load_tokenizer(folder: Path | None = None):
    """transformers' CLIPTokenizer.

    Args:
        folder: holds vocab.json and merges.txt, or tokenizer.json, as saved by transformers. None builds
            the same tokenizer from the merges file that the package open_clip_torch carries.

    Raises:
        FormatError: the folder holds no tokenizer.
        MissingDependencyError: no folder given, and the package is not installed.
    """
    if folder is None:
        return _from_merges(_find_merges())
    word_lists = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not word_lists and not (folder / "tokenizer.json").is_file():
        raise FormatError(f"{folder}: holds no CLIP tokenizer; expected vocab.json and merges.txt")
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    try:
        # In transformers 4 each class reads one kind of file only; in 5 they are the same class.
        return (CLIPTokenizer if word_lists else CLIPTokenizerFast).from_pretrained(folder, local_files_only=True)
    # Damage arrives as ImportError from transformers 4 without protobuf, and as a bare Exception from tokenizers.
    except Exception as error:
        raise FormatError(f"{folder}: its tokenizer could not be read ({error}); download it again") from error


def _find_merges() -> Path:
    """The merges file, found without importing its package: that would ask for torchvision."""
    for location in sys.path:
        if (Path(location) / _MERGES_FILE).is_file():
            return Path(location) / _MERGES_FILE
    raise MissingDependencyError(
        "no CLIP tokenizer: give a folder with one (vocab.json and merges.txt), "
        "or install the package open_clip_torch, which carries its word list (without its dependencies is enough)"
    )


def _from_merges(path: Path):
    from transformers import CLIPTokenizer

    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(line.split()) for line in lines), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    # Every release of transformers reads these files; constructors differ between 4 and 5.
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "vocab.json": json.dumps({word: number for number, word in enumerate(words)}),
            "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),
            "special_tokens_map.json": json.dumps(special),
            "tokenizer_config.json": json.dumps(
                {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
            ),
        }
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in CLIP's vocabulary order: printable bytes first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + others)]]
