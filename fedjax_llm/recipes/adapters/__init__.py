"""Adapters behind modules: clusters, duals, generated and growing ones."""
