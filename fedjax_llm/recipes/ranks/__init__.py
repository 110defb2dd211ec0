"""LoRA whose clients hold different ranks, layers or weights."""
