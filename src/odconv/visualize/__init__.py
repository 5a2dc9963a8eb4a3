"""What dynamic layers do: their attentions recorded, measured and drawn; the curves of training runs."""

from odconv.visualize.by_image import plot_attentions
from odconv.visualize.history import draw_history, plot_history
from odconv.visualize.recording import record_attentions
from odconv.visualize.statistics import attention_statistics

__all__ = ["attention_statistics", "draw_history", "plot_attentions", "plot_history", "record_attentions"]
