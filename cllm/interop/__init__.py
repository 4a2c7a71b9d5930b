"""Other programs' formats. `hf`: Hugging Face model folders."""
