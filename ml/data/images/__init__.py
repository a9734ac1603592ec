"""Labelled images: where they lie, how they are cut and turned, and batches of them."""

from ml.data.images.config import CropConfig, ImageDataConfig
from ml.data.images.prepare import PreparedImages, padding, prepare

__all__ = ["CropConfig", "ImageDataConfig", "PreparedImages", "padding", "prepare"]
