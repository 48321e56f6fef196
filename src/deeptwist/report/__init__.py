"""Finished runs as one page that opens offline. Reads records only, never trains."""

from deeptwist.extras import needs_extra

with needs_extra():
    from deeptwist.report.page import write_report

__all__ = ["write_report"]
