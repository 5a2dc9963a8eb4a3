"""A page for the browser on which a static and a dynamic network look at the same image."""

from odconv.app.demo.command import demo

__all__ = ["demo"]
