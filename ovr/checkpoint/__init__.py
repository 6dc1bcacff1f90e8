"""Checkpoints: a directory of CRIU's images, or the archive or bundle of a container engine."""

from ovr.checkpoint.archive import Archive, BareArchive, Container
from ovr.checkpoint.checkpoint import (
    RUNTIMES,
    Checkpoint,
    ImagesCheckpoint,
    PodmanCheckpoint,
    RuntimeCheckpoint,
    check_engine,
    open_checkpoint,
    runs_scripts_for_engines,
)

__all__ = [
    "RUNTIMES",
    "Archive",
    "BareArchive",
    "Checkpoint",
    "Container",
    "ImagesCheckpoint",
    "PodmanCheckpoint",
    "RuntimeCheckpoint",
    "check_engine",
    "open_checkpoint",
    "runs_scripts_for_engines",
]
