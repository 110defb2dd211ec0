"""Methods whose clients hold another, smaller model than the server."""
