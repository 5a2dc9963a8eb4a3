"""What a network costs: parameters, multiply-adds and latency."""

from odconv.profile.command import main
from odconv.profile.conversion import Conversion, conversion_report
from odconv.profile.count import Profile, Row, profile
from odconv.profile.latency import latencies
from odconv.profile.published import PUBLISHED, Published, published_table

__all__ = [
    "PUBLISHED",
    "Conversion",
    "Profile",
    "Published",
    "Row",
    "conversion_report",
    "latencies",
    "main",
    "profile",
    "published_table",
]
