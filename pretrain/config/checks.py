"""What options must not contradict, and what is worth a warning."""

from pretrain.config.options import (
    BUDGET_UNITS,
    SECTIONS,
    BudgetOptions,
    Config,
    phase_configs,
    replays_graphs,
)


def contradictions(config: Config) -> list[str]:
    found = [
        problem
        for check in (_check_model, _check_phases, _check_budget, _check_parallel, _check_evaluate)
        for problem in check(config)
    ]
    *early, last = phase_configs(config)
    always = [*_check_masking(last), *_check_train(last)]
    for number, phase in enumerate(early):
        new = [problem for problem in (*_check_masking(phase), *_check_train(phase)) if problem not in always]
        found += [f"train.phases.{number}: {problem}" for problem in new]
    return found + always


def _check_model(config: Config) -> list[str]:
    m, found = config.model, []
    if m.hidden_size % m.num_heads:
        found.append(f"model.hidden_size = {m.hidden_size} is no multiple of model.num_heads = {m.num_heads}")
    elif m.block == "modern" and (m.hidden_size // m.num_heads) % 2:
        found.append(
            f"model.hidden_size / model.num_heads = {m.hidden_size // m.num_heads}: rotary positions"
            " need an even head width"
        )
    if m.block == "modern" and m.norm == "post":
        found.append("model.norm = 'post': the modern block is pre-LN only; leave it out")
    if m.block == "bert" and m.norm == "pre":
        found.append("model.norm = 'pre': BERT is post-LN; leave it out, or take model.block = roberta")
    if m.block == "modern" and m.token_type:
        found.append("model.token_type = true: the modern block has none; leave it out")
    if m.local_window and m.block != "modern":
        found.append(f"model.local_window = {m.local_window}: the modern block alone has local layers")
    if m.local_window % 2:
        found.append(f"model.local_window = {m.local_window}: half of it is on either side; take an even one")
    if m.decoder == "bottleneck" and m.decoder_layers and config.corpus.documents == "bounded":
        found.append(
            "model.decoder = bottleneck with corpus.documents = bounded: a window has one <s>, which sees its"
            " own document only; take packed"
        )
    late = m.mask_from == m.num_layers and m.decoder_layers >= 1
    if not (late or (m.mask_from < m.num_layers and m.decoder_layers == 0)):
        found.append(
            f"model.mask_from = {m.mask_from} with model.decoder_layers = {m.decoder_layers}: allowed are"
            f" 0 <= mask_from < {m.num_layers} without a decoder, or mask_from = {m.num_layers}"
            " (num_layers) with decoder_layers >= 1"
        )
    return found


def _check_masking(config: Config) -> list[str]:
    k, found = config.masking, []
    if min(k.corruption) < 0 or abs(sum(k.corruption) - 1) > 1e-9:
        found.append(
            f"masking.corruption = {list(k.corruption)}: three shares (mask, random, keep) that sum to 1"
        )
    if round(k.rate * (config.train.seq_length - 2)) < 1:
        found.append(
            f"masking.rate = {k.rate} of train.seq_length = {config.train.seq_length} predicts nothing;"
            " raise either"
        )
    elif k.predict is not None and not 1 / (config.train.seq_length - 2) <= k.predict <= k.rate:
        found.append(
            f"masking.predict = {k.predict}: a token of a window at least, and no more than masking.rate ="
            f" {k.rate}, the share that is hidden"
        )
    elif k.views > 1 and (config.train.seq_length - 2) // k.views < 1:
        found.append(f"masking.views = {k.views} is more than the tokens of a sequence")
    if k.views > 1 and k.views_mode == "batch" and config.train.batch_size % k.views:
        found.append(
            f"train.batch_size = {config.train.batch_size} is no multiple of masking.views = {k.views}"
            " (views_mode batch)"
        )
    return found


def _check_train(config: Config) -> list[str]:
    t, found = config.train, []
    if t.seq_length > config.model.max_positions:
        found.append(
            f"train.seq_length = {t.seq_length} exceeds model.max_positions = {config.model.max_positions}"
        )
    if t.micro_batch_size and t.batch_size % t.micro_batch_size:
        found.append(
            f"train.batch_size = {t.batch_size} is no multiple of train.micro_batch_size ="
            f" {t.micro_batch_size}"
        )
    if t.float8 and t.precision in ("fp32", "fp16"):
        found.append(f"train.float8 = true with train.precision = {t.precision}: all else is bf16; set that")
    if t.float8 and config.model.hidden_size % 16:
        found.append(
            f"train.float8 = true: model.hidden_size = {config.model.hidden_size} is no multiple of 16; leave"
            " float8 out"
        )
    if t.cross_entropy != "own" and t.precision == "fp16":
        found.append(
            f"train.cross_entropy = {t.cross_entropy} forms gradients before the loss is scaled, which"
            " train.precision = fp16 needs; take own"
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        found.append(f"optimizer.betas = {list(config.optimizer.betas)}: both must lie in [0, 1)")
    return found


def _check_evaluate(config: Config) -> list[str]:
    length, most = config.evaluate.seq_length, config.model.max_positions
    if length and length > most:
        return [f"evaluate.seq_length = {length} exceeds model.max_positions = {most}"]
    return []


def _check_phases(config: Config) -> list[str]:
    phase_ends = [phase.until for phase in config.train.phases]
    if phase_ends == sorted(set(phase_ends)):
        return []
    return [f"train.phases: until = {phase_ends}: each must be larger than the one before"]


def _check_budget(config: Config) -> list[str]:
    b = config.budget
    given = [unit for unit in BUDGET_UNITS if unit in b.model_fields_set]
    if b.relative_to is None:
        if not given:
            units = f"{', '.join(BUDGET_UNITS[:-1])} or {BUDGET_UNITS[-1]}"
            return [f"budget is missing; give one of {units}, or relative_to"]
        alone = [name for name in ("fraction", "measure") if name in b.model_fields_set]
        defaults = BudgetOptions()
        if any(getattr(b, name) != getattr(defaults, name) for name in alone):
            return [f"budget.{alone[0]} needs budget.relative_to"]
    elif given not in ([], [b.measured_unit]):
        return [f"budget has relative_to and {', '.join(given)}; keep one of them (unit=null unsets)"]
    if len(given) > 1:
        return [f"budget has {len(given)} units ({', '.join(given)}); keep exactly one (unit=null unsets)"]
    return []


def _check_parallel(config: Config) -> list[str]:
    p, m, found = config.parallel, config.model, []
    for name in ("num_heads", "ffn_size", "vocab_multiple"):
        if getattr(m, name) % p.tensor:
            found.append(f"model.{name} = {getattr(m, name)} is no multiple of parallel.tensor = {p.tensor}")
    if config.train.float8 and p.tensor > 1:
        found.append(
            f"train.float8 = true: torchao does not know layers that parallel.tensor = {p.tensor} divides;"
            " leave one of them out"
        )
    if config.train.float8 and p.zero == 3:
        found.append(
            "train.float8 = true keeps every gathered layer until the backward pass, which undoes"
            " parallel.zero = 3; take 2"
        )
    kernel = config.train.cross_entropy
    if kernel != "own" and p.tensor > 1:
        found.append(
            f"train.cross_entropy = {kernel} wants the whole vocabulary on a rank, which parallel.tensor ="
            f" {p.tensor} divides; take own"
        )
    if config.optimizer.kind != "adamw" and p.zero:
        found.append(
            f"optimizer.kind = {config.optimizer.kind} works on whole tensors, which parallel.zero ="
            f" {p.zero} cuts into flat pieces; take parallel.zero = 0, where data-parallel ranks share out"
            " Muon's matrices and their state"
        )
    replays = config.monitor.replay_every is not None
    if replays and (config.train.engine != "torch" or config.train.deterministic is False):
        found.append(
            "monitor.replay_every compares bits of one rank's gradients: it needs train.engine = torch and"
            " train.deterministic = true"
        )
    if config.train.engine == "torch":
        if p.zero:
            found.append(f"parallel.zero = {p.zero} needs train.engine = deepspeed")
        if p.offload != "none":
            found.append(f"parallel.offload = {p.offload} needs train.engine = deepspeed")
        if config.deepspeed:
            found.append("deepspeed: these keys need train.engine = deepspeed")
    elif p.reduce_dtype != "fp32":
        found.append(
            f"parallel.reduce_dtype = {p.reduce_dtype} needs train.engine = torch (DeepSpeed's own key is"
            " deepspeed.communication_data_type)"
        )
    elif p.offload == "optimizer" and p.zero == 0:
        found.append("parallel.offload = optimizer needs parallel.zero of 1 or more")
    elif p.offload == "all" and p.zero != 3:
        found.append("parallel.offload = all needs parallel.zero = 3")
    return found


def config_warnings(config: Config) -> list[str]:
    """Return the settings that have no effect here, or another one than they say, one line each."""
    m, k, found = config.model, config.masking, []
    late, inside, decoder = m.mask_from > 0, 0 < m.mask_from < m.num_layers, m.decoder_layers > 0
    for section, name, used, why in (
        ("model", "join", inside, "the [MASK]s join before the first layer or after the last"),
        ("model", "decoder", decoder, "there is no decoder"),
        ("model", "decoder_positions", decoder and m.block != "modern", "no learned decoder positions"),
        ("model", "mask_vector", late, "the [MASK]s are ordinary tokens when mask_from = 0"),
        ("model", "mask_leak", late, "the encoder sees all [MASK]s when mask_from = 0"),
        ("model", "rope_theta", m.block == "modern", "only the modern block rotates"),
        ("model", "global_every", m.local_window, "model.local_window is 0"),
        ("model", "local_rope_theta", m.local_window, "model.local_window is 0"),
        ("optimizer", "muon_lr_scale", config.optimizer.kind == "muon", "optimizer.kind is not muon"),
        ("masking", "span_stop", k.scheme == "span", "masking.scheme is not span"),
        ("masking", "span_max", k.scheme == "span", "masking.scheme is not span"),
        ("masking", "views_mode", k.views > 1, "masking.views is 1"),
        ("masking", "views_partition", k.views > 1, "masking.views is 1"),
    ):
        default = SECTIONS[section].model_fields[name].default
        if not used and getattr(getattr(config, section), name) != default:
            found.append(f"{section}.{name} has no effect: {why}")
    if k.rate * k.views > 1 and k.views_partition != "counts":
        found.append(
            f"masking.rate = {k.rate:g} is {1 / k.views:.3g} here: masking.views = {k.views} masks of a text"
            " have no token in common"
        )
    if config.train.compile == "reduce-overhead" and not replays_graphs(config):
        found.append(
            "train.compile = reduce-overhead is default here: CUDA graphs need train.engine = torch,"
            " parallel.tensor = 1 and train.recompute = none"
        )
    return found
