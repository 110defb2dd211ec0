"""Devices and processes: meshes, hosts, exchange, compiled programs."""
