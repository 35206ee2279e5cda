"""The HTML report: collect the data, draw the charts, write the sections."""
