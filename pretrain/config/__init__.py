"""A run's options: what they mean (`options`), how they are read (`load`), what contradicts (`checks`)."""

from pretrain.config.checks import config_warnings
from pretrain.config.load import (
    FREE_TO_CHANGE,
    build_config,
    changed_keys,
    dump_config,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
)
from pretrain.config.options import (
    BUDGET_UNITS,
    SECTIONS,
    BranchOptions,
    BudgetOptions,
    CheckpointOptions,
    Config,
    CorpusOptions,
    EvaluateOptions,
    MaskingOptions,
    ModelOptions,
    MonitorOptions,
    OptimizerOptions,
    ParallelOptions,
    PhaseOptions,
    RunOptions,
    ScheduleOptions,
    Section,
    TrainOptions,
    method_of,
    phase_configs,
    replays_graphs,
)
