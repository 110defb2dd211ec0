"""Alignment: clients that learn from preferences, or from rewards by rule."""
