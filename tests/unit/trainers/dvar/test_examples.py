"""The examples of the three trainings are whole runs with the defaults, and that of a merge is one too."""

from pathlib import Path

import pytest

from comfyui_personalize.trainers.config import build, read_toml
from comfyui_personalize.trainers.dvar.config import CustomDiffusionRun, DreamBoothRun, TextualInversionRun
from comfyui_personalize.trainers.dvar.merge_config import ConceptSettings, MergeRun

FOLDER = Path(__file__).resolve().parents[4] / "trainers" / "dvar"


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("textual_inversion", TextualInversionRun),
        ("dreambooth", DreamBoothRun),
        ("custom_diffusion", CustomDiffusionRun),
    ],
)
def test_an_example_shows_every_setting_with_its_default(name, run):
    values = read_toml(FOLDER / f"{name}.example.toml")
    built = build(run, values)
    assert built.train == type(built.train)()
    assert values["train"].keys() == built.train.as_dict().keys()


def test_the_example_of_a_merge():
    values = read_toml(FOLDER / "merge.example.toml")
    built = build(MergeRun, values)
    assert len(built.concepts) == 2 and built.captions is None
    assert values["concepts"][0].keys() == ConceptSettings.__dataclass_fields__.keys()
