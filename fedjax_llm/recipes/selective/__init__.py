"""Selective tuning: biases, chosen layers, widths."""
