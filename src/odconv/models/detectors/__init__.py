"""Detectors: torchvision's, on the backbones of the zoo."""
