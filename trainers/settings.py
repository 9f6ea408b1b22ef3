"""What a training from the command line is told besides the recipe's own settings: base model, pictures, output."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.errors import ConfigError
from ..models.formats import safe_name
from ..models.tokens import LearnedToken
from .dataset import Dataset
from .initializers import InitializerSettings, choose_initializers
from .output import OutputPlace
from .plateau import CLIPPlateau
from .stopping import DVAR, FixedSteps


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Which model to start from."""

    path: str
    """Single-file checkpoint, diffusers folder, or hub id."""
    vae: str = ""
    """Separate autoencoder; empty takes the base's own."""
    tokenizer: str = ""
    """Folder of a CLIP tokenizer; empty takes the base's own or an installed package's."""


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Which pictures to learn from: a folder with captions, or a JSON file in the DCO authors' layout."""

    folder: Path | None = None
    """Folder of pictures with captions in text files of the same name, or with a config.json."""
    json: Path | None = None
    """JSON file with images, prompts, base_prompts, inserting_tokens and initializer_tokens."""
    section: str = ""
    """Section of that JSON file; empty takes the only or the most complete one."""
    captions: tuple[str, ...] = ()
    """One caption for all pictures, or one each, instead of text files."""
    base_captions: tuple[str, ...] = ()
    """The same in ordinary words; empty derives them from the captions."""
    tokens: tuple[LearnedToken, ...] = ()
    """Learned tokens: trigger, initializer, rows."""
    class_folder: Path | None = None
    """Pictures of the class, for prior preservation."""
    class_captions: tuple[str, ...] = ()
    """Their captions; empty reads text files beside them."""
    initializer: InitializerSettings | None = None
    """Chooses the words that tokens start from; None keeps those given with them."""

    def open(self) -> Dataset:
        """Read and check the pictures and captions."""
        if (self.folder is None) == (self.json is None):
            raise ConfigError("dataset needs either folder or json, and only one of them")
        if self.json is not None and self.captions:
            raise ConfigError("dataset has both json and captions; the JSON file's prompts are the captions, drop one")
        given = {"tokens": self.tokens or None, "base_captions": self.base_captions or None}
        section = self.section or None
        if self.json is not None:
            dataset = Dataset.from_json(self.json, section, **given)
        else:
            dataset = Dataset.from_folder(self.folder, captions=self.captions or None, section=section, **given)
        if self.class_folder is not None:
            dataset = dataset.with_class_folder(self.class_folder, self.class_captions or None)
        if self.initializer is not None:
            dataset, choices = choose_initializers(dataset, self.initializer, judge=self.initializer.open())
            for choice in choices:
                print(f"{choice.trigger} starts from {choice.word}")
        return dataset


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where the results go."""

    name: str
    """Name of the files, without ending."""
    folder: Path = Path("output")
    """Receives what was trained and a folder with log, previews and training states."""
    overwrite: bool = False
    """Replace files of the same name."""

    kind = "loras"  # no setting: the sub-folder for what the recipe trains

    def place(self) -> OutputPlace:
        folder, name = self.folder, safe_name(self.name)
        return OutputPlace(
            name, folder / self.kind, folder / "embeddings", folder / "runs" / name, overwrite=self.overwrite
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A whole command line run; each recipe adds its own ``train`` table."""

    base: BaseSettings
    dataset: DatasetSettings
    output: OutputSettings
    stopping: DVAR | CLIPPlateau | FixedSteps | None = None
    """Ends the training when it has converged; ``rule`` says by which rule, ``dvar`` where it says nothing. None takes
    all steps."""
    device: str = ""
    """``cuda``, ``cpu`` or ``mps``; empty takes the best there is."""


def pick_device(name: str) -> torch.device:
    """The device of that name, or the best there is for ''; ConfigError for one that this machine lacks."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
