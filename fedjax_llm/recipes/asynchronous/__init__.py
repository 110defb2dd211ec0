"""Asynchronous methods: late clients count less."""
