"""Checks of detection and segmentation data before a training."""
