"""Every section explained, in the order in which data flow: copy it and begin.

    cp configs/forkme.py configs/mine.py
    python -m fedjax_llm.train --config configs/mine.py --workdir runs/mine

As it stands it needs the repository alone: a random two-layer model on
Shakespeare's roles, half a minute on two cores, most of it compiling. The
held-out loss falls from 6.11 to 3.60 nats a byte (ln 259 = 5.6 would know
nothing), because even a random network can learn which letters are frequent.

A section is `dict(name=..., **keywords)`. The name is looked up in the room of
that section, the keywords are those of the function found there, and its
signature holds every default, so a config only says what differs:

    python -m fedjax_llm.train --config configs/forkme.py --help

lists all fields with their values. Any of them may also be set on the command
line (`--config.local.learning_rate=3e-3`), whether the file names it or not;
a new name starts its section anew. One's own function is named by its import
path, `name='my_lab.rules:by_norm'`. A misspelt field is an error that names the
nearest one.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  # `--config configs/forkme.py:smoke` calls get_config('smoke'): the same run
  # made so small that tests can afford it.
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()

  # ------------------------------------------------------------------- run --
  config.num_rounds = 2 if smoke else 20
  config.seed = 0  # of everything random: data, clients, adapter, training
  # Clients that train as one program; the rest of the cohort follows in further
  # blocks. None is the whole cohort; 'auto' goes by speed and memory.
  config.block_size = None
  config.widths = ()  # that the rows of a block may be cut to, e.g. (32, 64)
  config.mesh_model = 1  # devices that share a copy of the model
  config.execution = 'shard_map'  # over devices; or 'pmap', as some like it
  # As which JAX sees a CPU: one a core is fastest for small models.
  config.cpu_devices = 1
  config.checkpoint_every = 1  # rounds; a killed run goes on from the last one
  config.keep_checkpoints = 2  # a damaged one can be passed over
  # Of several processes; 'all' of them, where all see the workdir.
  config.checkpoint_writers = 'first'
  # Compiled programs are kept in a cache for the next start; None: nowhere.
  config.compilation_cache = 'auto'

  # ------------------------------------------------------------------ task --
  # `causal_lm`: to go on with a text. `classification`: an encoder tells a
  # text's label, see configs/minilm_classification.py.
  config.task = dict(name='causal_lm')

  # ------------------------------------------------------------------ data --
  # `packaged`, `jsonl` (files, lists of files and patterns, plain or .gz) or
  # `hf` (whatever `datasets` reads). Text is told by `text_key`, by
  # `prompt_key` and `response_key`, or by `messages_key` (chats). E.g.
  #   dict(name='jsonl', path='mine/*.jsonl.gz', client_key='author',
  #        text_key='text')
  config.data = dict(name='packaged', dataset='shakespeare_mini')

  # Who holds what: `natural` (the data's own clients), `iid`, `dirichlet`
  # (label skew), `quantity` (sizes), `one_label`. E.g.
  #   dict(name='dirichlet', num_clients=50, alpha=0.3)
  config.partition = dict(name='natural')

  # Text to tokens. The template is `chat` (the tokenizer's own), `alpaca`,
  # `vicuna` or `plain`; the loss counts on replies only. Prompts are cut on
  # their left, replies that do not fit are left out and counted.
  config.population = dict(
    template='plain',
    max_length=128,
    heldout_fraction=0.1,  # of each client's texts, never trained on
    new_clients=2,  # never train at all
    max_clients=6 if smoke else None,
  )

  # --------------------------------------------------------------- clients --
  # Who takes part in a round: `uniform`, `by_size`, `cyclic`, `full`.
  config.clients = dict(
    name='uniform',
    cohort_size=4 if smoke else 8,
    availability=1.0,  # the probability that a client can be drawn
    dropout=0.0,  # the probability that one that was drawn does not report
  )
  # What clients can carry, for methods that ask: dict(name='ranks',
  # choices=(4, 8)). None: all can carry the same.
  config.profiles = None
  # What each of them does: local steps, rows a step, and how much it counts.
  config.cohort = dict(
    num_steps=2 if smoke else 4,
    batch_size=2,
    weight_by='tokens',  # or 'examples', 'uniform'
    packing=False,  # True: several texts a row
  )

  # -------------------------------------------------- model and adapter --
  # `random`, or `pretrained` with the path of a Hugging Face directory or a
  # name on the hub: dict(name='pretrained', path='...', dtype='bfloat16').
  config.model = dict(name='random', hidden_size=64, num_layers=2)
  # What is trained, sent and averaged; the model itself stays as it is.
  # Targets are patterns on the names of weights, or 'all-linear'.
  config.adapter = dict(name='lora', rank=8, alpha=16.0, targets='all-linear')

  # ------------------------------------ local, uploads, aggregators, server --
  # A recipe of fedjax_llm/recipes: `fed_avg`, `fed_prox`, `scaffold`,
  # `fed_adam`, ..., and the two baselines `local_only` and `centralised`.
  config.algorithm = dict(name='fed_avg')
  # The clients' optimizer: any of optax, with its arguments and a schedule, as
  #   schedule=dict(name='cosine_decay_schedule', init_value=1e-2,
  #                 decay_steps=80)    (steps over the whole run)
  config.local = dict(name='adamw', learning_rate=1e-2)
  # What travels up, the rule on what arrives, and what the server does with it.
  # Recipes bring their own where that is their point: leave it out there.
  config.upload = dict(name='identity')
  config.aggregator = dict(name='mean')  # `median`, `trimmed_mean`, `krum`, ...
  config.server = dict(name='sgd', learning_rate=1.0)

  # ----------------------------------------------------------------- evals --
  config.evals = dict(
    every=5,  # rounds; before the first and after the last in any case
    per_client=2,  # held-out texts a client, the first ones; None: all
    buckets=(96,),  # widths of rows, so that little is computed on padding
    samples=2,  # replies shown before and after
    # How clients are tested beside what they are served: `recalled` (with a
    # memory of their texts), `instance_mixed`, `fused`. None: not at all.
    personal=None,
  )

  # -------------------------------------------------------------- tracking --
  # metrics.jsonl, metrics.csv and TensorBoard's events are always written. Who
  # has Weights & Biases or MLflow may have them there too:
  # dict(to=('wandb', 'mlflow'), project='fedjax_llm', name='of the run')
  config.tracking = dict()

  # ----------------------------------------------------------------- hosts --
  # Several processes as one: dict(coordinator='address:port', num_processes=2,
  # process_id=0), or 'auto' as the coordinator on TPU pods and under Slurm.
  config.hosts = dict()
  return config
