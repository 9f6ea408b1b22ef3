"""Pictures of people for the face encoder: who is who, prompts from file names, and which picture the encoder sees."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from ...models.errors import ConfigError, DatasetError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
CONCEPT = "conceptname"
"""What file names say for the person; the authors' generation scripts write it."""
VANILLA = "vanilla"
"""In the path of plain photographs, as opposed to pictures in a style."""
VALIDATION_PROMPTS = (
    "A painting of a face in the style of monet",
    "A photo of a face in the forest",
    "A photo of a face as a knight in plate",
    "Fauvism painting of a face",
)
"""Of the authors' example configs."""
TARGET_WORD, REFERENCE_WORD = "<s*>", "<ph>"
"""What ``{placeholder}`` becomes in the prompts of targets and of the encoder's pictures."""

_NAMED = 5
"""How many pictures that are missing or unreadable a summary names."""


@dataclass(frozen=True, kw_only=True)
class FaceSet:
    """A folder of pictures; names follow the authors' data/data_config.py where they say the same."""

    folder: Path
    """Holds the pictures, perhaps in folders of their own."""
    metadata: Path | None = None
    """JSON file: path below the folder -> identity. Without it every picture is its own reference."""
    prompt_in_filename: bool = False
    """Read prompts from file names: ``A_photo_of_conceptname_123.jpg`` is "A photo of" whatever stands for people."""
    only_vanilla_references: bool = False
    """Show the encoder only pictures with ``vanilla`` in their path."""
    weight: float = 1.0
    """Share of the draws, relative to the other sets, where sets are balanced."""
    augment: bool = False
    """Cut and mirror the reference at random; for sets without metadata."""
    placeholder: str = "a face"
    """What stands for people in prompts from file names."""
    only_target_prompts: bool = False
    """Give the encoder the target's prompt too."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight of the set {self.folder} must be positive, got {self.weight!r}")


@dataclass(frozen=True)
class FacePicture:
    """A picture on disk."""

    path: Path
    name: str
    """Path below the folder, with slashes."""
    prompt: str
    """May hold ``{placeholder}``."""
    identity: str | None


@dataclass(frozen=True)
class FacePair:
    """What one row of a batch is made of."""

    target: FacePicture
    reference: FacePicture
    prompt: str
    reference_prompt: str
    augment: bool


def prompt_of(stem: str, placeholder: str) -> str:
    """The prompt that a file's name tells: underscores are spaces, numbers at the end do not count.

    Raises DatasetError when nothing else is left of the name.
    """
    words = stem.split("_")
    while words and words[-1].isnumeric():
        words.pop()
    if not any(words):
        raise DatasetError(
            f"{stem}: the file name holds no prompt, only numbers; rename it as A_photo_of_{CONCEPT}_{stem}, or turn "
            "prompt_in_filename off"
        )
    return " ".join(words).replace(CONCEPT, placeholder)


class People:
    """The pictures of one set, grouped by who they show.

    Where the authors' dataset.py goes wrong this does not: files that are missing are no candidates, a person without
    vanilla pictures is met all the same, and a single vanilla picture is shown beside the others of its person.
    """

    def __init__(self, settings: FaceSet, prompt: str):
        """Look at the folder and the metadata; no picture is opened.

        Args:
            prompt: for all pictures, unless their names tell theirs.

        Raises:
            DatasetError: the folder or the metadata cannot be read, or no picture is there.
        """
        self.settings = settings
        if not settings.folder.is_dir():
            raise DatasetError(f"{settings.folder}: no such folder of pictures; correct the path")
        if settings.metadata is None:
            found = (path for path in settings.folder.rglob("*") if path.suffix.lower() in ENDINGS)
            names = sorted((path.relative_to(settings.folder).as_posix() for path in found), key=_by_stem)
            labels: Mapping[str, str | None] = dict.fromkeys(names)
        else:
            labels = read_metadata(settings.metadata)
        # Path.is_file raises for names that no disk can hold and for folders that may not be entered.
        self.missing = [name for name in labels if not os.path.isfile(settings.folder / name)]
        """Files that the metadata names and that are not there."""
        gone = set(self.missing)
        self.pictures = [
            FacePicture(settings.folder / name, name, self._prompt(name, prompt), label)
            for name, label in labels.items()
            if name not in gone
        ]
        if not self.pictures:
            raise DatasetError(
                f"{settings.folder}: none of {len(labels)} pictures is there; the metadata's file names are paths "
                "below the folder"
            )
        self._of: dict[str | None, list[FacePicture]] = {}
        for picture in self.pictures:
            self._of.setdefault(picture.identity, []).append(picture)

    @property
    def alone(self) -> list[str]:
        """People with a single picture, which is then its own reference."""
        if self.settings.metadata is None:
            return []
        return [identity for identity, pictures in self._of.items() if len(pictures) == 1]

    def _prompt(self, name: str, prompt: str) -> str:
        if not self.settings.prompt_in_filename:
            return prompt
        return prompt_of(PurePosixPath(name).stem, self.settings.placeholder)

    def references(self, target: FacePicture) -> list[FacePicture]:
        """Pictures of the same person that the encoder may see; the target itself when there is no other."""
        if self.settings.metadata is None:
            return [target]
        others = [one for one in self._of[target.identity] if one is not target]
        if not self.settings.only_vanilla_references:
            return others or [target]
        vanilla = [one for one in others if VANILLA in one.name]
        if vanilla or VANILLA in target.name:
            return vanilla or [target]
        return others or [target]

    def pair(self, index: int, random_target_chance: float, generator: torch.Generator) -> FacePair:
        """A target and a reference of the same person.

        Args:
            random_target_chance: that the target shows anybody of the set, with that picture's prompt.
        """
        target = self.pictures[index]
        reference = _pick(self.references(target), generator)
        stray, anybody = torch.rand((), generator=generator), _pick(self.pictures, generator)
        if stray < random_target_chance:
            target = anybody
        prompt = filled(target.prompt, TARGET_WORD)
        reference_prompt = prompt if self.settings.only_target_prompts else filled(reference.prompt, REFERENCE_WORD)
        augment = self.settings.augment and self.settings.metadata is None
        return FacePair(target, reference, prompt, reference_prompt, augment)

    def prompts(self) -> set[str]:
        """All that ``pair`` can give."""
        own = {picture.prompt for picture in self.pictures}
        return {filled(prompt, word) for prompt in own for word in (TARGET_WORD, REFERENCE_WORD)}


@dataclass(frozen=True, kw_only=True)
class FaceDataSettings:
    """Which pictures to learn from, and how they are drawn."""

    sets: tuple[FaceSet, ...]
    """Folders of pictures."""
    balance: bool = False
    """Draw from every set alike, however many pictures it has; else every picture is met once in a pass."""
    crop_heads: bool = False
    """Show the encoder heads, upright and cut out, where a face is found."""
    random_target_chance: float = 0.0
    """Chance that the target shows somebody else, which teaches when not to copy the reference."""
    prompt: str = "a photo of a face"
    """For pictures whose names tell none."""
    validation: FaceSet | None = None
    """People that are not trained on: the evaluations' and, beside some of the others, the previews'."""
    validation_prompts: tuple[str, ...] = VALIDATION_PROMPTS
    """What previews show people as, beside a prompt that is trained on."""

    def __post_init__(self) -> None:
        if not self.validation_prompts:
            raise ConfigError("data.validation_prompts is empty; give at least one, such as a painting of a face")
        if not self.sets:
            raise ConfigError("data has no sets; add [[data.sets]] with a folder")
        if not 0 <= self.random_target_chance <= 1:
            raise ConfigError(f"data.random_target_chance must be between 0 and 1, got {self.random_target_chance!r}")

    def open(self) -> "FaceData":
        """Look at all folders; errors as People."""
        validation = None if self.validation is None else FaceData(self, [People(self.validation, self.prompt)])
        return FaceData(self, [People(one, self.prompt) for one in self.sets], validation)


class FaceData:
    """Several sets as one, in the order given."""

    def __init__(self, settings: FaceDataSettings, sets: Sequence[People], validation: "FaceData | None" = None):
        self.settings, self.sets, self.validation = settings, list(sets), validation
        self._starts = [sum(len(one.pictures) for one in self.sets[:index]) for index in range(len(self.sets))]

    def __len__(self) -> int:
        return sum(len(one.pictures) for one in self.sets)

    def pair(self, index: int, generator: torch.Generator, *, strays: bool = True) -> FacePair:
        """As People.pair, of the set that picture ``index`` belongs to.

        Args:
            strays: whether random targets may be drawn.
        """
        which = max(number for number, start in enumerate(self._starts) if start <= index)
        chance = self.settings.random_target_chance if strays else 0.0
        return self.sets[which].pair(index - self._starts[which], chance, generator)

    def spread(self, count: int) -> list[int]:
        """Numbers of so many pictures, evenly spread; some again where there are fewer."""
        return [place * len(self) // count for place in range(count)]

    def remarks(self) -> list[str]:
        """What the user might want to know about the folders, in sentences without their ends."""
        said = []
        for one in [*self.sets, *(self.validation.sets if self.validation else ())]:
            if one.missing:
                count, which = len(one.missing), some_names(one.missing)
                said.append(f"{one.settings.folder.name}: {count} pictures of the metadata are not there ({which})")
            if one.alone:
                said.append(f"{one.settings.folder.name}: {len(one.alone)} people have a single picture")
        return said

    def prompts(self) -> list[str]:
        """All that ``pair`` can give."""
        return sorted(set().union(*(one.prompts() for one in self.sets)))

    def chances(self) -> torch.Tensor:
        """Of each picture in balanced draws: a set's weight, shared evenly among its pictures; float64, with sum 1."""
        weights = [
            torch.full((len(one.pictures),), one.settings.weight / len(one.pictures), dtype=torch.float64)
            for one in self.sets
        ]
        joined = torch.cat(weights)
        return joined / joined.sum()

    @property
    def fingerprint(self) -> str:
        """Identity of names, sizes, people, prompts and of how they are drawn."""
        hasher = hashlib.sha256()
        told = self.settings
        hasher.update(repr((told.balance, told.crop_heads, told.random_target_chance)).encode())
        for one in self.sets:
            told = one.settings
            flags = told.weight, told.only_vanilla_references, told.augment, told.only_target_prompts
            hasher.update(repr(flags).encode())
            for picture in one.pictures:
                entry = picture.name, picture.path.stat().st_size, picture.prompt, picture.identity
                hasher.update(repr(entry).encode())
        return hasher.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """File name -> identity; DatasetError for a file that is not such a table, or that leads out of its folder."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: the metadata cannot be read ({error}); give a JSON file name -> identity"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(value, (str, int)) for value in values.values()):
        raise DatasetError(f"{path}: expected one JSON table, file name -> identity")
    for name in values:
        place = PurePosixPath(name.replace("\\", "/"))
        if not place.parts or place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
            raise DatasetError(f"{path}: {name!r} leads out of the folder or names no file; give paths below it")
    return {name.replace("\\", "/"): str(value) for name, value in values.items()}


def some_names(names: Sequence[str]) -> str:
    """The first of these names, for a summary."""
    return ", ".join([*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])])


def filled(prompt: str, word: str) -> str:
    """The prompt with a word for ``{placeholder}``; other braces stay."""
    return prompt.replace("{placeholder}", word)


def _pick(candidates: Sequence[FacePicture], generator: torch.Generator) -> FacePicture:
    return candidates[int(torch.randint(len(candidates), (), generator=generator))]


def _by_stem(name: str) -> tuple[str, str]:
    return PurePosixPath(name).stem, name
