"""Finished runs as one page that opens offline. Reads records only, never trains."""

from deeptwist.errors import require_extra

with require_extra():
    from deeptwist.app.report.page import write_report

__all__ = ["write_report"]
