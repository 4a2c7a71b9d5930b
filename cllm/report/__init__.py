"""`cllm report`: what a run's folder holds, as one HTML page that needs nothing else; several runs become a comparison.

reading.py   the folder -> RunData, whatever state the files are in
markup.py    elements whose text is always escaped
charts.py    curves, heat maps and bars as SVG
page.py      RunData -> the page
"""

from cllm.report.page import write_report
from cllm.report.reading import RunData, read_run

__all__ = ["RunData", "read_run", "write_report"]
