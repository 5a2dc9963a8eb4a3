"""The history of a detector's training."""

from collections.abc import Mapping

from odconv.app.detect.scores import METRICS
from odconv.app.engine.history import History, Row


class DetectionHistory(History):
    """Keep the history of a detector: all scores are in %, nan where nothing of a size is there to be found."""

    def scores(self, metrics: Mapping[str, float]) -> Row:
        """Return an epoch's scores, by column, from what was logged."""
        columns = [*METRICS, *(f"mask_{name}" for name in METRICS if "val_mask_ap" in metrics)]
        return {name: round(metrics.get(f"val_{name}", float("nan")), 4) for name in columns}

    def describe(self, row: Row) -> str:
        """Return the scores of a row in words."""
        mask = f"   mask AP {row['mask_ap']:5.2f}" if "mask_ap" in row else ""
        return f"AP {row['ap']:5.2f}   AP50 {row['ap50']:5.2f}{mask}"
