"""Methods on a network that is cut between clients and the server."""
