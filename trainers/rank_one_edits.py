"""Perfusion's edits on a diffusers UNet: hooks beside the weights of cross-attention, which are never touched."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.errors import IncompatibleModelError
from ..models.perfusion import KEY, VALUE, EditSpace, Scores, edit_projection, key_value_inputs


def cross_projections(unet: nn.Module) -> dict[str, nn.Module]:
    """Key and value projections of every cross-attention by name, in the model's order."""
    found = {name: module for name, module in unet.named_modules() if name.endswith((KEY, VALUE))}
    if not found:
        raise IncompatibleModelError("the model has no cross-attention to a prompt; expected a Stable Diffusion UNet")
    return found


@torch.no_grad()
def project(module: nn.Module, rows: Tensor) -> Tensor:
    """What a projection itself, without an edit, makes of (rows, dim): (rows, out), float32."""
    # Not by calling the module, which would run its hooks.
    return type(module).forward(module, rows.to(module.weight)).float()


class RankOneEdits:
    """Edits of all of a UNet's cross-attention, for one or several concepts; remove() leaves it bit for bit as before.

    Gradients reach the prompt's encoding and the target outputs. With gradient checkpointing, neither ``space`` nor
    ``superclass`` may change between a forward pass and its backward pass.
    """

    def __init__(self, unet: nn.Module, space: EditSpace, outputs: Mapping[str, Sequence[Tensor]]):
        """Attach.

        Args:
            outputs: target output of each concept, (1 or positions, out), for each of cross_projections. They are
                used as they are, so that an optimizer may move them.

        Raises:
            IncompatibleModelError: ``outputs`` is for other layers, or for layers of another size.
        """
        projections = cross_projections(unet)
        if projections.keys() != outputs.keys():
            raise IncompatibleModelError(
                f"the concept edits {len(outputs)} projections, this model has {len(projections)} (such as "
                f"{min(projections.keys() ^ outputs.keys())}); use the model family that it was trained on"
            )
        for name, module in projections.items():
            wanted = (module.weight.shape[0], space.width)
            if tuple(module.weight.shape) != wanted or any(rows.shape[1:] != wanted[:1] for rows in outputs[name]):
                raise IncompatibleModelError(
                    f"the model's {name} is {tuple(module.weight.shape)}, the concept is for encodings of width "
                    f"{space.width} and outputs of {[tuple(rows.shape) for rows in outputs[name]]}; use the model "
                    "family that it was trained on"
                )
        self.superclass: Tensor | None = None
        """Encoding of the prompt with the superclass word, for global key locking; None for local locking alone."""
        self.enabled = True
        """False runs the model as if nothing were attached."""
        self._space, self._outputs = space, outputs
        self._bases: dict[str, Tensor] = {}
        self._measured: tuple[Tensor, Scores] | None = None
        self._handles = []
        for name, module in projections.items():
            if name.endswith(KEY):
                self._handles.append(module.register_forward_pre_hook(self._lock))
            self._handles.append(module.register_forward_hook(self._edit(name)))

    @property
    def space(self) -> EditSpace:
        """What the edits measure; training sets it anew in every micro-batch."""
        return self._space

    @space.setter
    def space(self, space: EditSpace) -> None:
        self._space, self._measured = space, None
        self._bases.clear()

    def remove(self) -> None:
        """Detach; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._bases.clear()
        self._measured = self.superclass = None

    def _lock(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.enabled or self.superclass is None:
            return None
        key_input, _ = key_value_inputs(inputs[0], self.superclass.to(inputs[0]))
        return (key_input, *inputs[1:])

    def _edit(self, name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], projected: Tensor) -> Tensor:
            if not self.enabled:
                return projected
            if name not in self._bases:
                self._bases[name] = project(module, self._space.basis)
            scores = self._measure(inputs[0])
            return edit_projection(projected, scores, self._bases[name], self._outputs[name])

        return hook

    def _measure(self, encodings: Tensor) -> Scores:
        """Scores of a prompt: in sampling once for all layers that read it, in training layer by layer.

        A recomputation of one layer, which gradient checkpointing makes, could not use another layer's graph.
        """
        if torch.is_grad_enabled():
            return self._space.measure(encodings)
        if self._measured is None or self._measured[0] is not encodings:
            self._measured = (encodings, self._space.measure(encodings))
        return self._measured[1]
