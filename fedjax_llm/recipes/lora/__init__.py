"""LoRA with one rank for all clients, and its structured relatives."""
