"""What rendering one conversation may take."""

SECONDS = 1  # of CPU, rounded up to the next whole one by the system; a real template takes a millisecond
PATIENCE = 20.0  # seconds by the clock, on a machine that does other things as well
MOST_MEMORY = 512 << 20
MOST_CHARACTERS = 4 << 20
