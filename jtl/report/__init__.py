"""What a run shows: lines on the console, records in its folder, one page with plots and tables."""

from jtl.report import console, html, record

__all__ = ["console", "html", "record"]
