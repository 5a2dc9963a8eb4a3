"""Saying what is on images, with a trained network from any file."""

from odconv.predict.classifier import Classifier
from odconv.predict.command import predict
from odconv.predict.loading import load_classifier
from odconv.predict.predictions import Guess, Prediction, Predictions, Unreadable

__all__ = ["Classifier", "Guess", "Prediction", "Predictions", "Unreadable", "load_classifier", "predict"]
