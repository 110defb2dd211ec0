"""P6: DrJAX places the clients and runs our client computation."""

import drjax
import jax
import ours
import peer

import fedjax_llm as fl
from fedjax_llm import tree
from fedjax_llm.types import Shared


def main() -> None:
  args = peer.arguments()
  loaded, params, cohort, loss = ours.setting(args)
  update = fl.local.sgd(loss, ours.optimizer(args))
  number = cohort.ids.shape[0]

  def client(base, start, batches):
    masks = tree.full_masks(start, jax.tree.map(lambda _: Shared, start))
    out = update.run(base, start, (), batches, masks, 0, jax.random.key(0))
    return tree.add(start, out.update)

  @drjax.program(placements={'clients': number})
  def one(params, batches, base):
    started = drjax.broadcast((params, base))
    ends = drjax.map_fn(
      lambda state, batches: client(state[1], state[0], batches),
      (started, batches),
    )
    return drjax.reduce_mean(ends)

  step = jax.jit(one)

  def one_round():
    nonlocal params
    params = jax.block_until_ready(step(params, cohort.batches, loaded.base))

  peer.measure(args, one_round)
  ours.save(args, params, loaded.config)


if __name__ == '__main__':
  main()
