"""All sections of a config, explained in the order of the data flow.

    cp configs/forkme.py configs/mine.py
    python -m fedjax_llm.train --config configs/mine.py --workdir runs/mine

Copy this file to begin. It needs only the repository: a random two-layer model
on Shakespeare's roles, half a minute on two cores, most of it compiling. The
held-out loss falls from 6.11 to 3.60 nats a byte (a uniform guess has ln 259 =
5.6), because even a random network can learn the frequencies of letters.

A section is `dict(name=..., **keywords)`: the name of a function in that
section's module and its keyword arguments. The function's signature holds all
defaults, so a config only sets values that differ:

    python -m fedjax_llm.train --config configs/forkme.py --help

lists all fields with their values. Every field may also be set on the command
line (`--config.local.learning_rate=3e-3`), in the file or not; a new name
resets its section. Your own function is named by its import path,
`name='my_lab.rules:by_norm'`. A misspelt field is an error that names the
nearest field.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  # `--config configs/forkme.py:smoke` calls get_config('smoke'): the same run,
  # small enough for tests.
  smoke = arg == 'smoke'
  config = ml_collections.ConfigDict()

  # ------------------------------------------------------------------- run --
  config.num_rounds = 2 if smoke else 20
  config.seed = 0  # of all random numbers: data, clients, adapter, training
  # Clients that train in one program; a larger cohort trains block by block.
  # None: the whole cohort; 'auto': chosen by speed and memory.
  config.block_size = None
  config.widths = ()  # allowed widths of a block's rows, e.g. (32, 64)
  config.mesh_model = 1  # devices that share a copy of the model
  config.execution = 'shard_map'  # over devices; or 'pmap'
  # Number of devices that JAX makes of a CPU: one a core is fastest for small
  # models.
  config.cpu_devices = 1
  config.checkpoint_every = 1  # rounds; a stopped run resumes from the last one
  config.keep_checkpoints = 2  # an older one is read if the last is damaged
  # The process that writes; 'all' where all processes share the workdir.
  config.checkpoint_writers = 'first'
  # Folder with compiled programs for the next start; None: no cache.
  config.compilation_cache = 'auto'
  config.profile = None  # rounds to trace for Perfetto and TensorBoard: (3, 4)

  # ------------------------------------------------------------------ task --
  # `causal_lm`: predict the next token. `classification`: an encoder predicts
  # a text's label, see configs/minilm_classification.py.
  config.task = dict(name='causal_lm')

  # ------------------------------------------------------------------ data --
  # `packaged`, `jsonl` (files, lists of files and patterns, plain or .gz) or
  # `hf` (all that `datasets` reads). The text is in the fields `text_key`, or
  # `prompt_key` and `response_key`, or `messages_key` (chats). E.g.
  #   dict(name='jsonl', path='mine/*.jsonl.gz', client_key='author',
  #        text_key='text')
  config.data = dict(name='packaged', dataset='shakespeare_mini')
  # Texts on which the server itself trains, for methods that do so; a source
  # as in `data`.
  config.public = None
  # Clients with models of their own (algorithm fed_mkt), a section as `model`
  # for each group of them. E.g.
  #   dict(models=[dict(name='pretrained', path='small'), dict(name='random')],
  #        shares=[0.8, 0.2])
  config.client_models = None

  # Assigns records to clients: `natural` (the data's own clients), `iid`,
  # `dirichlet` (label skew), `quantity` (sizes), `one_label`. E.g.
  #   dict(name='dirichlet', num_clients=50, alpha=0.3)
  config.partition = dict(name='natural')

  # Text to tokens. The template is `chat` (the tokenizer's own), `alpaca`,
  # `vicuna` or `plain`; the loss counts replies only. Prompts are cut on the
  # left; replies that do not fit are left out and counted.
  config.population = dict(
    template='plain',
    max_length=128,
    heldout_fraction=0.1,  # of each client's texts, never trained on
    new_clients=2,  # clients that never train
    max_clients=6 if smoke else None,
  )
  # Some clients train on other texts: config.poison = dict(name='backdoor')

  # Data that change during the run, one class, topic or source after another:
  # config.stages = dict(name='by_key', key='label', rounds=10)

  # The examples that a client trains on: `curriculum`, `quality`, `by_loss`,
  # `by_gradient`, `near_duplicates`, `fed_hds`. Without the section: all.
  # config.selection = dict(name='curriculum', rounds=10)

  # --------------------------------------------------------------- clients --
  # Devices and links, for the samplers with a simulated clock (`deadline`,
  # `buffered`, `compass`, `tiered`): dict(name='fleet', devices=('phone',)).
  # None: none.
  config.system = None
  # How a round's clients are drawn: `uniform`, `by_size`, `cyclic`, `full`.
  config.clients = dict(
    name='uniform',
    cohort_size=4 if smoke else 8,
    availability=1.0,  # the probability that a client can be drawn
    dropout=0.0,  # the probability that a drawn client does not report
  )
  # Capacities of clients, for methods that use them: dict(name='ranks',
  # choices=(4, 8)). None: all clients are equal.
  config.profiles = None
  # The work of a drawn client: local steps, rows a step, weight in the mean.
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
  # The parameters that are trained, sent and averaged; the model is frozen.
  # Targets are patterns for the names of weights, or 'all-linear'.
  config.adapter = dict(name='lora', rank=8, alpha=16.0, targets='all-linear')

  # ------------------------------------ local, uploads, aggregators, server --
  # A recipe of fedjax_llm/recipes: `fed_avg`, `fed_prox`, `scaffold`,
  # `fed_adam`, ..., and the two baselines `local_only` and `centralised`.
  config.algorithm = dict(name='fed_avg')
  # The clients' optimizer: any of optax, with its arguments and a schedule:
  #   schedule=dict(name='cosine_decay_schedule', init_value=1e-2,
  #                 decay_steps=80)    (steps over the whole run)
  config.local = dict(name='adamw', learning_rate=1e-2)
  # Rows of a batch whose activations exist at the same time; without the
  # section all of them:
  # config.memory = dict(micro_batch=1)
  # The encoding of uploads, the aggregation rule, and the server's optimizer.
  # Recipes that define one of these do not accept its section: leave it out.
  config.upload = dict(name='identity')
  # The encoding of the parameters that clients receive; None: as they are.
  config.download = None
  # config.adversary = dict(name='sign_flip', fraction=0.2)  # to test rules
  config.aggregator = dict(name='mean')  # `median`, `trimmed_mean`, `krum`, ...
  # Client-level differential privacy; takes the place of the rule, and needs
  # clients.name=poisson, a clients.rate and cohort.weight_by=uniform:
  # config.privacy = dict(clip=0.5, epsilon=3.0, delta=1e-5)
  config.server = dict(name='sgd', learning_rate=1.0)

  # ----------------------------------------------------------------- evals --
  config.evals = dict(
    every=5,  # rounds; before the first and after the last in any case
    per_client=2,  # held-out texts a client, the first ones; None: all
    buckets=(96,),  # widths of rows, so that little is computed on padding
    samples=2,  # replies shown before and after
    # One more evaluation of clients beside their served parameters: `recalled`
    # (with a memory of their texts), `instance_mixed`, `fused`. None: no.
    personal=None,
  )

  # -------------------------------------------------------------- tracking --
  # metrics.jsonl, metrics.csv and TensorBoard's events are always written.
  # Weights & Biases and MLflow can be added:
  # dict(to=('wandb', 'mlflow'), project='fedjax_llm', name='of the run')
  config.tracking = dict()

  # ----------------------------------------------------------------- hosts --
  # Several processes in one run: dict(coordinator='address:port',
  # num_processes=2, process_id=0), or coordinator='auto' on TPU pods and Slurm.
  config.hosts = dict()
  return config
