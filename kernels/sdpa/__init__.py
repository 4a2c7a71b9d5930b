"""What torch itself ships, as a backend of its own ("sdpa"): chosen where it was measured to be faster."""
