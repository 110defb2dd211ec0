"""Uploads: what travels between clients and server, and what it weighs."""

from fedjax_llm.uploads.codecs import from_optax as from_optax
from fedjax_llm.uploads.codecs import identity as identity

__all__ = ['from_optax', 'identity']
