"""Whether looking ahead teaches a face encoder what the denoising loss alone does not: to keep who somebody is."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

import boot  # noqa: E402 - lies in a folder that was just added

boot.declare_missing_torchvision_operators()

import encoders  # noqa: E402
from drawing import draw  # noqa: E402
from identity import portrait  # noqa: E402
from subjects import PEOPLE  # noqa: E402
from weights import path_of  # noqa: E402

from comfyui_personalize.trainers.lookahead.data import FaceDataSettings, FaceSet  # noqa: E402

SETTINGS = {"batch_size": 2, "lookahead_batch_size": 2, "lcm_scale_every": 0, "kv_drop_chance": 0.0, "weight": 1.0}
SETTINGS |= {"adapter_drop_chance": 0.0}
ITERATIONS, RATE = 20, 3e-3
STILL = {"learning_rate": 1e-12, "adapter_learning_rate": 1e-12}
"""Rates at which a training changes nothing that matters."""
PICTURES = {"vanilla/0.png": "ada"} | {f"other/{number}.png": "ben" for number in range(15)}
"""What the encoder sees is ada, what is to be denoised is mostly ben: only looking ahead asks for ada."""


class Classroom:
    """Trains encoders on the two, and looks at the loss of looking ahead."""

    def __init__(self, folder: Path):
        self.folder, self.checkpoint = folder, path_of("world_sdxl.safetensors")
        for number, (name, who) in enumerate(PICTURES.items()):
            scene = replace(portrait(random.Random(number), PEOPLE[who]), style="flat")
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(np.rint(draw(scene) * 255).astype(np.uint8)).save(folder / name)
        (folder / "metadata.json").write_text(json.dumps(dict.fromkeys(PICTURES, "both")))
        both = FaceSet(folder=folder, metadata=folder / "metadata.json", only_vanilla_references=True)
        self.people = FaceDataSettings(sets=(both,), prompt="a person").open()
        models = encoders.write_start(folder / "models", self.checkpoint)
        lcm = encoders.write_lcm_lora(folder / "models" / "lcm.safetensors", self.checkpoint, self.people, steps=0)
        self.models = replace(models, lcm_lora=lcm)

    def teach(self, name: str, steps: int, *, ahead: bool, start: Path | None = None, **settings) -> encoders.Taught:
        models = replace(self.models, start=start or self.models.start)
        told = SETTINGS | settings
        return encoders.teach(
            self.checkpoint, models, self.people, self.folder / name, steps=steps, ahead=ahead, **told
        )

    def lookahead_term(self, start: Path, name: str) -> float:
        """Of the same rows and timesteps, whatever the encoder."""
        losses = self.teach(name, 8, ahead=True, start=start, seed=7, **STILL).losses[1::2]
        return sum(losses) / len(losses)


@pytest.mark.slow
def test_only_looking_ahead_leads_the_preview_to_the_reference(tmp_path):
    room = Classroom(tmp_path)
    rates = {"learning_rate": RATE, "adapter_learning_rate": RATE}
    encoders_of = {
        "untaught": room.teach("untaught", 1, ahead=False, **STILL),
        "ahead": room.teach("ahead", 2 * ITERATIONS, ahead=True, **rates),
        "denoising": room.teach("denoising", ITERATIONS, ahead=False, **rates),
    }
    terms = {name: room.lookahead_term(one.path, f"{name}_looked_at") for name, one in encoders_of.items()}
    assert terms["ahead"] < 0.6 * terms["untaught"]
    assert terms["denoising"] > 0.8 * terms["untaught"]
