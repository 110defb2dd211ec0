"""Federated averaging, its server optimizers and the two baselines."""
