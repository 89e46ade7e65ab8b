"""What one rank loads: the values that every adapter is made from."""

from __future__ import annotations

from dataclasses import dataclass

from ditrelay.models.card import ModelCard
from ditrelay.runtime.topology import Role


@dataclass(frozen=True)
class LoadSpec:
    """What one rank loads.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        dtype: one of ``loading.DTYPES``; weights on disk in another dtype are converted.
        load_format: ``auto`` (the folder's weights) or ``dummy`` (random ones, see ``models.dummy``).
        attention_backend: a key of ``quirks.ATTENTION_BACKENDS``.
        offload: those of ``offload.OFFLOADABLE`` whose weights live in host memory.
        sp: sequence parallel degree.
        ring: the part of it that is ring attention; the rest, ``sp / ring``, is Ulysses.
        tp: tensor parallel degree.
        cfg: ranks over which the branches of guidance are spread. Where ``sp * tp * cfg`` is above 1, the default
            process group must exist and have that many ranks.
    """

    card: ModelCard
    roles: frozenset[Role]
    device: str = "cpu"
    dtype: str = "float32"
    load_format: str = "auto"
    attention_backend: str = "auto"
    torch_compile: bool = False
    offload: frozenset[str] = frozenset()
    sp: int = 1
    ring: int = 1
    tp: int = 1
    cfg: int = 1

    @property
    def ranks(self) -> int:
        """Ranks of the replica."""
        return self.sp * self.tp * self.cfg
