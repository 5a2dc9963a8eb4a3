"""Adds a network of 16 convolutions to the zoo, for trainings of seconds.

`python -m tiny` is `odconv` with it, and with a narrow pyramid in its detectors.
"""

import sys

from odconv.models import zoo

CHANNELS = 32  # of a detector's pyramid
STATIC, DYNAMIC = "tiny", "od_tiny"
SETTING = [[1, 8, 1, 1], [4, 8, 1, 2], [4, 12, 1, 2], [4, 16, 1, 2], [4, 24, 1, 2]]

zoo.BACKBONES[STATIC] = zoo.Backbone(
    "mobilenet_v2", {"width_mult": 1.0, "inverted_residual_setting": SETTING}, "features.0.0"
)
LISTED = list(zoo.NAMES)
zoo.NAMES.extend([STATIC, *(f"{method}_{STATIC}" for method in zoo.PREFIXES)])

if __name__ == "__main__":
    from odconv.app.cli import main
    from odconv.models.detectors import backbone

    backbone.CHANNELS = CHANNELS
    sys.exit(main())
