"""Training-free guidance: pictures steered while they are sampled, by a loss on their preview.

The latent that a sampler would step towards moves against the gradient of the loss. How far is fixed beforehand, so
that a scale means the same at every noise level, in every family and for every loss.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from .preview import boundary_scalings

PreviewLoss = Callable[[Tensor], Tensor]
"""What a preview lacks: pictures (batch, 3, height, width), where -1..1 is black to white, -> (batch,).

Differentiable, each picture's value independent of the others, and 0 when nothing is left to wish for. Previews leave
-1..1 a little.
"""


def consistency_preview(denoised: Tensor, noisy: Tensor, sigmas: Tensor, timesteps: Tensor) -> Tensor:
    """`preview` for samplers that count noise in sigmas: f(x, σ) = c_skip x / √(1 + σ²) + c_out x_0, differentiable.

    Args:
        denoised: x_0 as the consistency model predicts it, (batch, channels, height, width).
        noisy: x = x_0 + σ ε, same shape.
        sigmas, timesteps: of each sample, (batch,).

    Returns:
        Final latents, float32.
    """
    if denoised.shape != noisy.shape or sigmas.shape != noisy.shape[:1] or timesteps.shape != noisy.shape[:1]:
        raise ConfigError(
            f"a preview needs one sigma and one timestep for each sample and a prediction of the latents' shape, found "
            f"sigmas {tuple(sigmas.shape)}, timesteps {tuple(timesteps.shape)}, prediction {tuple(denoised.shape)} "
            f"and latents {tuple(noisy.shape)}"
        )
    per_sample = (-1, *[1] * (noisy.ndim - 1))
    c_skip, c_out = (scaling.to(noisy.device).reshape(per_sample) for scaling in boundary_scalings(timesteps))
    spread = (1 + sigmas.float() ** 2).sqrt().reshape(per_sample)
    return c_out * denoised.float() + c_skip * noisy.float() / spread


def weighted_loss(losses: Sequence[tuple[float, PreviewLoss]]) -> PreviewLoss:
    """Σ_k w_k L_k as one loss."""

    def total(pictures: Tensor) -> Tensor:
        values = []
        for weight, loss in losses:
            value = loss(pictures)
            if value.shape != pictures.shape[:1]:
                raise ConfigError(
                    f"a preview loss must give one value for each of {len(pictures)} pictures, got {tuple(value.shape)}"
                )
            values.append(weight * value.float().to(pictures.device))
        return torch.stack(values).sum(0)

    return total


def preview_gradient(latents: Tensor, decode: Callable[[Tensor], Tensor], loss: PreviewLoss) -> tuple[Tensor, Tensor]:
    """∂L/∂latents and L of each sample; one at a time, because a decoder's gradient needs much memory.

    Args:
        latents: final latents, (batch, channels, height, width).
        decode: from (1, channels, height, width) to pictures (1, 3, height, width) in -1..1.

    Returns:
        Gradients of the latents' shape and losses (batch,), both float32 and on the latents' device.
    """
    gradients, losses = [], []
    for one in latents.detach().split(1):
        one = one.requires_grad_()
        with torch.enable_grad():
            pictures = decode(one)
            value = loss(pictures)
            # A mean over pixels has gradients that half precision would round to zero.
            factor = pictures[0].numel()
            (gradient,) = torch.autograd.grad(value.sum() * factor, one)
        gradients.append(gradient.float() / factor)
        losses.append(value.detach().float().to(latents.device))
    return torch.cat(gradients), torch.cat(losses)


def gradient_before(latents: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with respect to ``latents`` taken back to what they were computed from, in float32.

    Every sample's gradient goes through the network with size one: half precision would lose smaller ones.
    """
    size = _root_mean_square(gradient)
    (before,) = torch.autograd.grad(latents, source, (gradient / size.clamp_min(_TINY)).to(latents.dtype))
    return before.float() * size


def guided_shift(
    gradient: Tensor, losses: Tensor, scale: float, *, taken: float = 1.0, region: Tensor | None = None
) -> Tensor:
    """What to add to the denoised latents: -g · min(s / rms(g), L / (r ‖g‖²)) for each sample.

    The first bound gives the shift the root mean square ``scale``, in standard deviations of a latent, which is
    about 1. A sampler takes the part r = 1 - σ_next / σ of it in each step; over a run that sums up to about
    scale · ln(σ_first / σ_last), however many steps there are. The second bound ends where the loss, taken for
    linear, would be zero (Polyak's step), so that a large scale does not overshoot what has been reached.

    Args:
        gradient: g, (batch, channels, height, width).
        losses: L, (batch,), not negative.
        taken: r, in (0, 1].
        region: part that may change, 0 to 1, broadcastable to the gradient; its size is what the mean is taken over.

    Returns:
        Same shape, float32; zero for a sample whose gradient vanishes or is no number.
    """
    gradient = gradient.float()
    squares = gradient.square().flatten(1).sum(1)
    count = gradient[0].numel() if region is None else (region > 0).expand_as(gradient).flatten(1).sum(1).clamp_min(1)
    reach = losses.float().to(squares).clamp_min(0) / taken / squares
    step = torch.minimum(scale * (count / squares).sqrt(), reach)
    usable = torch.isfinite(squares) & (squares > 0) & torch.isfinite(step)
    per_sample = (-1, *[1] * (gradient.ndim - 1))
    shift = -step.reshape(per_sample) * gradient
    return torch.where(usable.reshape(per_sample), shift, torch.zeros_like(shift))


_TINY = torch.finfo(torch.float32).tiny


def _root_mean_square(values: Tensor) -> Tensor:
    return values.float().square().mean(tuple(range(1, values.ndim)), keepdim=True).sqrt()
