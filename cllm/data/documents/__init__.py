"""Files to text: which files, in which charset, which documents on which side of the split."""
