"""Generated people as the face encoder trains on them: who is drawn how, file names that tell it, and the metadata.

What scripts/faces_generation.py of OrLichter/lcm-lookahead does, except that seeds follow from name and prompt instead
of being drawn: a set that was interrupted goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ...models.errors import ConfigError, DatasetError
from ...models.formats import safe_name, write_whole
from .data import CONCEPT, VANILLA, prompt_of, read_metadata

METADATA = "metadata.json"
STYLIZED = "stylized"
QUALITY = 95
"""Of the JPEG files."""
SEEDS = 2**32
"""Seeds are below this."""


@dataclass(frozen=True)
class Portrait:
    """One picture of a set; ConfigError where its file name could not tell whom it shows and how."""

    identity: str
    """Name of the person, which is also the folder's."""
    prompt: str
    """Says ``conceptname`` where the person is named."""
    vanilla: bool
    """A plain photograph, as opposed to a picture in a style."""
    seed: int

    def __post_init__(self) -> None:
        _check_identity(self.identity)
        _check_prompt(self.prompt, self.vanilla)

    @property
    def name(self) -> str:
        """Path below the folder of the set, with slashes, as the authors write it."""
        group = VANILLA if self.vanilla else STYLIZED
        return f"{self.identity}/{group}/{_stem(self.prompt, self.seed)}.jpg"

    @property
    def text(self) -> str:
        """The prompt with the person's name, for the sampler."""
        return self.prompt.replace(CONCEPT, self.identity)


def _stem(prompt: str, seed: int) -> str:
    return f"{prompt.replace(' ', '_')}_{seed}"


@lru_cache(4096)
def _check_identity(identity: str) -> None:
    what = f"the name {identity!r}"
    _require_file_name(identity, what)
    if VANILLA in identity:
        raise ConfigError(f"{what} says {VANILLA}, which marks plain photographs in a path; use another one")


@lru_cache(4096)
def _check_prompt(prompt: str, vanilla: bool) -> None:
    what, stem = f"the prompt {prompt!r}", _stem(prompt, SEEDS - 1)
    if CONCEPT not in prompt:
        raise ConfigError(f"{what} shows nobody; write {CONCEPT} where the person is named")
    _require_file_name(stem, what)
    if prompt_of(stem, CONCEPT) != prompt:
        raise ConfigError(
            f"{what} would read {prompt_of(stem, CONCEPT)!r} in a file name; leave out underscores and numbers at the "
            "end"
        )
    if VANILLA in prompt and not vanilla:
        raise ConfigError(f"{what} says {VANILLA}, which marks plain photographs in a path; use another word")


def _require_file_name(text: str, what: str) -> None:
    try:
        plain = safe_name(text) == text
    except ConfigError:
        plain = False
    if not plain:
        raise ConfigError(
            f'{what} cannot be part of a file name; leave out / \\ : * ? " < > |, a dot at the end, and keep it below '
            "180 letters"
        )


def portraits(
    names: Iterable[str],
    vanilla: Iterable[str],
    stylized: Iterable[str],
    *,
    vanilla_pictures: int,
    stylized_pictures: int,
    seed: int,
) -> Iterator[Portrait]:
    """All pictures of a set, one person after the other: plain photographs first.

    Args:
        vanilla, stylized: prompts, with ``conceptname`` for the person.
        vanilla_pictures, stylized_pictures: of each prompt and person.
        seed: another one gives other seeds for all pictures.
    """
    vanilla, stylized = list(vanilla), list(stylized)
    for name in names:
        for prompts, pictures, plain in ((vanilla, vanilla_pictures, True), (stylized, stylized_pictures, False)):
            for number in range(pictures):
                for prompt in prompts:
                    yield Portrait(name, prompt, plain, _seed(seed, name, prompt, number))


def _seed(*parts: object) -> int:
    """A number below SEEDS that follows from the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


class IdentitySet:
    """A folder of generated people and its metadata, path below the folder -> name of the person."""

    def __init__(self, folder: Path):
        """Read what is there; nothing is written.

        Raises:
            DatasetError: the folder holds files without metadata, or metadata of another layout.
        """
        self.folder = Path(folder)
        self._identities: dict[str, str] = {}
        if (self.folder / METADATA).exists():
            try:
                self._identities = read_metadata(self.folder / METADATA)
            except DatasetError as error:
                raise DatasetError(
                    f"{error}; {self.folder.name} is no set of people that could be gone on with: choose another name"
                ) from error
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise DatasetError(
                f"{self.folder}: found files and no {METADATA}, so this is no set of people; choose another name"
            )

    def holds(self, portrait: Portrait) -> bool:
        """Whether the picture is listed and there."""
        return portrait.name in self._identities and (self.folder / portrait.name).is_file()

    def add(self, portrait: Portrait, picture: Image.Image) -> bool:
        """Write the picture whole, unless it is there already; ``close`` lists it.

        Returns:
            Whether it was written.

        Raises:
            FormatError: the disk refused.
        """
        if not (self.folder / METADATA).exists():
            self.close()  # a set that is interrupted before its first list must be known as one
        path = self.folder / portrait.name
        missing = not path.is_file()
        if missing:
            write_whole(path, lambda temporary: picture.convert("RGB").save(temporary, "JPEG", quality=QUALITY))
        self._identities[portrait.name] = portrait.identity
        return missing

    def close(self) -> None:
        """Write the metadata whole, with what another process has listed meanwhile."""
        if (self.folder / METADATA).exists():
            self._identities = read_metadata(self.folder / METADATA) | self._identities
        text = json.dumps(self._identities, ensure_ascii=False, indent=1)
        write_whole(self.folder / METADATA, lambda file: file.write_text(text, encoding="utf-8"), overwrite=True)

    @property
    def counts(self) -> tuple[int, int]:
        """Pictures and people that are listed."""
        return len(self._identities), len(set(self._identities.values()))
