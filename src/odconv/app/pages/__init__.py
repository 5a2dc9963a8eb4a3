"""Pictures, and pages of them that need nothing else: training runs, and what is dynamic in a network."""

from odconv.app.pages.attention_figure import plot_attentions

__all__ = ["plot_attentions"]
