"""Text for many clients at once, over HTTP in the form of OpenAI's API."""
