"""Two packages of one name shadow or overwrite each other; so these names are not given beside the real sglang."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

OWN_NAME = "ditrelay-sglang-names"


def refuse_beside_the_real_one(own_path: Iterable[str]) -> None:
    """Stop where another ``sglang`` can be imported or is installed.

    Args:
        own_path: the folder of this package.

    Raises:
        ImportError: says where the other one is and which of the two to remove.
    """
    if (place := _real_one(own_path)) is not None:
        raise ImportError(
            f"the real sglang is here, too ({place}), and {OWN_NAME} stands in for it only where it is not: "
            f"import from ditrelay, or remove one of the two (pip uninstall {OWN_NAME}, and take its folder out of "
            "PYTHONPATH; or pip uninstall sglang; then install again what is to stay)",
            name="sglang",
        )


def _real_one(own_path: Iterable[str]) -> str | None:
    try:
        return f"version {distribution('sglang').version}"
    except PackageNotFoundError:
        own = {Path(folder).resolve().parent for folder in own_path}
        elsewhere = [folder for folder in sys.path if Path(folder).resolve() not in own]
        spec = PathFinder.find_spec("sglang", elsewhere)
        # A folder of that name without an __init__ is no package: a checkout's parent, say.
        return spec.origin if spec is not None else None
