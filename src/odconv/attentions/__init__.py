"""What the attentions of a network do: recorded, measured, and judged."""

from odconv.attentions.recording import record_attentions
from odconv.attentions.statistics import attention_statistics

__all__ = ["attention_statistics", "record_attentions"]
