"""Budgets: what they let in, which phase they are in, and what another recipe would have cost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pretrain.account import budget, ledger
from pretrain.account.budget import Course
from pretrain.account.ledger_writer import Ledger
from pretrain.account.recipe import make_recipe
from pretrain.config import BUDGET_UNITS, build_config, load_config
from pretrain.errors import UserError
from tests.account.test_ledger import Clock, opened

TREE = {
    "run": {"dir": "run"},
    "corpus": {"train": "train"},
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "vocab_size": 400},
    "train": {"seq_length": 24, "batch_size": 8},
    "budget": {"steps": 7},
}


def recipe(**sections):
    return build_config({**TREE, **{name: {**TREE.get(name, {}), **keys} for name, keys in sections.items()}})


def with_budget(unit, amount, **sections):
    return recipe(budget={"steps": None, unit: amount}, **sections)


def spend(config, account, clock, seconds=2.0):
    """Takes every update that the budget allows; returns (phase, progress before it) of each."""
    limit, made = make_recipe(config).budget, []
    while limit.allows_step(totals := account.totals(), account.step_hours):
        phase = limit.phase(totals)
        made.append((phase, limit.progress(totals)))
        clock.now += seconds
        account.step(limit.costs[phase])
    return made


def begun(run: Path, clock: Clock, step=0, head="") -> Ledger:
    account = opened(run, clock)
    account.begin(step, head)
    return account


# ---- the stop ------------------------------------------------------------------------------------


ONE = make_recipe(recipe()).phases[0].cost
EACH = {unit: budget.price(ONE, unit) for unit in BUDGET_UNITS[:5]}


@pytest.mark.parametrize("unit", EACH)
@pytest.mark.parametrize("updates", [7, 7.99])
def test_a_step_that_would_exceed_the_budget_is_not_taken(tmp_path, unit, updates):
    amount = int(updates * EACH[unit]) if unit != "token_layers" else updates * EACH[unit]
    config, clock = with_budget(unit, amount), Clock()
    account = begun(tmp_path, clock)
    made = spend(config, account, clock)
    assert [share for _, share in made] == pytest.approx(
        [n * EACH[unit] / amount for n in range(7)], rel=1e-9
    )
    assert make_recipe(config).budget.updates() == [7]
    assert budget.spent(account.totals(), unit) == pytest.approx(7 * EACH[unit], rel=1e-12)


@pytest.mark.parametrize(("hours", "updates"), [(14.1, 7), (15.9, 7)])
def test_hours_hold_back_the_next_step(tmp_path, hours, updates):
    clock = Clock()
    account = begun(tmp_path, clock)
    config = with_budget("device_hours", 2 * hours / 3600)  # 2 ranks, 2 s a step
    assert len(spend(config, account, clock)) == updates
    assert make_recipe(config).budget.spent(account.totals()) <= 2 * hours / 3600
    with pytest.raises(UserError, match="known only once it has run"):
        make_recipe(config).budget.updates()


@pytest.mark.parametrize("unit", ["steps", "tokens", "flops"])
def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path, unit):
    config, clock = with_budget(unit, 9 * EACH[unit]), Clock()
    account = begun(tmp_path, clock)
    clock.work(account, 0)
    for _ in range(4):
        account.step(ONE)
    head = account.save()
    for _ in range(3):
        account.step(ONE)
    again = begun(tmp_path, clock, 4, head)
    assert make_recipe(config).budget.progress(again.totals()) == 4 / 9
    assert len(spend(config, again, clock)) == 5


def test_device_hours_charge_lost_work_and_restarts(tmp_path):
    config, clock = with_budget("device_hours", 1.0), Clock()
    limit = make_recipe(config).budget
    account = begun(tmp_path, clock)
    head = account.save()
    clock.work(account, 1, 900)
    assert limit.progress(account.totals()) == 0.5
    again = opened(tmp_path, clock)
    clock.now += 360
    again.begin(0, head)
    assert limit.progress(again.totals()) == limit.spent(again.totals()) == 0.7
    clock.work(again, 1, 300)
    assert not limit.allows_step(again.totals(), again.step_hours)  # 300 s of 2 ranks are more than is left


def test_hours_of_another_number_of_ranks_are_counted_by_theirs(tmp_path):
    """Half of the budget on two ranks, the rest on eight: progress goes on from where it was."""
    config, clock = with_budget("device_hours", 1.0), Clock()
    account = begun(tmp_path, clock)
    clock.work(account, 9, 100)
    assert make_recipe(config).budget.progress(account.totals()) == 0.5
    head = account.save()
    wide = opened(tmp_path, clock, ranks=8)
    wide.begin(9, head)
    assert wide.step_hours == 2 * 100 / 3600  # of an update, whatever the number of ranks
    shares = [share for _, share in spend(config, wide, clock, 25)]
    assert shares == pytest.approx([0.5 + n * 8 * 25 / 3600 for n in range(9)])


def test_a_budget_of_energy_is_of_measured_joules(tmp_path):
    config, clock = with_budget("kwh", 0.001), Clock()
    account = begun(tmp_path, clock)
    assert make_recipe(config).budget.progress(account.totals()) == 0.0
    account.meter({"gpu": 1800.0})
    assert make_recipe(config).budget.progress(account.totals()) == 0.5
    assert make_recipe(config).budget.allows_step(account.totals(), 0.0005)
    assert not make_recipe(config).budget.allows_step(account.totals(), 0.00051)


def made_one_by_one(config):
    """Updates of each phase by the loop's own decisions, with costs added up as the ledger does."""
    limit = make_recipe(config).budget
    totals, made = ledger.total([]), [0] * len(limit.costs)
    while limit.allows_step(totals):
        phase = limit.phase(totals)
        made[phase] += 1
        totals = budget.charged(totals, limit.costs[phase])
    return made


@pytest.mark.parametrize("phases", [[], [{"until": 0.3, "seq_length": 12}, {"until": 0.5, "batch_size": 4}]])
@pytest.mark.parametrize("unit", ["token_layers", "flops"])
def test_all_of_another_recipe_is_as_many_updates(unit, phases):
    """Closed form and loop agree, and with fraction 1 they are those of the recipe itself."""
    for number in range(200):
        layers = 2 + number % 5
        model = {"num_layers": layers, "mask_from": layers, "decoder_layers": 1 + number % 3}
        model |= {"decoder": ("self", "cross", "query")[number % 3]}
        train, masking = {"phases": phases}, {"rate": 0.15 + number % 7 / 20}
        theirs = recipe(model=model, train=train, masking=masking, budget={"steps": 40 + 3 * number})
        amount = make_recipe(theirs).budget.planned(unit)
        config = with_budget(unit, amount, model=model, train=train, masking=masking)
        made = made_one_by_one(config)
        assert make_recipe(config).budget.updates() == made
        if not phases:
            assert made == [40 + 3 * number]


# ---- the course of a measured budget -------------------------------------------------------------


def follow(course, account, clock, updates, seconds=2.0):
    """Progress before each of so many updates, of which the first one compiles for a minute."""
    seen = []
    for number in range(updates):
        seen.append(course.follow(account.totals(), 0.01))
        clock.now += seconds + 60 * (number == 0)
        account.step(ONE, number == 0)
        if number == 0:
            course.pause()
    return seen


def test_hours_drive_the_schedule_from_the_first_update_to_the_last(tmp_path):
    """Neither start-up nor compilation is progress, of any attempt; what is held back is none to wait for."""
    config, clock = with_budget("device_hours", 1.0), Clock()
    account = opened(tmp_path, clock)
    clock.now += 500
    account.begin()
    course = Course(make_recipe(config).budget)
    first = follow(course, account, clock, 100)
    assert first[:2] == [0.0, 0.0] and first == sorted(first)
    left = 1.0 - 0.01 - 2 * 562 / 3600
    assert first[-1] == pytest.approx(98 * 4 / 3600 / left)
    carried = course.follow(account.totals(), 0.01)
    head = account.save()
    account.note("stop")

    again = opened(tmp_path, clock)
    clock.now += 200
    again.begin(100, head)
    course = Course(make_recipe(config).budget, carried)
    second = follow(course, again, clock, 2)
    assert (
        second == [carried, carried] and carried < make_recipe(config).budget.progress(again.totals()) - 0.1
    )
    while make_recipe(config).budget.allows_step(again.totals(), 4 / 3600 + 0.01):
        last, middle = course.follow(again.totals(), 0.01), course.middle(again.totals())
        clock.work(again, 1)
    assert 0.98 < last < middle < course.follow(again.totals(), 0.01) <= 1.0
    clock.now += 60
    assert course.follow(again.totals(), 0.01) == 1.0


def test_an_update_has_the_rate_of_its_middle(tmp_path):
    account = begun(tmp_path, Clock())
    course = Course(make_recipe(recipe()).budget)
    for number in range(7):
        assert course.follow(account.totals()) == pytest.approx(number / 7)
        assert course.middle(account.totals()) == pytest.approx((number + 0.5) / 7)
        account.step(ONE)
    course = Course(make_recipe(with_budget("device_hours", 9.0)).budget)
    assert course.follow(replace(account.totals(), steps=0)) == 0.0
    assert course.middle(replace(account.totals(), steps=0)) > 0.0


def test_progress_of_an_older_checkpoint_is_what_was_spent(tmp_path):
    clock = Clock()
    account = begun(tmp_path, clock)
    clock.work(account, 9, 100)
    assert Course(make_recipe(with_budget("device_hours", 1.0)).budget).follow(account.totals()) == 0.5


# ---- phases --------------------------------------------------------------------------------------

PHASES = [{"until": 0.3, "batch_size": 4, "seq_length": 12}, {"until": 0.71, "seq_length": 12}]


@pytest.mark.parametrize("unit", EACH)
@pytest.mark.parametrize("amount", [1.0, 3.7, 20.0, 61.3])
def test_updates_of_each_phase_are_known_before_and_right(tmp_path, unit, amount):
    total = int(amount * EACH[unit])
    config, clock = with_budget(unit, total, train={"phases": PHASES}), Clock()
    account = begun(tmp_path, clock)
    made = spend(config, account, clock)
    updates = make_recipe(config).budget.updates()
    assert updates == [sum(phase == n for phase, _ in made) for n in range(3)]
    assert [phase for phase, _ in made] == sorted(phase for phase, _ in made)
    for phase, share in made:
        assert [0.0, 0.3, 0.71][phase] <= share < [0.3, 0.71, 1.0][phase]
    costs = make_recipe(config).budget.costs
    assert [(cost.samples, cost.tokens_seen) for cost in costs] == [(4, 48), (8, 96), (8, 192)]
    for name in ("samples", "tokens_seen", "tokens_real", "tokens_predicted", "hardware_flops"):
        counted = sum(n * getattr(cost, name) for n, cost in zip(updates, costs, strict=True))
        assert getattr(account.totals(), name) == counted
    assert account.totals().flops["total"] == make_recipe(config).budget.planned("flops")
    last = costs[make_recipe(config).budget.phase(account.totals())]
    left = total - budget.spent(account.totals(), unit)
    assert 0 <= left < budget.price(last, unit)


@pytest.mark.parametrize(
    ("phases", "part"),
    [
        ([{"until": 0.5}, {"until": 0.5}], "train.phases: until = [0.5, 0.5]: each must be larger"),
        ([{"until": 1.5}], "train.phases.0.until = 1.5"),
        ([{"seq_length": 12}], "train.phases.0.until"),
        ([{"until": 0.5, "sequence": 3}], "unknown key train.phases.0.sequence; did you mean seq_length?"),
        (
            [{"until": 0.5, "seq_length": 999}],
            "train.phases.0: train.seq_length = 999 exceeds model.max_positions",
        ),
        ([{"until": 0.5, "batch_size": 3}], "train.batch_size = 3 is no multiple of train.micro_batch_size"),
    ],
)
def test_bad_phases_are_named(phases, part):
    with pytest.raises(UserError) as caught:
        recipe(train={"phases": phases, "micro_batch_size": 2})
    (line,) = str(caught.value).splitlines()
    assert part in line


# ---- a share of another recipe -------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """A file with the baseline: six layers, ten updates in two phases."""
    tree = {
        **TREE,
        "model": {**TREE["model"], "num_layers": 6, "vocab_size": None},
        "train": {**TREE["train"], "phases": [{"until": 0.5, "seq_length": 12}]},
        "budget": {"steps": 10},
    }
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def relative(reference, **keys):
    return recipe(budget={"steps": None, "relative_to": str(reference), **keys})


@pytest.mark.parametrize("measure", ["flops_with_head", "flops_without_head", "token_layers", "tokens"])
def test_a_share_of_another_recipe_is_spent(other, measure):
    config = make_recipe(relative(other, fraction=0.68, measure=measure)).config
    unit, amount = config.budget.amount
    theirs = load_config(other, ["model.vocab_size=400"])
    halves = [budget.price(phase.cost, unit) for phase in make_recipe(theirs).phases]
    assert unit == ("flops" if measure == "flops_with_head" else measure)
    assert amount == pytest.approx(0.68 * 5 * sum(halves), rel=1e-12)
    made = make_recipe(config).budget.planned(unit)
    assert amount - budget.price(make_recipe(config).phases[0].cost, unit) < made <= amount
    kept = build_config(json.loads(json.dumps(config.model_dump(mode="json"))))
    other.unlink()
    assert make_recipe(kept).config.budget == config.budget  # a resolved config stands alone


def test_a_share_of_what_a_run_has_spent(tmp_path):
    clock = Clock()
    account = begun(tmp_path, clock)
    clock.now += 1800
    account.meter({"gpu": 7.2e6})
    account.note("finish")
    for measure, amount in (("device_hours", 0.5), ("kwh", 1.0)):
        config = make_recipe(relative(tmp_path, fraction=0.5, measure=measure)).config
        assert config.budget.amount == (measure, amount)
    with pytest.raises(UserError, match="this run has spent nothing"):
        make_recipe(relative(tmp_path))


def test_a_run_that_still_spends_is_no_reference(tmp_path):
    account = begun(tmp_path, Clock())
    for event in ("heartbeat", "stop"):
        account.note(event)
        with pytest.raises(UserError, match="this run has not finished yet; wait for it, or name a config"):
            make_recipe(relative(tmp_path, measure="tokens"))


def test_energy_that_was_measured_in_part_is_no_reference(tmp_path):
    clock = Clock()
    account = begun(tmp_path, clock)
    account.meter({"gpu": 7.2e6})
    spend(recipe(), account, clock)
    account.note("finish")
    with pytest.raises(UserError, match="this run's energy was not all measured"):
        make_recipe(relative(tmp_path, measure="kwh"))


def test_what_is_not_known_before_a_run_is_refused(other):
    for measure in ("device_hours", "kwh"):
        with pytest.raises(UserError, match="not known before it has run; name the folder of a run of it"):
            make_recipe(relative(other, measure=measure))
    tree = yaml.safe_load(other.read_text())
    other.write_text(yaml.safe_dump({**tree, "budget": {"device_hours": 3}}))
    with pytest.raises(UserError, match="not known before it has run"):
        make_recipe(relative(other))
    assert make_recipe(relative(other, measure="device_hours")).config.budget.amount == ("device_hours", 3)
    other.write_text(yaml.safe_dump({**tree, "budget": {"relative_to": "x.yaml"}}))
    with pytest.raises(UserError, match="its own budget is relative too"):
        make_recipe(relative(other))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"steps": None}, "budget is missing; give one of steps, tokens, "),
        ({"tokens": 5.0}, "budget has 2 units (steps, tokens)"),
        ({"fraction": 0.5}, "budget.fraction needs budget.relative_to"),
        ({"measure": "kwh"}, "budget.measure needs budget.relative_to"),
        ({"relative_to": "a.yaml"}, "budget has relative_to and steps; keep one of them"),
    ],
)
def test_bad_budgets_are_named(keys, part):
    with pytest.raises(UserError) as caught:
        recipe(budget=keys)
    (line,) = str(caught.value).splitlines()
    assert part in line
