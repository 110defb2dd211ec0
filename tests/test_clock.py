"""Time: systems, samplers with a clock, and methods for late clients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm import aggregators, clients, local, recipes, tree
from fedjax_llm.aggregators import networks, staleness
from fedjax_llm.clients import system as systems
from fedjax_llm.clients.attendance import attendance
from fedjax_llm.clients.compass import compass
from fedjax_llm.clients.published import DEVICES, LINKS
from fedjax_llm.clients.system import Job, System
from fedjax_llm.clients.timed import buffered, deadline, tiered
from fedjax_llm.types import ClientState, Cohort, Draw, Error, LossSum

JOB = Job(operations=8.0, down=2.0, up=4.0, num_steps=4)


def system(*seconds, **more: Any) -> System:
  """A system in which client k computes for `seconds[k]`; links take none."""
  num, ones = len(seconds), np.ones(len(seconds))
  fields: dict[str, Any] = dict(
    operations=JOB.operations / np.array(seconds, float),
    down=ones * np.inf, up=ones * np.inf, latency=0 * ones, watts=2 * ones,
    opens=0 * ones, hours=24 * ones, joules_per_byte=0.5 * ones,
  )  # fmt: skip
  assert num == len(fields['operations'])
  return System(**{**fields, **more})


# ----------------------------------------------------------------- the clock --


def test_a_round_takes_its_links_and_its_operations():
  values = (4.0, 0.5, 2.0, 0.2, 1.0, 0.0, 24.0, 3.0)
  one = System(*(np.array([x]) for x in values))
  parts = systems.duration(one, JOB)
  assert np.ravel(parts).tolist() == [0.1 + 4.0, 2.0, 0.1 + 2.0]
  assert parts.total[0] == pytest.approx(8.2)
  # 1 watt for 2 seconds, and 3 joules for each of 2 + 4 bytes.
  assert systems.energy(one, JOB).tolist() == [[2.0, 18.0]]


def test_a_fleet_has_the_published_figures_in_their_shares():
  fleet = systems.fleet(
    num_clients=10, devices=('phone', 'h100'), shares=(0.7, 0.3),
    links=('5g',), utilisation=0.5, seed=3,
  )  # fmt: skip
  fast = fleet.operations == 0.5 * DEVICES['h100'].operations
  assert fast.sum() == 3
  assert (fleet.operations[~fast] == 0.5 * DEVICES['phone'].operations).all()
  assert (fleet.up == LINKS['5g'].up).all()
  assert np.isnan(fleet.watts[~fast]).all() and (fleet.watts[fast] == 350).all()
  assert np.isnan(fleet.joules_per_byte).all()  # no figure for 5G
  ours = dict(links=('mobile', '5g'), joules_per_byte=2e-6)
  more: dict[str, Any] = ours
  assert (systems.fleet(num_clients=2, **more).joules_per_byte == 2e-6).all()
  with pytest.raises(Error, match=r'joules_per_byte is -1'):
    systems.fleet(num_clients=2, joules_per_byte=-1)
  with pytest.raises(Error, match=r"devices has 'tablet': it takes a100"):
    systems.fleet(num_clients=2, devices=('tablet',))


def test_a_table_of_ones_own_is_read_and_checked(tmp_path):
  file = tmp_path / 'devices.csv'
  file.write_text('operations,down,up,hours\n1e9,1e6,5e5,12\n2e9,1e6,5e5,\n')
  fleet = systems.table(num_clients=4, path=str(file))
  assert sorted(fleet.operations) == [1e9, 1e9, 2e9, 2e9]
  assert fleet.hours[fleet.operations == 2e9].tolist() == [24, 24]
  for text, words in (
    ('operations,down\n1,2\n', 'needs operations, down, up'),
    ('operations,down,up\n', 'has no line'),
    ('operations,down,up\n1,2,3\n1,0,3\n', "line 3: down is '0'"),
    ('operations,down,up\n1,x,3\n', "line 2: down is 'x'"),
  ):
    file.write_text(text)
    with pytest.raises(Error, match=words):
      systems.table(num_clients=1, path=str(file))
  with pytest.raises(Error, match='cannot be read as CSV'):
    systems.table(num_clients=1, path=str(tmp_path / 'none.csv'))


def test_a_deadline_loses_the_late_and_cuts_their_work():
  fleet = system(1.0, 2.0, 4.0, 9.0)
  keep: dict[str, Any] = dict(system=fleet, job=lambda: JOB, seconds=3.0)
  lost: Any = deadline(4, 4, **keep)
  assert lost(0).ids.tolist() == [0, 1, -1, -1] and lost(0).steps is None
  assert lost.clock(0) == {
    'clock/seconds': 3.0, 'clock/joules': 2 * 16.0, 'clock/lost': 2.0,
    'clock/joules_network': 4 * 3.0,  # the bytes of all, whoever counts
  }  # fmt: skip
  assert lost.clock(1)['clock/seconds'] == 6.0
  partial: Any = deadline(
    4, 4, partial=True, **keep
  )  # 3 / 4 and 1 / 3 of 4 steps
  assert partial(0).ids.tolist() == [0, 1, 2, 3]
  assert partial(0).steps.tolist() == [4, 4, 3, 1]
  assert partial.clock(0)['clock/seconds'] == 3.0
  # The fastest two of four are enough.
  over: Any = deadline(4, 2, system=fleet, job=lambda: JOB, over_selection=2.0)
  assert over(0).ids.tolist() == [0, 1]
  assert over.clock(0)['clock/seconds'] == 2.0
  with pytest.raises(Error, match='partial needs a deadline'):
    deadline(4, 2, system=fleet, job=lambda: JOB, partial=True)


def test_steps_beyond_the_time_of_a_client_are_padding():
  text = clients.cohorts.Example(
    np.arange(3, dtype=np.int32), np.array([0, 1, 1], bool)
  )
  build = clients.cohorts.cohorts(
    [[text] * 8, [text] * 8], num_steps=4, batch_size=1, max_length=4
  )
  draw = Draw(np.array([0, 1]), np.ones(2, bool))
  whole, cut = build(draw, 0), build(draw._replace(steps=np.array([4, 1])), 0)
  assert cut.batches.loss_mask.sum((2, 3)).tolist() == [[2] * 4, [2, 0, 0, 0]]
  first = lambda x: np.asarray(x)[:, :1]
  assert tree.all_finite(whole.weight)
  np.testing.assert_array_equal(
    first(whole.batches.tokens), first(cut.batches.tokens)
  )


def opened(fleet, k, now):
  """The first moment from `now` on in which a client is available."""
  while not systems.available(fleet, now)[k]:
    now = (math.floor(now / 3600) + 1) * 3600.0
  return now


def literal_buffer(fleet, num_arrivals, rounds):
  """The event loop of a buffer in plain words: all clients train all the time.

  A client that arrives waits in the buffer until it is full; then all of it
  starts again, each when it is available. Moments are taken one after another,
  arrivals before starts.
  """
  seconds = JOB.operations / fleet.operations
  events = [(0.0, 1, k) for k in range(len(seconds))]
  started, buffer, draws = {}, [], []
  while len(draws) < rounds:
    now, kind, k = event = min(events)
    events.remove(event)
    if kind:  # a start
      if (when := opened(fleet, k, now)) > now:
        events.append((when, 1, k))
        continue
      started[k] = len(draws)
      events.append((now + seconds[k], 0, k))
      continue
    buffer.append(k)
    if len(buffer) == num_arrivals:
      draws.append((now, sorted((k, started[k]) for k in buffer)))
      events += [(now, 1, k) for k in buffer]
      buffer = []
  return draws


def literal_tiers(fleet, tiers, rounds):
  """The event loop of tiers, all of whose clients train in every round."""
  seconds = JOB.operations / fleet.operations
  events = [(0.0, 1, tier) for tier in range(len(tiers))]
  begun, draws = {}, []
  while len(draws) < rounds:
    now, kind, tier = event = min(events)
    events.remove(event)
    if not kind:  # an end
      ids, version = begun.pop(tier)
      draws.append((now, [(k, version) for k in ids]))
      events.append((now, 1, tier))
    elif (when := min(opened(fleet, k, now) for k in tiers[tier])) > now:
      events.append((when, 1, tier))
    else:
      here = [k for k in tiers[tier] if systems.available(fleet, now)[k]]
      begun[tier] = here, len(draws)
      events.append((now + max(seconds[here]), 0, tier))
  return draws


def same_draws(rounds: Any, wanted):
  for number, (now, rows) in enumerate(wanted):
    draw = rounds(number)
    mine = zip(draw.ids.tolist(), draw.started.tolist())
    assert [row for row in mine if row[0] >= 0] == rows
    assert rounds.clock(number)['clock/seconds'] == pytest.approx(now)


SECONDS = (1.0, 1.5, 3.25, 7.1)
# Days and nights: clients that train for hours and sleep in between.
NIGHTS = system(
  2000.0, 5000.0, 11000.0, 26000.0,
  opens=np.array([0.0, 8.0, 20.0, 23.0]), hours=np.array([24.0, 6.0, 9.0, 2.0]),
)  # fmt: skip


@pytest.mark.parametrize('fleet', [system(*SECONDS), NIGHTS])
def test_buffered_rounds_are_those_of_an_event_loop(fleet):
  def make() -> Any:
    return buffered(4, 2, system=fleet, job=lambda: JOB, concurrency=4)

  rounds = make()
  same_draws(rounds, literal_buffer(fleet, 2, 40))
  late = [number - rounds(number).started.min() for number in range(40)]
  assert max(late) > 2
  # While the slowest trains, three others arrive in its seconds at most this
  # often, two a round.
  seconds = JOB.operations / fleet.operations
  others = sum(math.ceil(seconds[3] / seconds[k]) for k in range(3))
  assert max(late) <= math.ceil(others / 2) + 1
  # Pure in the round: another one that is asked in another order agrees.
  again = make()
  jax.tree.map(np.testing.assert_array_equal, again(11), rounds(11))
  jax.tree.map(np.testing.assert_array_equal, again(3), rounds(3))


@pytest.mark.parametrize('fleet', [system(*SECONDS), NIGHTS])
def test_rounds_of_tiers_are_those_of_an_event_loop(fleet):
  rounds = tiered(4, 2, system=fleet, job=lambda: JOB, num_tiers=2)
  same_draws(rounds, literal_tiers(fleet, ([0, 1], [2, 3]), 40))


def test_attendance_is_that_of_the_hours_of_the_day():
  rng = np.random.default_rng(0)
  fleet = system(
    *[1.0] * 40, opens=np.r_[0.0, rng.uniform(0, 24, 39)],
    hours=np.r_[24.0, rng.uniform(0.5, 23, 39)],
  )  # fmt: skip
  present = attendance(fleet)
  busy: list[int] = []
  for now in np.sort(rng.uniform(0, 4 * systems.DAY, 300)):
    present.advance(now)
    here = systems.available(fleet, now)
    here[busy] = False
    assert present.num_idle() == here.sum()
    if here.any() and len(busy) < 8:
      busy.append(present.take(rng))
      assert here[busy[-1]]
    elif busy:
      present.free(busy.pop(0))
  assert present.following() > now
  # All idle clients are drawn alike, although most tries meet nobody.
  few = attendance(
    system(*[1.0] * 999, opens=np.full(999, 5.0), hours=np.full(999, 1.0))
    ._replace(hours=np.r_[24.0, 24.0, np.ones(997)])
  )  # fmt: skip
  counts = np.zeros(2)
  for i in range(200):
    client = few.take(np.random.default_rng(i))
    counts[client] += 1
    few.free(client)
  assert counts.min() > 70


def test_compass_deals_steps_so_that_clients_arrive_together():
  """Worked by hand: 1, 2.5 and 7.3 seconds a step, 2 to 10 steps.

  At 25 s client 1 joins the group of client 0, which ends at 30: 2 steps. At
  73 s client 2 fits into none: the group in progress is over at 82 at most, its
  fastest could be back at 92, so it gets floor(19 / 7.3) = 2 steps, until 87.6.
  At 80 s clients 0 and 1 join it, with floor(7.6) and floor(7.6 / 2.5) steps.
  """
  job = JOB._replace(num_steps=10, down=0.0, up=0.0)
  rounds: Any = compass(
    3, system=system(10.0, 25.0, 73.0), job=lambda: job, min_steps=2
  )
  wanted = [  # seconds, {client: (started, steps)}
    (10.0, {0: (0, 10)}), (20.0, {0: (1, 10)}), (25.0, {1: (0, 10)}),
    (30.0, {0: (2, 10), 1: (3, 2)}), (40.0, {0: (4, 10), 1: (4, 4)}),
    (50.0, {0: (5, 10), 1: (5, 4)}), (60.0, {0: (6, 10), 1: (6, 4)}),
    (70.0, {0: (7, 10), 1: (7, 4)}), (73.0, {2: (0, 10)}),
    (80.0, {0: (8, 10), 1: (8, 4)}),
    (87.6, {0: (10, 7), 1: (10, 3), 2: (9, 2)}),
    (97.6, {0: (11, 10), 1: (11, 4)}), (107.6, {0: (12, 10), 1: (12, 4)}),
    (109.5, {2: (11, 3)}),
  ]  # fmt: skip
  for number, (now, rows) in enumerate(wanted):
    draw = rounds(number)
    columns = zip(draw.ids.tolist(), zip(draw.started, draw.steps))
    assert {k: row for k, row in columns if k >= 0} == rows
    assert rounds.clock(number)['clock/seconds'] == pytest.approx(now)
  # All clients' computation so far: 2 watts.
  assert rounds.clock(0)['clock/joules'] == pytest.approx(
    2 * (10 + 25 + 73 + 10)
  )
  for fields, words in (
    (dict(min_steps=11), 'clients.min_steps is 11'),
    (dict(cohort_size=2), 'all 3 clients train all the time'),
    (dict(latest_time_factor=0.5), 'latest_time_factor is 0.5'),
    (dict(speed_momentum=0.0), 'speed_momentum is 0.0'),
  ):
    with pytest.raises(Error, match=words):
      more: dict[str, Any] = fields
      compass(3, system=system(1.0, 2.0, 3.0), job=lambda: job, **more)(0)
  with pytest.raises(Error, match=r'set system\.hours=24'):
    compass(4, system=NIGHTS, job=lambda: job)


def test_compass_merges_the_late_with_the_next_group():
  fleet = system(*[8.0] * 3, watts=np.zeros(3))
  rounds: Any = compass(
    3, system=fleet, job=lambda: JOB, jitter=0.8, latest_time_factor=1.1
  )
  jobs, rows, spread, lost = [], [], 0, 0.0
  for number in range(200):
    draw = rounds(number)
    here = draw.ids >= 0
    lost += rounds.clock(number)['clock/lost']
    versions = draw.started[here]
    assert (draw.steps[here] >= 1).all() and (draw.steps[here] <= 4).all()
    assert (versions <= number).all()
    jobs += list(zip(draw.ids[here].tolist(), versions.tolist()))
    rows.append(int(here.sum()))
    spread += int(len(set(versions.tolist())) > 1)
  # A client trains one thing after another; the late are merged with others,
  # that started later.
  for client in range(3):
    mine = [version for k, version in jobs if k == client]
    assert mine == sorted(mine) and len(mine) > 50
  assert set(rows) == {1, 2, 3} and spread > 5
  # Work that newer work of its client replaced is lost. What begins and is
  # neither aggregated nor lost is in progress, or waits for the next group.
  begun = rounds.clock(199)['clock/joules_network'] / 3.0  # 0.5 J for 6 bytes
  assert lost > 20 and 3 <= begun - len(jobs) - lost <= 5


def test_fed_compass_mixes_a_group_at_once():
  algorithm = recipes.fed_compass(loss, SGD, num_clients=6, alpha=0.6)
  state, states = begun(algorithm)
  step, now, versions = jax.jit(algorithm.round), START, [START]
  started = [np.zeros(N, np.int32), np.array([0, 1, 1, 0], np.int32)]
  for number, begin in enumerate(started):
    share = 0.6 / np.sqrt(1.0 + number - begin) / 6
    ends = [descent(versions[begin[k]], GOALS[k]) for k in range(N)]
    now = (1 - share.sum()) * now + np.einsum('k,kab->ab', share, ends)
    versions.append(now)
    state, _, _ = step(state, cohort(started=begin, states=states))
    np.testing.assert_allclose(w(state.params), now, rtol=2e-5)
  # FedAsync, which mixes them in one after another, ends elsewhere.
  one = aggregators.one_after_another(0.6)
  apart = aggregators.all_together(1, 0.6)
  begin = np.float32(START)
  uploads = aggregators.received(begin, [begin + 1, begin + 2])
  key = jax.random.key(0)
  ends = [rule.aggregate(uploads, (), begin, key)[0] for rule in (one, apart)]
  assert np.abs(ends[0].delta - ends[1].delta).max() > 0.1


def test_a_client_that_fills_its_deadline_exactly_is_in_time():
  for num in range(1, 40):
    # 0.1 + 0.2 > 0.3 in floating point.
    job = JOB._replace(num_steps=num, down=0.0, up=0.0)
    for part in range(1, num + 1):
      one = system(1.2, latency=np.array([0.3]))
      limit = 0.3 + 1.2 * part / num
      rounds: Any = deadline(
        1, 1, system=one, job=lambda job=job: job, seconds=limit, partial=True
      )
      assert rounds(0).steps.tolist() == [part]
      assert rounds.clock(0)['clock/seconds'] <= limit
  whole = deadline(
    1, 1, system=system(0.2, latency=np.array([0.1])), seconds=0.3,
    job=lambda: JOB._replace(down=0.0, up=0.0),
  )  # fmt: skip
  assert whole(0).ids.tolist() == [0]


def test_nobody_is_late_where_all_are_equally_fast():
  rounds: Any = buffered(
    9, 3, system=system(*[2.0] * 9), job=lambda: JOB, concurrency=3
  )
  for number in range(5):
    assert rounds(number).started.tolist() == [number] * 3
    assert rounds.clock(number)['clock/seconds'] == 2.0 * (number + 1)
  assert len({int(i) for n in range(9) for i in rounds(n).ids}) > 5


def test_lost_work_and_hours_of_sleep_cost_time():
  lossy: Any = buffered(
    6, 1, system=system(*[1.0] * 6), job=lambda: JOB, concurrency=1,
    dropout=0.5,
  )  # fmt: skip
  lost = sum(lossy.clock(n)['clock/lost'] for n in range(20))
  assert lossy.clock(19)['clock/seconds'] == 20 + lost and lost > 5
  assert lossy.clock(19)['clock/joules'] == 2 * (20 + lost)
  assert lossy.clock(19)['clock/joules_network'] == 3 * (20 + lost)
  asleep = system(1.0, opens=np.array([5.0]), hours=np.array([1.0]))
  for builder in (buffered, deadline):
    rounds: Any = builder(1, 1, system=asleep, job=lambda: JOB)
    assert rounds.clock(0)['clock/seconds'] == 5 * 3600 + 1


@pytest.mark.parametrize('builder', [buffered, deadline, tiered])
def test_a_wait_ends_where_a_client_is_available(builder):
  opens = np.random.default_rng(0).uniform(0, 24, 50)
  for number, hour in enumerate(opens):  # hours that are not round in seconds
    fleet = system(1.0, opens=np.array([hour]), hours=np.array([2.0]))
    now = 1e6 * number
    late = now + systems.wait(fleet, now)
    assert systems.available(fleet, late)[0] and late - now <= 22 * 3600 + 1e-3
  more: dict[str, Any] = dict(num_tiers=1) if builder is tiered else {}
  fleet = system(9e3, opens=opens[:1], hours=np.array([2.0]))
  rounds: Any = builder(1, 1, system=fleet, job=lambda: JOB, **more)
  for number in range(10):  # one round a day
    assert rounds(number).ids.tolist() == [0]
    want = opens[0] * 3600 + number * systems.DAY + 9e3
    assert rounds.clock(number)['clock/seconds'] == pytest.approx(want)


@pytest.mark.parametrize('builder', [buffered, deadline, tiered])
def test_a_job_is_counted_once(builder):
  calls = []  # a count compiles the method
  more: dict[str, Any] = dict(num_tiers=1) if builder is tiered else {}
  rounds: Any = builder(
    2, 1, system=system(1.0, 2.0), job=lambda: calls.append(1) or JOB, **more
  )
  assert not calls
  for number in range(3):
    rounds(number)
  assert calls == [1]


def test_tiers_do_not_wait_for_each_other():
  rounds: Any = tiered(
    4, 2, system=system(5.0, 1.0, 4.0, 1.0), job=lambda: JOB, num_tiers=2
  )
  ids = [rounds(n).ids.tolist() for n in range(12)]
  assert [n for n, both in enumerate(ids) if both == [0, 2]] == [5, 11]
  assert all(both in ([0, 2], [1, 3]) for both in ids)
  assert rounds(5).started.tolist() == [0, 0]
  assert rounds(11).started.tolist() == [6, 6]


@pytest.mark.parametrize('builder', [buffered, deadline, tiered])
def test_a_number_out_of_range_is_one_sentence(builder):
  with pytest.raises(Error, match='cohort_size is 3: it is at least 1'):
    builder(2, 3, system=system(1.0, 1.0), job=lambda: JOB)
  with pytest.raises(Error, match='dropout is 1'):
    builder(2, 1, system=system(1.0, 1.0), job=lambda: JOB, dropout=1.0)


# ------------------------------------------------------------------- methods --

RATE, STEPS, N = 0.1, 3, 4
START = np.random.default_rng(0).normal(size=(2, 3))
GOALS = np.random.default_rng(1).normal(size=(N, STEPS, 2, 3))


def loss(base, params, batch, key):
  """Half the squared distance to a goal: the gradient is p - goal."""
  del base, key
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(batch))
  total = sum((0.5 * jnp.sum((p - x) ** 2) for p, x in pairs), jnp.float32(0))
  return LossSum(total, *jnp.float32([1, 0]))


def cohort(ids: Any = range(N), weight: Any = None, goals=GOALS, **more):
  ids = np.array(ids, np.int32)
  weight = np.ones(len(ids)) if weight is None else np.array(weight)
  return Cohort(
    ids=ids,
    batches={'layers': {'w': np.asarray(goals[ids], np.float32)}},
    weight=np.asarray(weight, np.float32),
    valid=np.ones(len(ids), bool),
    **more,
  )


def begun(algorithm, num=N):
  params = {'layers': {'w': jnp.asarray(START, jnp.float32)}}
  state = algorithm.init(jax.random.key(0), params)
  return state, tree.broadcast(algorithm.init_client(state.params), num)


def w(params):
  return np.asarray(params['layers']['w'], np.float64)


def descent(start, goals):
  for goal in goals:
    start = start - RATE * (start - goal)
  return start


SGD = local.optimizer('sgd', RATE)


def test_fed_buff_follows_its_event_loop():
  """NumPy: algorithm 1 of arXiv 2106.06639, on the arrivals of four clients."""
  seconds = (1.0, 1.5, 3.25, 7.1)
  rounds: Any = buffered(
    N, 2, system=system(*seconds), job=lambda: JOB, concurrency=4
  )
  algorithm = recipes.fed_buff(loss, SGD, max_staleness=20)
  state, states = begun(algorithm)
  step, versions = jax.jit(algorithm.round), [START]
  for number in range(8):
    draw, move = rounds(number), 0.0
    for k, begin in zip(draw.ids, draw.started):
      change = descent(versions[begin], GOALS[k]) - versions[begin]
      move = move + change / np.sqrt(1 + number - begin) / 2
    versions.append(versions[-1] + move)
    mine = cohort(
      draw.ids, weight=(5.0, 1.0), started=draw.started,
      states=tree.take(states, draw.ids),
    )  # fmt: skip
    state, _, _ = step(state, mine)
    np.testing.assert_allclose(w(state.params), versions[-1], rtol=2e-5)


def test_fed_buff_is_fed_avg_if_nobody_is_late():
  ends = []
  for method in (
    recipes.fed_buff(loss, SGD), recipes.fed_avg(loss, SGD),
  ):  # fmt: skip
    state, states = begun(method)
    ends.append(method.round(state, cohort(states=states))[0].params)
  np.testing.assert_allclose(w(ends[0]), w(ends[1]), rtol=1e-6)


def test_fed_at_weighs_a_tier_by_the_rounds_of_the_opposite_one():
  """NumPy: algorithm 1 of arXiv 2010.05958, on three tiers of six clients."""
  rounds: Any = tiered(
    6, 2, system=system(1.0, 1.1, 2.5, 2.6, 7.1, 7.2), job=lambda: JOB,
    num_tiers=3,
  )  # fmt: skip
  goals = np.random.default_rng(2).normal(size=(6, STEPS, 2, 3))
  algorithm = recipes.fed_at(loss, SGD, num_tiers=3, max_staleness=20)
  state, states = begun(algorithm, 6)
  step, versions = jax.jit(algorithm.round), [START]
  models, counts, same = np.stack([START] * 3), np.zeros(3), 0
  for number in range(10):
    draw = rounds(number)
    tier = draw.ids[0] // 2
    assert draw.tier.tolist() == [tier, tier]
    ends = [descent(versions[draw.started[0]], goals[k]) for k in draw.ids]
    models[tier] = np.average(ends, axis=0, weights=(5.0, 1.0))
    counts[tier] += 1
    share = counts[::-1] / counts.sum()
    versions.append(np.einsum('m,mab->ab', share, models))
    mine = cohort(
      draw.ids, weight=(5.0, 1.0), started=draw.started, goals=goals,
      states=tree.take(states, draw.ids), profiles={'tier': draw.tier},
    )  # fmt: skip
    state, _, _ = step(state, mine)
    np.testing.assert_allclose(w(state.params), versions[-1], rtol=2e-5)
    # A neighbour weighs a tier by its own rounds.
    own = np.einsum('m,mab->ab', share[::-1], models)
    same += np.abs(own - versions[-1]).max() < 1e-3
  assert counts.min() >= 1 and same <= 1
  with pytest.raises(Error, match='fed_at needs clients of tiers: set clients'):
    algorithm.round(state, mine._replace(profiles=()))


def test_fed_async_mixes_whole_parameters_one_after_another():
  algorithm = recipes.fed_async(loss, SGD, alpha=0.6, exponent=1.0)
  state, states = begun(algorithm)
  step = jax.jit(algorithm.round)
  started = [np.zeros(N, np.int32), np.array([0, 1, 1, 0], np.int32)]
  versions = [START]
  for number, begin in enumerate(started):
    now = versions[-1]
    late = number - begin
    for k in sorted(range(N), key=lambda k: (-late[k], k)):
      a = 0.6 / (1.0 + late[k])
      now = (1 - a) * now + a * descent(versions[begin[k]], GOALS[k])
    versions.append(now)
    state, _, _ = step(state, cohort(started=begin, states=states))
    np.testing.assert_allclose(w(state.params), now, rtol=2e-5)
  # FedBuff, which adds updates, ends elsewhere.
  other = recipes.fed_buff(loss, SGD)
  one, states = begun(other)
  one, _, _ = other.round(one, cohort(started=started[0], states=states))
  assert np.abs(w(one.params) - versions[1]).max() > 0.05


def test_the_three_discounts():
  late = np.arange(8)
  want = dict(
    constant=np.ones(8),
    polynomial=1.0 / np.sqrt(late + 1),
    hinge=[1.0] * 5 + [1 / 1.5, 1 / 2.0, 1 / 2.5],
  )
  for kind, values in want.items():
    np.testing.assert_allclose(
      staleness.discount(jnp.array(late), kind), values, 1e-6
    )
  with pytest.raises(Error, match="staleness is 'none': it is constant"):
    recipes.fed_buff(loss, SGD, staleness='none')


def nesterov(p, m, delta, rate, momentum):
  m = momentum * m + delta
  return p - rate * (delta + momentum * m), m


def test_diloco_is_nesterov_on_the_mean_of_its_workers():
  algorithm = recipes.diloco(loss, SGD)
  state, states = begun(algorithm)
  p, m = START, 0.0
  for _ in range(3):
    ends = [descent(p, GOALS[k]) for k in range(N)]
    p, m = nesterov(p, m, p - np.mean(ends, 0), 0.7, 0.9)
    state, states, _ = algorithm.round(
      state, cohort(weight=(9, 1, 1, 1), states=states)
    )
    np.testing.assert_allclose(w(state.params), p, rtol=2e-5)


ADAM = local.optimizer('adam', 0.05)


def test_one_fragment_without_overlap_is_diloco():
  more = dict(server_learning_rate=0.5, momentum=0.8)
  both = (
    recipes.diloco(loss, ADAM, **more),
    recipes.streaming_diloco(loss, ADAM, num_fragments=1, **more),
  )
  runs = []
  for method in both:
    state, states = begun(method)
    step = jax.jit(method.round)
    for _ in range(3):
      state, states, info = step(state, cohort(states=states))
    runs.append((w(state.params), np.sum(info.bytes_up)))
  np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-5)
  assert runs[0][1] == runs[1][1] == N * START.size * 4


def test_streaming_fragments_follow_their_schedule():
  """NumPy: algorithm 2 of arXiv 2501.18512, two layers as two fragments."""
  overlap, mixing = 1, 0.25
  algorithm = recipes.streaming_diloco(
    loss, SGD, num_fragments=2, overlap=overlap, mixing=mixing
  )
  state, states = begun(algorithm)
  step = jax.jit(algorithm.round)
  p, m = START.copy(), np.zeros_like(START)
  own, anchor = [START.copy() for _ in range(N)], START.copy()
  for number in range(5):
    last = None if number == 0 else (number - 1) % 2
    due = number % 2
    for k in range(N):
      own[k] = descent(own[k], GOALS[k][:overlap])
      if last is not None:
        own[k][last] = mixing * own[k][last] + (1 - mixing) * p[last]
      own[k] = descent(own[k], GOALS[k][overlap:])
    anchor = p.copy()
    delta = anchor[due] - np.mean([own[k][due] for k in range(N)], 0)
    p[due], m[due] = nesterov(p[due], m[due], delta, 0.4, 0.9)
    state, states, info = step(state, cohort(states=states))
    np.testing.assert_allclose(w(state.params), p, rtol=2e-5)
    layer = START[0].size * 4
    assert np.sum(info.bytes_up) == N * layer
    assert np.sum(info.bytes_down) == N * layer * (2 if number == 0 else 1)


def test_a_worker_that_comes_back_receives_what_it_missed():
  algorithm = recipes.streaming_diloco(loss, SGD, num_fragments=2)
  state, states = begun(algorithm)
  step = jax.jit(algorithm.round)
  some = np.array([0, 1])
  state, first, _ = step(state, cohort(states=states))
  for _ in range(2):  # clients 2 and 3 are away
    here = cohort(some, states=tree.take(first, some))
    state, mine, _ = step(state, here)
    first = jax.tree.map(lambda x, y: x.at[some].set(y), first, mine)
  _, after, info = step(state, cohort(states=first))
  layer = START[0].size * 4
  assert np.sum(info.bytes_down, -1).tolist() == [
    layer,
    layer,
    *[2 * layer] * 2,
  ]
  np.testing.assert_allclose(
    w(tree.take(after.local.anchor, 3)), w(state.params), rtol=1e-6
  )


def test_bad_settings_of_streaming_are_one_sentence():
  with pytest.raises(Error, match='has leaves of 2 layers'):
    method = recipes.streaming_diloco(loss, SGD, num_fragments=3)
    state, states = begun(method)
    method.round(state, cohort(states=states))
  with pytest.raises(Error, match='must be below the 3 steps'):
    method = recipes.streaming_diloco(loss, SGD, num_fragments=1, overlap=3)
    state, states = begun(method)
    method.round(state, cohort(states=states))


def test_gossip_multiplies_by_its_matrix():
  algorithm = recipes.gossip(loss, SGD, num_clients=N)
  state, states = begun(algorithm)
  ring = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]) / 3
  assert np.allclose(networks.topology('ring', N), ring)
  x = np.stack([START] * N)
  step = jax.jit(algorithm.round)
  for _ in range(2):
    y = np.stack([descent(x[k], GOALS[k]) for k in range(N)])
    x = np.einsum('kj,jab->kab', ring, y)
    state, states, info = step(state, cohort(states=states))
    np.testing.assert_allclose(w(state.params), x, rtol=2e-5)
  assert float(info.metrics['aggregators/spectral_gap']) == pytest.approx(2 / 3)
  apart = ((x - x.mean(0)) ** 2).sum() / N
  assert float(info.metrics['aggregators/apart']) == pytest.approx(apart, 1e-4)


@pytest.mark.parametrize('name', ['ring', 'complete', 'star', 'random'])
def test_networks_keep_the_mean(name):
  matrix = networks.topology(name, 7, seed=2)
  np.testing.assert_allclose(matrix, matrix.T)
  np.testing.assert_allclose(matrix.sum(0), np.ones(7))
  assert matrix.min() >= 0 and 0 < networks.spectral_gap(matrix) <= 1
  x = np.random.default_rng(0).normal(size=7)
  rest = x - x.mean()
  shrunk = np.linalg.norm(matrix @ rest) / np.linalg.norm(rest)
  assert shrunk <= 1 - networks.spectral_gap(matrix) + 1e-9


def test_regions_average_often_and_the_cloud_rarely():
  algorithm = recipes.hier_favg(
    loss, SGD, num_clients=N, num_regions=2, sync_every=2
  )
  state, states = begun(algorithm)
  step, weight = jax.jit(algorithm.round), np.array([1.0, 3.0, 2.0, 2.0])
  regions, total = np.stack([START] * 2), np.zeros(2)
  for number in range(3):
    for g, members in enumerate(([0, 1], [2, 3])):
      share = weight[members] / weight[members].sum()
      ends = [descent(regions[g], GOALS[k]) for k in members]
      regions[g] = np.einsum('k,kab->ab', share, ends)
      total[g] += weight[members].sum()
    if number % 2:
      regions[:] = np.einsum('g,gab->ab', total / total.sum(), regions)
      total[:] = 0
    state, states, _ = step(state, cohort(weight=weight, states=states))
    np.testing.assert_allclose(w(state.params), regions, rtol=2e-5)
  assert np.abs(regions[0] - regions[1]).max() > 1e-3


def test_rules_refuse_numbers_out_of_range():
  for build, words in (
    (lambda: aggregators.one_after_another(0.0), 'alpha is 0.0'),
    (lambda: recipes.fed_buff(loss, SGD, max_staleness=-1), 'max_staleness'),
    (lambda: recipes.diloco(loss, SGD, momentum=1.0), 'momentum=1.0'),
    (lambda: recipes.gossip(loss, SGD, num_clients=3, topology='line'), 'line'),
  ):
    with pytest.raises(Error, match=words):
      build()
  assert ClientState().private is None
