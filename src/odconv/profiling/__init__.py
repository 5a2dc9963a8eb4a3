"""What a network costs: parameters, multiply-adds and latency."""

from odconv.profiling.conversion_report import Conversion, conversion_report
from odconv.profiling.count import Profile, Row, profile
from odconv.profiling.explanation import Explanation, explain
from odconv.profiling.latency import latencies
from odconv.profiling.published import PUBLISHED, Published, published_table
from odconv.profiling.tuned import TunedLayer, Tuning, tune

__all__ = [
    "PUBLISHED",
    "Conversion",
    "Explanation",
    "Profile",
    "Published",
    "Row",
    "TunedLayer",
    "Tuning",
    "conversion_report",
    "explain",
    "latencies",
    "profile",
    "published_table",
    "tune",
]
