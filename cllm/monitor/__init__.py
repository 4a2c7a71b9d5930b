"""What is observed during a run, and where it is shown and written.

records.py       the rows of metrics.jsonl and all other records, one type each; typed_json.py: how they become JSON
metrics.py       writes rows; prometheus.py: serves the newest numbers
reporter.py      what a person sees; silent.py: both for a process that leaves reporting to another
diagnostics.py   what is measured beside the loss; layers.py: gradients, updates and activations
environment.py   what the run was trained on
guards.py        signals, the lock of the run, memory
"""
