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
    model, found = config.model, []
    if model.hidden_size % model.num_heads:
        found.append(
            f"model.hidden_size = {model.hidden_size} is no multiple of model.num_heads = {model.num_heads}"
        )
    elif model.block == "modern" and (model.hidden_size // model.num_heads) % 2:
        found.append(
            f"model.hidden_size / model.num_heads = {model.hidden_size // model.num_heads}: rotary positions"
            " need an even head width"
        )
    if model.block == "modern" and model.norm == "post":
        found.append("model.norm = 'post': the modern block is pre-LN only; leave it out")
    if model.block == "bert" and model.norm == "pre":
        found.append("model.norm = 'pre': BERT is post-LN; leave it out, or take model.block = roberta")
    if model.block == "modern" and model.token_type:
        found.append("model.token_type = true: the modern block has none; leave it out")
    if model.local_window and model.block != "modern":
        found.append(f"model.local_window = {model.local_window}: the modern block alone has local layers")
    if model.local_window % 2:
        found.append(
            f"model.local_window = {model.local_window}: half of it is on either side; take an even one"
        )
    if model.decoder == "bottleneck" and model.decoder_layers and config.corpus.documents == "bounded":
        found.append(
            "model.decoder = bottleneck with corpus.documents = bounded: a window has one <s>, which sees its"
            " own document only; take packed"
        )
    late = model.mask_from == model.num_layers and model.decoder_layers >= 1
    if not (late or (model.mask_from < model.num_layers and model.decoder_layers == 0)):
        found.append(
            f"model.mask_from = {model.mask_from} with model.decoder_layers = {model.decoder_layers}: allowed"
            f" are 0 <= mask_from < {model.num_layers} without a decoder, or mask_from = {model.num_layers}"
            " (num_layers) with decoder_layers >= 1"
        )
    return found


def _check_masking(config: Config) -> list[str]:
    masking, found = config.masking, []
    if min(masking.corruption) < 0 or abs(sum(masking.corruption) - 1) > 1e-9:
        found.append(
            f"masking.corruption = {list(masking.corruption)}: three shares (mask, random, keep) that sum"
            " to 1"
        )
    if round(masking.rate * (config.train.seq_length - 2)) < 1:
        found.append(
            f"masking.rate = {masking.rate} of train.seq_length = {config.train.seq_length} predicts nothing;"
            " raise either"
        )
    elif (
        masking.predict is not None
        and not 1 / (config.train.seq_length - 2) <= masking.predict <= masking.rate
    ):
        found.append(
            f"masking.predict = {masking.predict}: a token of a window at least, and no more than"
            f" masking.rate = {masking.rate}, the share that is hidden"
        )
    elif masking.views > 1 and (config.train.seq_length - 2) // masking.views < 1:
        found.append(f"masking.views = {masking.views} is more than the tokens of a sequence")
    if masking.views > 1 and masking.views_mode == "batch" and config.train.batch_size % masking.views:
        found.append(
            f"train.batch_size = {config.train.batch_size} is no multiple of masking.views = {masking.views}"
            " (views_mode batch)"
        )
    return found


def _check_train(config: Config) -> list[str]:
    train, found = config.train, []
    if train.seq_length > config.model.max_positions:
        found.append(
            f"train.seq_length = {train.seq_length} exceeds model.max_positions ="
            f" {config.model.max_positions}"
        )
    if train.micro_batch_size and train.batch_size % train.micro_batch_size:
        found.append(
            f"train.batch_size = {train.batch_size} is no multiple of train.micro_batch_size ="
            f" {train.micro_batch_size}"
        )
    if train.float8 and train.precision in ("fp32", "fp16"):
        found.append(
            f"train.float8 = true with train.precision = {train.precision}: all else is bf16; set that"
        )
    if train.float8 and config.model.hidden_size % 16:
        found.append(
            f"train.float8 = true: model.hidden_size = {config.model.hidden_size} is no multiple of 16; leave"
            " float8 out"
        )
    if train.cross_entropy != "own" and train.precision == "fp16":
        found.append(
            f"train.cross_entropy = {train.cross_entropy} forms gradients before the loss is scaled, which"
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
    budget = config.budget
    given = [unit for unit in BUDGET_UNITS if unit in budget.model_fields_set]
    if budget.relative_to is None:
        if not given:
            units = f"{', '.join(BUDGET_UNITS[:-1])} or {BUDGET_UNITS[-1]}"
            return [f"budget is missing; give one of {units}, or relative_to"]
        alone = [name for name in ("fraction", "measure") if name in budget.model_fields_set]
        defaults = BudgetOptions()
        if any(getattr(budget, name) != getattr(defaults, name) for name in alone):
            return [f"budget.{alone[0]} needs budget.relative_to"]
    elif given not in ([], [budget.measured_unit]):
        return [f"budget has relative_to and {', '.join(given)}; keep one of them (unit=null unsets)"]
    if len(given) > 1:
        return [f"budget has {len(given)} units ({', '.join(given)}); keep exactly one (unit=null unsets)"]
    return []


def _check_parallel(config: Config) -> list[str]:
    parallel, model, found = config.parallel, config.model, []
    for name in ("num_heads", "ffn_size", "vocab_multiple"):
        if getattr(model, name) % parallel.tensor:
            found.append(
                f"model.{name} = {getattr(model, name)} is no multiple of parallel.tensor = {parallel.tensor}"
            )
    if config.train.float8 and parallel.tensor > 1:
        found.append(
            f"train.float8 = true: torchao does not know layers that parallel.tensor = {parallel.tensor}"
            " divides; leave one of them out"
        )
    if config.train.float8 and parallel.zero == 3:
        found.append(
            "train.float8 = true keeps every gathered layer until the backward pass, which undoes"
            " parallel.zero = 3; take 2"
        )
    kernel = config.train.cross_entropy
    if kernel != "own" and parallel.tensor > 1:
        found.append(
            f"train.cross_entropy = {kernel} wants the whole vocabulary on a rank, which parallel.tensor ="
            f" {parallel.tensor} divides; take own"
        )
    if config.optimizer.kind != "adamw" and parallel.zero:
        found.append(
            f"optimizer.kind = {config.optimizer.kind} works on whole tensors, which parallel.zero ="
            f" {parallel.zero} cuts into flat pieces; take parallel.zero = 0, where data-parallel ranks share"
            " out Muon's matrices and their state"
        )
    replays = config.monitor.replay_every is not None
    if replays and (config.train.engine != "torch" or config.train.deterministic is False):
        found.append(
            "monitor.replay_every compares bits of one rank's gradients: it needs train.engine = torch and"
            " train.deterministic = true"
        )
    if config.train.engine == "torch":
        if parallel.zero:
            found.append(f"parallel.zero = {parallel.zero} needs train.engine = deepspeed")
        if parallel.offload != "none":
            found.append(f"parallel.offload = {parallel.offload} needs train.engine = deepspeed")
        if config.deepspeed:
            found.append("deepspeed: these keys need train.engine = deepspeed")
    elif parallel.reduce_dtype != "fp32":
        found.append(
            f"parallel.reduce_dtype = {parallel.reduce_dtype} needs train.engine = torch (DeepSpeed's own key"
            " is deepspeed.communication_data_type)"
        )
    elif parallel.offload == "optimizer" and parallel.zero == 0:
        found.append("parallel.offload = optimizer needs parallel.zero of 1 or more")
    elif parallel.offload == "all" and parallel.zero != 3:
        found.append("parallel.offload = all needs parallel.zero = 3")
    return found


def config_warnings(config: Config) -> list[str]:
    """Return the settings that have no effect here, or another one than they say, one line each."""
    model, masking, found = config.model, config.masking, []
    late, decoder = model.mask_from > 0, model.decoder_layers > 0
    inside = 0 < model.mask_from < model.num_layers
    for section, name, used, why in (
        ("model", "join", inside, "the [MASK]s join before the first layer or after the last"),
        ("model", "decoder", decoder, "there is no decoder"),
        ("model", "decoder_positions", decoder and model.block != "modern", "no learned decoder positions"),
        ("model", "mask_vector", late, "the [MASK]s are ordinary tokens when mask_from = 0"),
        ("model", "mask_leak", late, "the encoder sees all [MASK]s when mask_from = 0"),
        ("model", "rope_theta", model.block == "modern", "only the modern block rotates"),
        ("model", "global_every", model.local_window, "model.local_window is 0"),
        ("model", "local_rope_theta", model.local_window, "model.local_window is 0"),
        ("optimizer", "muon_lr_scale", config.optimizer.kind == "muon", "optimizer.kind is not muon"),
        ("masking", "span_stop", masking.scheme == "span", "masking.scheme is not span"),
        ("masking", "span_max", masking.scheme == "span", "masking.scheme is not span"),
        ("masking", "views_mode", masking.views > 1, "masking.views is 1"),
        ("masking", "views_partition", masking.views > 1, "masking.views is 1"),
    ):
        default = SECTIONS[section].model_fields[name].default
        if not used and getattr(getattr(config, section), name) != default:
            found.append(f"{section}.{name} has no effect: {why}")
    if masking.rate * masking.views > 1 and masking.views_partition != "counts":
        found.append(
            f"masking.rate = {masking.rate:g} is {1 / masking.views:.3g} here: masking.views ="
            f" {masking.views} masks of a text have no token in common"
        )
    if config.train.compile == "reduce-overhead" and not replays_graphs(config):
        found.append(
            "train.compile = reduce-overhead is default here: CUDA graphs need train.engine = torch,"
            " parallel.tensor = 1 and train.recompute = none"
        )
    return found
