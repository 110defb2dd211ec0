"""Personalised LoRA: a part of the parameters stays with each client."""
