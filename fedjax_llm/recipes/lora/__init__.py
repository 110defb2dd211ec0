"""Methods on LoRA with one rank for all clients, and on similar adapters."""
