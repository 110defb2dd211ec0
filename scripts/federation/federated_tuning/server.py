"""The app of the server."""

from fedjax_llm.deploy import flower

app = flower.server_app()
