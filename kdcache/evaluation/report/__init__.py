"""The HTML report: collected data, charts, sections, and the page."""
