"""Two Flower apps: federated tuning with fedjax_llm."""
