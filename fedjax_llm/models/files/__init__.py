"""Weights in files: safetensors, GGUF, loading into shards."""
