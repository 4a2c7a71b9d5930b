"""The app in a browser: everything that CLLM does, from one command, offline."""
