"""A face encoder trained in two processes: they share the rows of a batch, and the result is that of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.trainers.__main__ import main
from comfyui_personalize.trainers.clip_vision import load_clip_vision
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.lookahead.batch import Batches
from comfyui_personalize.trainers.lookahead.config import LookaheadConfig
from comfyui_personalize.trainers.lookahead.iterations import Iterations
from comfyui_personalize.trainers.lookahead.pictures import PictureReader
from comfyui_personalize.trainers.ranks import Ranks

CPU = torch.device("cpu")
RUNNER = Path(__file__).parents[3] / "tiny" / "run_trainer.py"


class OneOf(Ranks):
    """A process among others that nothing is asked of."""

    def __init__(self, index, count):
        self.index, self.count = index, count


def told(prompts):
    return Conditioning(torch.zeros(len(prompts), 77, 4))


def test_processes_share_a_batch_row_by_row(tiny):
    vision = load_clip_vision(tiny.models.clip_vision, torch.float32, CPU)
    vae, data = tiny.base().load_vae(), tiny.data()
    reader = PictureReader(vae, vision, side=64, crop="random", faces=None, crop_heads=False, memory=1.0)
    made = {}
    for rows, places in ((2, [(0, 1)]), (1, [(0, 2), (1, 2)])):
        config = LookaheadConfig(batch_size=rows, lookahead_batch_size=rows, adapter_drop_chance=0.5)
        for index, count in places:
            ranks = OneOf(index, count)
            iterations = Iterations(config, data, torch.Generator().manual_seed(3), ranks)
            batches = Batches(config, data, reader, told, ranks, CPU)
            made[rows, index] = [batches.make(iterations.next(), 1000) for _ in range(4)]
    for whole, *parts in zip(made[2, 0], made[1, 0], made[1, 1]):
        assert whole.prompts == parts[0].prompts + parts[1].prompts
        for name in ("timesteps", "targets", "references"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        for name in ("latents", "noise", "reference", "features"):
            joined = torch.cat([getattr(part.rows, name) for part in parts])
            torch.testing.assert_close(getattr(whole.rows, name), joined)
        if whole.dropped is not None:
            assert whole.dropped.tolist() == parts[0].dropped.tolist() + parts[1].dropped.tolist()


@pytest.fixture
def config(tiny):
    """A TOML file for a short training; a preview is sampled, which only one process may do."""
    models = {name: str(getattr(tiny.models, name)) for name in ("start", "clip_vision", "lcm_lora")}
    values = {
        "device": "cpu",
        "base.path": str(tiny.checkpoint),
        "output.folder": str(tiny.folder / "out"),
        **{f"models.{name}": path for name, path in models.items()},
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    lines += ["[[data.sets]]", f"folder = {json.dumps(str(tiny.people))}", "[train]", "steps = 2", "resolution = 64"]
    # A large epsilon makes updates nearly proportional to gradients, where AdamW would turn rounding into steps.
    lines += ['precision = "fp32"', "kv_drop_chance = 0.0", "adam_epsilon = 0.01", "learning_rate = 1e-2"]
    lines += ['save_precision = "fp32"', "preview_every = 2", "preview_steps = 1", "preview_people = 1"]
    lines += ["evaluate_every = 1", "evaluation_pairs = 2", 'picture_losses = [{ name = "image_l1", weight = 0.1 }]']
    path = tiny.folder / "run.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(config, tiny):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["lookahead", "--config", str(config), "train.lookahead_batch_size=2", "train.batch_size=2"]
    assert main([*words, "output.name=one"]) == 0
    torch.set_num_threads(threads)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")
    words = ["lookahead", "--config", str(config), "train.lookahead_batch_size=1", "train.batch_size=1"]
    command = [sys.executable, *launcher, port, str(RUNNER), *words, "output.name=two"]
    done = subprocess.run(command, cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all steps done") == done.stdout.count("saved ") == 1
    logs = [(tiny.folder / "out/runs" / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    first, second = ([json.loads(line) for line in lines] for lines in logs)
    assert len(first) == len(second)
    for one, two in zip(first, second):
        assert one.keys() == two.keys()
        assert [two[key] for key in one] == pytest.approx([*one.values()], rel=1e-4)
    one, two = (load_file(tiny.folder / f"out/lookahead_encoders/{name}.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=lambda said, name=name: name + said)
    assert len([*(tiny.folder / "out/runs/two").glob("preview*")]) == 1
