"""What a network costs: parameters, multiply-adds and latency."""

from odconv.profiling.conversion import Conversion, conversion_report
from odconv.profiling.count import Profile, Row, profile
from odconv.profiling.latency import latencies
from odconv.profiling.published import PUBLISHED, Published, published_table

__all__ = [
    "PUBLISHED",
    "Conversion",
    "Profile",
    "Published",
    "Row",
    "conversion_report",
    "latencies",
    "profile",
    "published_table",
]
