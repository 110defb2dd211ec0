"""The halves of a run as apps of Flower (package `flwr`, extra `flower`).

`client_app` and `server_app` return a `ClientApp` and a `ServerApp` that run
any method whose rule is on uploads. An app's module has two lines:

    from fedjax_llm.deploy import flower
    app = flower.client_app()

Both read the run's config from the app's run config:

    config      FILE or FILE:ARG, as `--config` of `train`
    fields      'section.field=value ...', separated by spaces
    workdir     the server writes the final adapter to WORKDIR/adapter

A node serves the clients whose number is `partition-id` modulo
`num-partitions`, both of its node config; a federation of institutions has one
client a node. Private state of clients stays on their node, in Flower's
context.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_llm.deploy import halves, serving
from fedjax_llm.types import ClientState, Error


def _flwr() -> Any:
  try:
    import flwr.app  # pyright: ignore[reportMissingImports]
    import flwr.clientapp  # pyright: ignore[reportMissingImports]
    import flwr.serverapp  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise Error(
      'Flower is not installed: pip install "fedjax_llm[flower]".'
    ) from None
  return flwr


def _record(arrays: Mapping[str, np.ndarray]) -> Any:
  app = _flwr().app
  return app.ArrayRecord({name: app.Array(x) for name, x in arrays.items()})


def _arrays(record: Any) -> dict[str, np.ndarray]:
  return {name: x.numpy() for name, x in record.items()}


def client_app() -> Any:
  """Returns a `flwr.clientapp.ClientApp` that runs the clients' half.

  It answers the query for its clients, and trains the client that a message
  names.

  Raises:
    Error: Flower is not installed.
  """
  flwr = _flwr()
  app, Message = flwr.clientapp.ClientApp(), flwr.app.Message
  records = flwr.app.RecordDict

  @app.query()
  def query(message, context):
    site = serving.site(context.run_config)
    first = int(context.node_config.get('partition-id', 0))
    step = int(context.node_config.get('num-partitions', 1))
    mine = list(range(first, len(site.names), step))
    answer = flwr.app.ConfigRecord({'clients': mine})
    return Message(records({'clients': answer}), reply_to=message)

  @app.train()
  def train(message, context):
    site = serving.site(context.run_config)
    client = int(message.content['client']['number'])
    name, kept = f'client-{client}', None
    if name in context.state:
      kept = _restored(site, _arrays(context.state[name]))
    sent, kept, metrics = halves.train(
      site, _arrays(message.content['round']), client, kept
    )
    context.state[name] = _record(_numbered(kept))
    finite = {k: v for k, v in metrics.items() if np.isfinite(v)}
    content = {
      'upload': _record(sent), 'metrics': flwr.app.MetricRecord(finite),
    }  # fmt: skip
    return Message(records(content), reply_to=message)

  return app


def server_app() -> Any:
  """Returns a `flwr.serverapp.ServerApp` that runs the server's half.

  Every round it draws clients as the simulation does, sends the parameters to
  their nodes, waits for the replies and aggregates them; clients whose reply is
  an error are left out. At the end it writes the adapter as a PEFT directory.

  Raises:
    Error: Flower is not installed; from a run, a client that two nodes serve.
  """
  flwr = _flwr()
  app = flwr.serverapp.ServerApp()

  @app.main()
  def main(grid, context):
    run(grid, context.run_config)

  return app


def run(grid: Any, settings: Mapping[str, Any]) -> Any:
  """Runs all rounds of a federation on a Flower grid; returns the state.

  Args:
    grid: of the `ServerApp`.
    settings: the run config.

  Raises:
    Error: a client that two nodes serve. It waits for one that no node serves.
  """
  flwr = _flwr()
  Message, records = flwr.app.Message, flwr.app.RecordDict
  site = serving.site(settings)
  node_of: dict[int, int] = {}

  def ask(number, message, clients):
    if not node_of:
      node_of.update(_nodes(grid, site))
    asked = _record(message)
    messages = [
      Message(
        records(
          {'round': asked, 'client': flwr.app.ConfigRecord({'number': i})}
        ),
        dst_node_id=node_of[i],
        message_type=flwr.app.MessageType.TRAIN,
        group_id=str(number),
      )
      for i in clients
    ]
    pushed = list(grid.push_messages(messages))
    by_id = dict(zip(pushed, clients))
    for reply in _pulled(grid, pushed):
      if reply.has_error():
        print(f'round {number + 1}: a client failed: {reply.error.reason}')
        continue
      client = by_id[reply.metadata.reply_to_message_id]
      yield client, _arrays(reply.content['upload']), reply.content['metrics']

  return serving.run(site, ask, str(settings.get('workdir', '')))


# ------------------------------------------------------------------- parts --


def _nodes(grid: Any, site: halves.Site) -> dict[int, int]:
  """Asks every node for its clients; returns the node of each client."""
  import time

  flwr = _flwr()
  while not (nodes := list(grid.get_node_ids())):
    time.sleep(1.0)
  found: dict[int, int] = {}
  while len(found) < len(site.names):
    nodes = list(grid.get_node_ids())
    messages = [
      flwr.app.Message(
        flwr.app.RecordDict(),
        dst_node_id=node,
        message_type=flwr.app.MessageType.QUERY,
      )
      for node in nodes
      if node not in found.values()
    ]
    known = len(found)
    for reply in grid.send_and_receive(messages):
      if reply.has_error():
        raise Error(f'a node could not name its clients: {reply.error.reason}')
      for client in reply.content['clients']['clients']:
        if client in found:
          raise Error(
            f'two nodes serve client {client}: give every node its own '
            'partition-id.'
          )
        found[int(client)] = reply.metadata.src_node_id
    if len(found) == known:  # nodes that are still to come have the others
      time.sleep(1.0)
  return found


def _pulled(grid: Any, ids: list[str]):
  """Yields the replies to messages as they arrive."""
  import time

  waiting = set(ids)
  while waiting:
    for reply in grid.pull_messages(waiting):
      waiting.discard(reply.metadata.reply_to_message_id)
      yield reply
    if waiting:
      time.sleep(0.2)


def _numbered(state: ClientState) -> dict[str, np.ndarray]:
  leaves = jax.tree.leaves(state)
  return {str(i): np.asarray(x) for i, x in enumerate(leaves)}


def _restored(site: halves.Site, arrays: dict[str, np.ndarray]) -> ClientState:
  leaves, structure = jax.tree.flatten(site.newcomer)
  return jax.tree.unflatten(
    structure, [arrays[str(i)] for i in range(len(leaves))]
  )
