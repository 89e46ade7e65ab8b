"""The frames of a clip one after the other, as the VAE makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from ditrelay.models.pixels import start_to_frames

if TYPE_CHECKING:
    from ditrelay.models.adapter import Give


class GivenAway:
    """Stands in for a decode block's VAE: gives the frames of each latent frame away when they are decoded.

    Wan's VAE decodes a latent frame at a time (the first makes one frame, every other four, of the built-in model two)
    and joins the parts. Here they never are: the file of the first frames is written, and their copy to the host under
    way, while the device decodes the next. The pixels are the same. The block gets the last part, which nobody sees.

    Args:
        vae: an ``AutoencoderKLWan``.
        to_unit: from the VAE's values to [0, 1], [1, frames, channels, height, width].
        give: takes what ``start_to_frames`` makes of each part.
    """

    def __init__(self, vae: Any, to_unit: Callable[[torch.Tensor], torch.Tensor], give: Give) -> None:
        self._vae = vae
        self._to_unit = to_unit
        self._give = give
        self.dtype = vae.dtype
        self.config = vae.config

    def decode(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """As the VAE's, for latents [1, channels, latent frames, latent height, latent width]."""
        for part in _decode_wan(self._vae, latents):
            self._give(start_to_frames(self._to_unit(part)[0]))
        return (part,)


def gives_frames(vae: Any) -> bool:
    """Whether ``GivenAway`` can stand in for it."""
    return isinstance(vae, AutoencoderKLWan) and not vae.use_tiling


def _decode_wan(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """``AutoencoderKLWan._decode`` of diffusers 0.42, not joined: [1, channels, 1 or more frames, height, width]."""
    vae.clear_cache()
    try:
        hidden = vae.post_quant_conv(latents)
        for index, frame in enumerate(hidden.split(1, dim=2)):
            vae._conv_idx = [0]
            part = vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0)
            if vae.config.patch_size is not None:
                part = unpatchify(part, patch_size=vae.config.patch_size)
            yield part.clamp(-1.0, 1.0)
    finally:
        vae.clear_cache()
