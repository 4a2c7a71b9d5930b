"""`cllm report`: one HTML page, complete in itself, about what the folder of a run holds, or a comparison of several runs.

reading.py   from the folder to RunData, whatever state its files are in
layers.py    figures of parameters, gathered by layer; timing.py: where the time went
charts.py    curves, heat maps and bars as SVG
markup.py    HTML elements whose text is always escaped; style.py: the style sheet
page.py      from RunData to the page
"""

from cllm.report.page import write_report
from cllm.report.reading import RunData, read_run

__all__ = ["RunData", "read_run", "write_report"]
