"""Where denoises leave how far they are, for the process that takes over, and what there is to see of them by then."""

from __future__ import annotations

import contextlib
from pathlib import Path


class Spool:
    """The files of one launch. Workers write and read them, the head removes what a request leaves.

    Args:
        run_dir: the launch's folder, which only this user may enter; request ids are the head's own.
    """

    def __init__(self, run_dir: str) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def make(self) -> Spool:
        self.folder.mkdir(exist_ok=True)
        return self

    def file(self, request_id: str) -> Path:
        return self.folder / f"{request_id}.safetensors"

    def unfinished(self, request_id: str) -> Path:
        """What is written until it gets the name of ``file``, so that nobody reads half of one."""
        return self.folder / f"{request_id}.tmp"

    def preview(self, request_id: str) -> Path:
        """The newest, for whoever has the time to make a picture of it."""
        return self.folder / f"{request_id}.preview"

    def unfinished_preview(self, request_id: str) -> Path:
        return self.folder / f"{request_id}.preview-tmp"

    def taken_preview(self, request_id: str) -> Path:
        """The name that ``preview`` gets from whoever takes it."""
        return self.folder / f"{request_id}.preview-taken"

    def discard_preview(self, request_id: str) -> None:
        """One that is taken is left to its taker."""
        _remove(self.preview(request_id), self.unfinished_preview(request_id))

    def discard(self, request_id: str) -> None:
        """Everything of the request."""
        self.discard_preview(request_id)
        _remove(self.file(request_id), self.unfinished(request_id), self.taken_preview(request_id))


def _remove(*files: Path) -> None:
    """What can't be removed (a disk that failed is read-only from then on) stays: that must not end the head."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()
