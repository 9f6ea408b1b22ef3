"""From CLIP-Vision's hidden states to identity tokens: the perceiver resampler of IP-Adapter Plus."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, FormatError, IncompatibleModelError

HEAD_DIM = 64  # of every published file; no tensor's shape tells it


class PerceiverAttention(nn.Module):
    """Latents that look at the picture and at themselves (arXiv 2204.14198, section 3.1.1)."""

    def __init__(self, dim: int, inner_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, picture: Tensor, latents: Tensor) -> Tensor:
        """Both (batch, tokens, dim), with token counts of their own; returns the shape of ``latents``."""
        picture, latents = self.norm1(picture), self.norm2(latents)
        q = self._split(self.to_q(latents))
        k, v = map(self._split, self.to_kv(torch.cat([picture, latents], dim=1)).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v)  # its softmax is float32 whatever the dtype
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, tokens, head_dim)


class Resampler(nn.Module):
    """A few learned latents, refined layer by layer against the picture's hidden states.

    Parameters carry the names of the published files, so their ``image_proj.*`` tensors load as they are.
    """

    def __init__(
        self,
        *,
        picture_dim: int,
        output_dim: int,
        dim: int,
        tokens: int,
        depth: int,
        inner_dim: int,
        hidden_dim: int,
        head_dim: int = HEAD_DIM,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5)
        self.proj_in = nn.Linear(picture_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, inner_dim, head_dim), _feed_forward(dim, hidden_dim)])
            for _ in range(depth)
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, prefix: str = "", head_dim: int = HEAD_DIM) -> "Resampler":
        """Build it with the sizes that the tensors have, in their dtype, and load them.

        Args:
            tensors: a state dict; names that do not start with ``prefix`` are left alone.
            prefix: ``image_proj.`` in ip-adapter-plus files.
        """
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        with torch.device("meta"):
            resampler = cls(**_sizes(own, head_dim), head_dim=head_dim)
        wanted = {key: value.shape for key, value in resampler.state_dict().items()}
        found = {key: value.shape for key, value in own.items()}
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise FormatError(
                    f"{prefix}{key}: {_said(found.get(key))}, an IP-Adapter Plus resampler has "
                    f"{_said(wanted.get(key))}; give an ip-adapter-plus or a lookahead encoder file"
                )
        resampler.load_state_dict(own, assign=True)
        return resampler

    @property
    def picture_dim(self) -> int:
        return self.proj_in.in_features

    def forward(self, picture: Tensor) -> Tensor:
        """Tokens of each picture.

        Args:
            picture: hidden states of CLIP-Vision's last layer but one, without its final norm,
                (batch, patches + 1, picture_dim).

        Returns:
            (batch, tokens, output_dim).
        """
        if picture.ndim != 3 or picture.shape[-1] != self.picture_dim:
            raise IncompatibleModelError(
                f"the picture's hidden states have shape {tuple(picture.shape)}, this encoder wants (batch, patches, "
                f"{self.picture_dim}); load the CLIP-Vision model that it was trained with (1280 means ViT-H)"
            )
        picture = self.proj_in(picture)
        latents = self.latents.expand(len(picture), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(picture, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


@dataclass(frozen=True)
class IdentityTokens:
    """What cross-attention sees of a person, and its unconditional twin; both (batch, tokens, dim)."""

    cond: Tensor
    uncond: Tensor


def encode_identity(resampler: Resampler, hidden_states: Callable[[Tensor], Tensor], pixels: Tensor) -> IdentityTokens:
    """Tokens of each picture and of the picture that stands for nobody, in one pass through CLIP-Vision.

    That picture is zero *after* CLIP's normalisation; neither its hidden states nor its tokens are zeros.

    Args:
        hidden_states: CLIP-Vision up to its last layer but one, pixels -> (batch, patches + 1, picture_dim).
        pixels: normalised pictures, (batch, channels, height, width).
    """
    nobody = torch.zeros_like(pixels[:1])
    tokens = resampler(hidden_states(torch.cat([pixels, nobody])))
    return IdentityTokens(tokens[:-1], tokens[-1:].expand(len(pixels), -1, -1))


def join_pictures(tokens: Tensor, how: Literal["average", "concat"]) -> Tensor:
    """One identity from several pictures of a person.

    Args:
        tokens: (pictures, tokens, dim).

    Returns:
        (1, tokens, dim) for ``average``, (1, pictures * tokens, dim) for ``concat``.
    """
    if how == "average":
        return tokens.float().mean(dim=0, keepdim=True).to(tokens.dtype)
    if how == "concat":
        return tokens.flatten(0, 1).unsqueeze(0)
    raise ConfigError(f"pictures of one person can be joined by 'average' or 'concat', not by {how!r}")


def _feed_forward(dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, hidden_dim, bias=False),
        nn.GELU(),
        nn.Linear(hidden_dim, dim, bias=False),
    )


def _sizes(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, int]:
    try:
        _, tokens, dim = tensors["latents"].shape
        (output_dim, _), (_, picture_dim) = tensors["proj_out.weight"].shape, tensors["proj_in.weight"].shape
        inner_dim, hidden_dim = len(tensors["layers.0.0.to_q.weight"]), len(tensors["layers.0.1.1.weight"])
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    except (KeyError, ValueError) as error:
        raise FormatError(
            f"these {len(tensors)} tensors are no IP-Adapter Plus resampler ({error}); a plain IP-Adapter has none, "
            "give an ip-adapter-plus or a lookahead encoder file"
        ) from error
    if inner_dim % head_dim:
        raise FormatError(f"the resampler's queries have {inner_dim} channels, no multiple of its heads' {head_dim}")
    return {
        "picture_dim": picture_dim,
        "output_dim": output_dim,
        "dim": dim,
        "tokens": tokens,
        "depth": depth,
        "inner_dim": inner_dim,
        "hidden_dim": hidden_dim,
    }


def _said(shape: torch.Size | None) -> str:
    return "no tensor of that name" if shape is None else f"shape {tuple(shape)}"
