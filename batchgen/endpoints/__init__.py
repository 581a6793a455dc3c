"""Engines behind HTTP: servers that speak OpenAI's API, and a warm one of batchgen's own."""
