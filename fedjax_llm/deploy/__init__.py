"""Runs a federation over a real network, by the halves of the simulation.

`halves` splits a run into what a client does and what the server does, `wire`
turns their trees into named arrays and back, `serving` runs the server's
rounds, `flower` and `nvflare` carry the messages. Nothing of a method is
written twice: both sides call the `train` and the `aggregate` of the same
algorithm.
"""
