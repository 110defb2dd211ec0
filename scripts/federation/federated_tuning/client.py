"""The app of the clients."""

from fedjax_llm.deploy import flower

app = flower.client_app()
