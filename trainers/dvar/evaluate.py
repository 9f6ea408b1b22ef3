"""The plain denoising error on the evaluation batch of a stopping rule."""

from torch import Tensor

from ...models.denoising import denoising_error
from ...models.dvar import EvaluationBatch
from ..conditioning import predict
from ..devices import autocast
from ..prepared import Prepared
from ..prompts import Prompts


def plain_error(prepared: Prepared, prompts: Prompts, batch: EvaluationBatch) -> Tensor:
    """Error of what was learned so far, without weights, masks or class pictures (the authors' eval_loss)."""
    device, schedule = prepared.device, prepared.schedule
    time_ids = prepared.told_sizes(prepared.latents.time_ids(batch.pictures))
    latents, noise = batch.latents.to(device), batch.noise.to(device)
    with autocast(prepared.config.precision, device):
        told = prepared.text.policy([prompts.fixed(index) for index in batch.captions], time_ids)
        noisy = schedule.add_noise(latents, noise, batch.timesteps)
        prediction = predict(prepared.unet, noisy, batch.timesteps.to(device), told)
    return denoising_error(prediction, schedule.target(latents, noise, batch.timesteps))
