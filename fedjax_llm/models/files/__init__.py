"""Reads and writes weights: safetensors, GGUF, loading into shards."""
