"""Text to batches: tokenizer, shards of tokens, the windows of each training step."""
