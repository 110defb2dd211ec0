"""The evaluation that a run repeats: held-out texts, new clients, replies.

`loop` returns a function that computes all metrics 'evals/...'; the other
functions pick prompts and lay out the replies to them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm import batching
from fedjax_llm.evals.likelihood import (
  Group,
  Report,
  likelihood,
  personal,
  worst_mean,
)
from fedjax_llm.types import (
  Base,
  ClientState,
  FederatedAlgorithm,
  Key,
  Loss,
  Params,
)


def loop(
  loss: Loss,
  algorithm: FederatedAlgorithm,
  *,
  heldout: Sequence[Group],
  new: Sequence[Group] = (),
  common: Sequence[Group] = (),
  names: Sequence[str] = (),
  new_names: Sequence[str] = (),
  has_private: bool = False,
  labelled: bool = False,
  together: Callable[..., Report] | None = None,
) -> Callable[..., dict[str, Any]]:
  """Returns a function that computes every evaluation metric of a run.

  The served parameters are evaluated on `heldout` (texts of clients that
  train), on `new` (clients that never train) and on `common` (a sample of all
  clients' texts): 'evals/heldout/loss' and so on, and 'evals/heldout/clients',
  the loss of each client by name. A method with private parts is also evaluated
  client by client, each with its own served parameters:
  'evals/personal/own/...' on the client's own held-out texts and
  'evals/personal/common/...' on `common`. Clients that no round has trained yet
  are served the initial private parts, the model of 'evals/heldout';
  'evals/personal/untrained' counts them.

  Args:
    loss: sums for each row, [B].
    algorithm: its `personal` returns the served parameters.
    heldout: groups of batches with owners, ids into `names`.
    new: the same for clients that never train, ids into `new_names`.
    common: texts on which the served and every personal model is evaluated.
    names: of the clients that train.
    new_names: of the clients that never train.
    has_private: whether clients keep parameters of their own.
    labelled: whether texts are classified. Then 'evals/heldout/accuracies' has
      the accuracy of each client by name, and 'client_accuracy_mean' and
      'client_accuracy_worst_10' their mean and that of the worst tenth.
    together: `likelihood(loss)`, to share its compiled program between runs.

  Returns:
    `examine(base, params, store, key) -> {'evals/...': value}`; `store` has
    `gather(ids) -> ClientState` and `seen() -> ids`.

  >>> from fedjax_llm.types import Batch, LossSum
  >>> def loss(base, params, batch, key):
  ...   n = jnp.sum(batch.loss_mask, -1, dtype=jnp.float32)
  ...   return LossSum(n * params, n, n)
  >>> full = np.ones((1, 2, 4), np.int32)
  >>> group = Batch(full, full > 0, full, full), np.array([[0, 1]])
  >>> method = FederatedAlgorithm(None, None, None, lambda p, state: p)
  >>> examine = loop(loss, method, heldout=[group], names=['ann', 'bob'])
  >>> metrics = examine(None, jnp.float32(2), None, jax.random.key(0))
  >>> metrics['evals/heldout/clients']
  {'ann': 2.0, 'bob': 2.0}
  """
  together = together or likelihood(loss)
  apart = personal(loss)
  owners = np.concatenate([np.zeros(0), *(o.ravel() for _, o in heldout)])

  def examine(
    base: Base, params: Params, store: Any, key: Key
  ) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    served = algorithm.personal(params, None)
    for name, groups, who in (
      ('heldout', heldout, names),
      ('new', new, new_names),
      ('common', common, names),
    ):
      if groups:
        report = together(base, served, groups, key, name)
        metrics |= told_of(report, who, labelled)
    if has_private:
      ids = store.seen()
      metrics['evals/personal/untrained'] = len(names) - len(ids)
    else:
      ids = ()
    # A client may have a model of its own and no held-out text.
    own = heldout if np.isin(ids, owners).any() else ()
    if len(ids) and (own or common):

      def stack(places: np.ndarray) -> Params:
        states: ClientState = store.gather(ids[places])
        # Leaves that no client keeps are repeated along the first axis.
        return jax.vmap(lambda one: algorithm.personal(params, one))(
          jax.tree.map(jnp.asarray, states)
        )

      report = apart(base, stack, ids, own, common, key)
      metrics |= told_of(report, names, labelled)
    return metrics

  return examine


def told_of(
  report: Report, names: Sequence[str], labelled: bool
) -> dict[str, Any]:
  """Returns a report's metrics and the loss of each client by its name.

  With `labelled` also the accuracy of each client, their mean and the mean of
  the worst tenth.

  >>> from fedjax_llm.evals.likelihood import ClientSums
  >>> sums = ClientSums(np.array([0]), *np.array([[8.0], [4.0], [1.0]]))
  >>> told_of(Report({}, {'heldout': sums}), ['ann'], labelled=False)
  {'evals/heldout/clients': {'ann': 2.0}}
  """
  metrics: dict[str, Any] = dict(report.metrics)
  for kind, sums in report.clients.items():
    who = [names[i] for i in sums.ids]
    by_name = lambda x, who=who: dict(zip(who, map(float, x), strict=True))
    metrics[f'evals/{kind}/clients'] = by_name(sums.total / sums.count)
    if labelled:
      each = sums.correct / sums.count
      metrics |= {
        f'evals/{kind}/accuracies': by_name(each),
        f'evals/{kind}/client_accuracy_mean': float(np.mean(each)),
        f'evals/{kind}/client_accuracy_worst_10': 0.0 - worst_mean(-each),
      }
  return metrics


def in_turn(heldout: Sequence[Sequence[Any]], num: int) -> list[list[Any]]:
  """Picks `num` texts in turn: the first of each client, then the second, ...

  Returns the picked texts client by client.

  >>> from fedjax_llm.types import Example
  >>> text = Example(np.ones(1, np.int32), np.ones(1, bool))
  >>> [len(own) for own in in_turn([[text] * 3, [text], []], 3)]
  [2, 1, 0]
  """
  depth = max(map(len, heldout), default=0)
  turns = [
    (i, k)
    for i in range(depth)
    for k, own in enumerate(heldout)
    if i < len(own)
  ]
  shares: list[list[Any]] = [[] for _ in heldout]
  for i, k in turns[:num]:
    shares[k].append(heldout[k][i])
  return shares


class Question(NamedTuple):
  """A prompt from a held-out text, and the client's own continuation.

  >>> Question(client=3, prompt=[5, 6], reply=[7]).reply
  [7]
  """

  client: int
  prompt: list[int]  # tokens
  reply: list[int]  # the client's own continuation, tokens


def questions(
  heldout: Sequence[Sequence[Any]],
  num: int,
  *,
  max_prompt: int | None = None,
  begin: Sequence[int] = (),
) -> list[Question]:
  """Returns prompts from the first text of the first `num` clients with texts.

  A preference pair gives its chosen text. The prompt ends where the loss mask
  begins; a text that is learned from its start is cut in half. Of a prompt
  above `max_prompt` tokens the end is kept, after the tokens `begin` that every
  text begins with.

  >>> from fedjax_llm.types import Example
  >>> tokens, learned = np.arange(4), np.array([False, False, True, True])
  >>> questions([[], [Example(tokens, learned)]], 1)
  [Question(client=1, prompt=[0, 1], reply=[2, 3])]
  """
  if max_prompt is not None and max_prompt < 1:
    return []
  prompts, begin = [], list(begin)
  for client, own in enumerate(heldout):
    if len(prompts) == num:
      break
    for example in batching.texts_of(own[0])[:1] if own else ():
      start = int(np.argmax(example.loss_mask))
      if start < max(2, len(begin) + 2):
        start = max(1, len(example.tokens) // 2)
      tokens = [int(t) for t in example.tokens]
      prompt = tokens[:start]
      if max_prompt is not None and start > max_prompt:
        lead = begin if tokens[: len(begin)] == begin else []
        lead = lead[: max_prompt - 1]
        prompt = lead + tokens[start - max_prompt + len(lead) : start]
      prompts.append(Question(client, prompt, tokens[start:]))
  return prompts


def replies(
  prompts: Sequence[Question],
  generated: Mapping[str, Sequence[list[int]]],
  decode: Callable[[Sequence[int]], str],
) -> str:
  """Formats prompts, the clients' replies and generated replies as text.

  `generated` has the replies of each model by its name, in the order of the
  prompts; `decode` turns tokens into text.

  >>> spell = lambda tokens: ''.join(map(chr, tokens))
  >>> prompts = [Question(0, prompt=[72, 105], reply=[79, 104])]
  >>> print(replies(prompts, {'after': [[72, 109]]}, spell).rstrip())
    prompt  Hi
    client  Oh
    after   Hm
  """
  show = lambda tokens: ' / '.join(decode(tokens).split('\n')).strip()
  lines = []
  for i, (_, prompt, reply) in enumerate(prompts):
    lines += [f'  prompt  {show(prompt)}', f'  client  {show(reply)}']
    lines += [
      f'  {name:7} {show(tokens[i])}' for name, tokens in generated.items()
    ]
    lines.append('')
  return '\n'.join(lines)


def samples(
  prompts: Sequence[Question],
  generated: Mapping[str, Sequence[list[int]]],
  decode: Callable[[Sequence[int]], str],
  names: Sequence[str],
) -> list[dict[str, str]]:
  """Returns the prompts and replies of `replies` as one dict of text each.

  Its keys are `client` (the name), `prompt`, `reply` (the client's own) and the
  name of every model in `generated`.

  >>> spell = lambda tokens: ''.join(map(chr, tokens))
  >>> samples([Question(0, [97], [98])], {'after': [[99]]}, spell, ['ann'])
  [{'client': 'ann', 'prompt': 'a', 'reply': 'b', 'after': 'c'}]
  """
  return [
    {
      'client': names[client],
      'prompt': decode(prompt),
      'reply': decode(reply),
      **{name: decode(tokens[i]) for name, tokens in generated.items()},
    }
    for i, (client, prompt, reply) in enumerate(prompts)
  ]
