"""Methods without one centre: neighbours that mix, and regions."""
