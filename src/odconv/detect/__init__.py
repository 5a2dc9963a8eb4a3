"""Detectors with feature pyramids on the networks of the zoo."""

from odconv.detect.builder import create_detector
from odconv.detect.weights import load_backbone, load_detector

__all__ = ["create_detector", "load_backbone", "load_detector"]
