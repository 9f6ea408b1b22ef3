"""The evaluation batch and its losses against what the authors' loop used and computed."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_personalize.models.dvar import EvaluationBatches, EvaluationSettings, VarianceStop
from comfyui_personalize.models.schedules import NoiseSchedule

POSTERIOR_STD = 0.3
"""Of the stand-in autoencoder that the cases describe."""


class Replayed:
    """The recorded draws, in order; asking for anything else fails."""

    def __init__(self, case):
        self.events = [event for event in case.config["events"] if "draw" in event]
        self.inputs = case.inputs

    def next(self, *kinds):
        event = self.events.pop(0)
        assert event["kind"] in kinds
        return self.inputs[f"draw_{event['draw']}"]

    def normal(self, shape):
        draw = self.next("vae_sample", "randn")
        assert draw.shape == shape
        return draw

    def permutation(self, count):
        draw = self.next("randperm")
        # The authors' last interval is one timestep short: it lacks t = 999.
        assert count - len(draw) == (1 if count == 334 else 0)
        return draw


class Pictures:
    """The recorded pictures through the stand-in autoencoder."""

    def __init__(self, case):
        self.pixels = joined(case, "pixel_values")
        self.scale = case.config["latent_scale"]

    def __len__(self):
        return len(self.pixels)

    def moments(self, index):
        small = F.avg_pool2d(self.pixels[index : index + 1], 2)[0]
        mean = torch.cat([small, small.mean(0, keepdim=True)]) * self.scale
        return mean, torch.full_like(mean, POSTERIOR_STD * self.scale)


def joined(case, name):
    return torch.cat([case.inputs[f"batch{place}_{name}"] for place in range(case.config["n_eval_batches"])])


@pytest.mark.golden("dvar", "eval_batch_*")
def test_evaluations(case):
    config, weights = case.config, case.weights
    settings = EvaluationSettings(
        batch_size=config["eval_batch_size"],
        accumulation=config["eval_gradient_accumulation_steps"],
        code=config["exp_code"],
        mean_latent=config["mean_latent"],
        mean_noise=config["mean_noise"],
        intervals=config["triple"],
    )
    scheduler = config["scheduler"]
    schedule = NoiseSchedule.scaled_linear(
        timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
    )
    draws, captions = Replayed(case), joined(case, "input_ids")
    table = torch.cat([weights["table"], weights["concept_token"]])

    def predict(noisy, timesteps, ids):
        told = (table[ids].mean(1) @ weights["P"])[:, :, None, None]
        return torch.tanh(config["a"] * noisy + told + config["b"] * timesteps[:, None, None, None] / 1000)

    evaluated = EvaluationBatches(settings, Pictures(case), schedule.timesteps, draws)
    losses = {}
    for evaluation in range(config["n_eval"]):
        turn = -1
        for batch in evaluated.batches():
            turn += not batch.interval
            suffix = f"_{batch.interval}" if batch.interval else ""
            used = {"latents": batch.latents, "noise": batch.noise, "captions": captions[list(batch.captions)]}
            used[f"timesteps{suffix}"] = batch.timesteps
            for name, tensor in used.items():
                expected = case.inputs[f"eval{evaluation}_acc{turn}_{name}"]
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
            noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
            loss = F.mse_loss(predict(noisy, batch.timesteps, used["captions"]), batch.noise)
            losses.setdefault(f"eval_loss{suffix}", []).append(loss / settings.accumulation)
    assert not draws.events  # nothing was drawn that the authors do not draw, and nothing was left out
    for name, parts in losses.items():
        case.check(name, torch.stack(parts).reshape(config["n_eval"], -1).sum(1))
    stop = VarianceStop(config["n_eval"] + 1, 0.15)
    case.check("normalized_var", torch.tensor([stop.update(loss) for loss in case.expected["eval_loss"].tolist()]))
