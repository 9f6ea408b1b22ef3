"""ArcFace's face recognition network in torch, so that gradients reach the picture (arXiv 1801.07698)."""

import math
import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FormatError


class _SqueezeExcite(nn.Module):
    """Channels weighted by what all positions say together (arXiv 1709.01507)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        summary = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.fc1(summary).relu()).sigmoid()


class _Unit(nn.Module):
    """Improved residual unit with squeeze and excitation."""

    def __init__(self, inputs: int, channels: int, hidden: int, stride: int, projected: bool):
        super().__init__()
        self.stride = stride
        self.shortcut_layer = (
            nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            if projected
            else None
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            _SqueezeExcite(channels, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return self.res_layer(x) + kept


class ArcFace(nn.Module):
    """IR-SE50: aligned faces (batch, 3, side, side) in -1..1, RGB -> unit vectors (batch, dim).

    Of every stage the first unit halves the picture. The names of the parameters are those of the published file.

    Args:
        units: (input channels, channels, hidden channels of the excitation, stride, projected shortcut) of each unit.
        dim: length of an embedding.
        side: of the last feature map; the pictures are 16 times as large after the usual four stages.
    """

    def __init__(self, units: list[tuple[int, int, int, int, bool]], dim: int, side: int):
        super().__init__()
        first, last = units[0][0], units[-1][1]
        self.size = side * math.prod(unit[3] for unit in units)
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        self.body = nn.Sequential(*(_Unit(*unit) for unit in units))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last), nn.Dropout(0.6), nn.Flatten(), nn.Linear(last * side**2, dim), nn.BatchNorm1d(dim)
        )

    def forward(self, faces: Tensor) -> Tensor:
        return F.normalize(self.output_layer(self.body(self.input_layer(faces))), dim=1)


def build_arcface(tensors: Mapping[str, Tensor], name: str) -> ArcFace:
    """The network that a state dict describes by its sizes, ready for use: in evaluation mode and frozen.

    Args:
        tensors: as in the published model_ir_se50.pth.
        name: file name, for messages.

    Raises:
        FormatError: the tensors are not those of an IR-SE network.
    """
    numbers = {int(found[1]) for key in tensors if (found := re.match(r"body\.(\d+)\.res_layer\.1\.weight$", key))}
    try:
        units = [_unit(tensors, index) for index in range(len(numbers))]
        dim, features = tensors["output_layer.3.weight"].shape
        side = math.isqrt(features // units[-1][1])
        network = ArcFace(units, dim, side)
        weights = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise FormatError(_foreign(name)) from error
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
        raise FormatError(_foreign(name))
    return network.float().train(False).requires_grad_(False)


def _unit(tensors: Mapping[str, Tensor], index: int) -> tuple[int, int, int, int, bool]:
    channels, inputs = tensors[f"body.{index}.res_layer.1.weight"].shape[:2]
    hidden = len(tensors[f"body.{index}.res_layer.5.fc1.weight"])
    projected = f"body.{index}.shortcut_layer.0.weight" in tensors
    return inputs, channels, hidden, 2 if index == 0 or projected else 1, projected


def _foreign(name: str) -> str:
    return f"{name} is no IR-SE50 face network; choose the model_ir_se50.pth that the encoder's authors name"
