"""Text out of files of any kind: archives are opened as streams, parsers run in child processes with limits."""
