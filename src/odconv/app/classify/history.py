"""The history of a classifier's training."""

from collections.abc import Mapping

from odconv.app.engine.history import History, Row


class AccuracyHistory(History):
    """Keep the history of a classifier: top1 and top5 are in %."""

    def scores(self, metrics: Mapping[str, float]) -> Row:
        """Return an epoch's scores, by column, from what was logged."""
        return {
            "val_loss": metrics["val_loss"],
            "top1": round(metrics["val_top1"], 4),
            "top5": round(metrics["val_top5"], 4),
        }

    def describe(self, row: Row) -> str:
        """Return the scores of a row in words."""
        return f"val loss {row['val_loss']:.4f}   top-1 {row['top1']:6.2f} %   top-5 {row['top5']:6.2f} %"
