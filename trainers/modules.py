"""Frozen diffusers and transformers modules from named tensors, loaded strictly and without a second copy."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import IncompatibleModelError
from .weights import Weights

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Component:
    """One part of a base: the arguments of its class, and where its weights lie and under which names."""

    kind: str
    """``unet``, ``text``, ``text_projection`` (a text encoder with its projection), ``vae``, ``tiny_vae`` or
    ``tiny_decoder``."""
    config: dict[str, Any]
    weights: Weights
    names: tuple[str, ...]
    convert: Callable[[Tensors], Tensors]

    def build(self) -> nn.Module:
        """The module on the meta device: every shape, no values."""
        with torch.device("meta"):
            return _BUILDERS[self.kind](self.config)

    def fit(self, module: nn.Module, tensors: Tensors) -> Tensors:
        """File's tensors under the module's names; IncompatibleModelError unless they are exactly what it needs."""
        with missing_weights_named(self.weights.name):
            tensors = self.convert(tensors)
        if self.kind == "text" and not hasattr(module, "text_model"):
            # transformers 5.6 flattened CLIPTextModel, but not the class with the projection.
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        check_fit(module, tensors, self.weights.name, self.kind)
        return tensors

    def load(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The module in evaluation mode, without gradients; IncompatibleModelError unless every weight fits."""
        module = self.build()
        tensors = self.fit(module, self.weights.read(self.names, dtype))
        module.load_state_dict(tensors, strict=True, assign=True)
        restore_buffers(module)
        return module.to(device).train(False).requires_grad_(False)


@contextmanager
def missing_weights_named(name: str) -> Iterator[None]:
    """Turn the KeyError of a look-up among a file's weights into a sentence about the file."""
    try:
        yield
    except KeyError as error:
        raise IncompatibleModelError(
            f"{name}: the weight {error.args[0]} is missing; expected a complete, unmodified model, choose another file"
        ) from error


def check_fit(module: nn.Module, tensors: Tensors, name: str, kind: str) -> None:
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for problem, keys in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has unknown", sorted(found.keys() - expected.keys())),
        ("has misshapen", sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])),
    ):
        if keys:
            raise IncompatibleModelError(
                f"{name}: the {kind.split('_')[0]} part {problem} weights ({len(keys)}, such as {keys[0]}); "
                "expected a complete, unmodified model, choose another file"
            )


def restore_buffers(module: nn.Module) -> None:
    """Fill what a file does not store: the position numbers of text encoders."""
    for child in module.modules():
        if isinstance(positions := child._buffers.get("position_ids"), Tensor) and positions.is_meta:
            child._buffers["position_ids"] = torch.arange(positions.shape[-1]).expand(positions.shape)
    remaining = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta]
    if remaining:
        raise IncompatibleModelError(
            f"{type(module).__name__}: no values for {remaining[:3]}; "
            "install another release of transformers or diffusers"
        )


def _unet(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def _text(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def _text_projection(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def _vae(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def _tiny_vae(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderTiny

    # diffusers saves one attribute too many, and warns of it when it reads it back.
    return AutoencoderTiny.from_config({key: config[key] for key in config if key != "block_out_channels"})


def _tiny_decoder(config: dict[str, Any]) -> nn.Module:
    module = _tiny_vae(config)
    del module.encoder
    return module


_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": _unet,
    "text": _text,
    "text_projection": _text_projection,
    "vae": _vae,
    "tiny_vae": _tiny_vae,
    "tiny_decoder": _tiny_decoder,
}


def without(names: Iterable[str], *endings: str) -> tuple[str, ...]:
    """The names that end in none of ``endings``: buffers that old files store and nobody loads."""
    return tuple(name for name in names if not name.endswith(endings))
