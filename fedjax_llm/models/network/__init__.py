"""The transformer: embedding, blocks, attention, heads."""
