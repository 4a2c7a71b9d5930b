"""Rules on text: normalising, languages, filters, personal data, duplicates."""
