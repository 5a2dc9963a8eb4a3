"""Looking inside a trained network: a page that shows what is dynamic in it and what is not."""

from odconv.inspection.command import visualize

__all__ = ["visualize"]
