"""Request -> completion, by vLLM: all that knows its versions. See `engine`."""
