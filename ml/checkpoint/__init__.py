"""Checkpoints: saved in the background, whole or not there at all, restored onto any layout."""

from ml.checkpoint.checkpointer import Checkpointer, Restored
from ml.checkpoint.config import CheckpointConfig
from ml.checkpoint.params import restore_params

__all__ = ["CheckpointConfig", "Checkpointer", "Restored", "restore_params"]
