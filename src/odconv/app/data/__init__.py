"""Images for training and evaluation: folders, archives, CIFAR-10 and scikit-learn's digits, through one function."""

from odconv.app.data.images import IGNORE, Images, find_existing, find_images, read_image, read_pixels, readable_images
from odconv.app.data.sampler import EvaluationSampler, TrainingSampler
from odconv.app.data.sort_validation import sort_validation
from odconv.app.data.splits import imagenet_names, open_data
from odconv.app.data.transforms import evaluation_transform, normalise, training_transform

__all__ = [
    "IGNORE",
    "EvaluationSampler",
    "Images",
    "TrainingSampler",
    "evaluation_transform",
    "find_existing",
    "find_images",
    "imagenet_names",
    "normalise",
    "open_data",
    "read_image",
    "read_pixels",
    "readable_images",
    "sort_validation",
    "training_transform",
]
