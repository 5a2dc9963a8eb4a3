"""Saying what is on images, with a trained network from any file."""

from odconv.app.predict.classifier import Classifier
from odconv.app.predict.command import predict
from odconv.app.predict.loading import load_classifier
from odconv.app.predict.predictions import Guess, Prediction, Predictions, Unreadable

__all__ = ["Classifier", "Guess", "Prediction", "Predictions", "Unreadable", "load_classifier", "predict"]
