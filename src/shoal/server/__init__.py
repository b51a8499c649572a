"""HTTP: the OpenAI-compatible API over one engine."""
