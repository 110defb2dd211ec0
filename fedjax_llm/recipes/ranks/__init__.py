"""Methods on LoRA for clients with different ranks, layers or weights."""
