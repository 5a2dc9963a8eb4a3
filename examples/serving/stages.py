"""The stages of a request in examples/serving/server.py: reading an image, and classifying a batch."""

from typing import Any

import torch
from mosec import Worker
from mosec.errors import ValidationError

from odconv.app.data import read_image
from odconv.app.predict import load_classifier

TOP = 5


class Loaded(Worker):
    """A process that has the classifier."""

    weights: str
    trust: bool
    pixels: int
    """How many an image may have."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(self.weights, trust=self.trust)


class Read(Loaded):
    """From the bytes of an image to pixels."""

    def deserialize(self, data: bytes) -> bytes:
        return bytes(data)  # mosec gives a bytearray

    def forward(self, data: bytes) -> Any:
        try:
            return self.classifier.prepare(read_image(data, upright=True, pixels=self.pixels)).numpy()
        except OSError as error:
            raise ValidationError(str(error)) from error


class Classify(Loaded):
    """From the pixels of a batch to the classes of each image."""

    def forward(self, data: Any) -> Any:
        batch = data if self.max_batch_size > 1 else [data]
        shares = self.classifier(torch.stack([torch.from_numpy(image) for image in batch])).softmax(1)
        best = shares.topk(min(TOP, shares.shape[1]))
        answers = [
            [{"class": self.classifier.classes[i], "probability": round(p, 4)} for i, p in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return answers if self.max_batch_size > 1 else answers[0]
