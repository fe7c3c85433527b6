"Rows of many days in a step: every row once, in an order that a seed gives, continued where it stopped."
from collections import Counter
from dataclasses import replace

import pytest
import torch

from atft.inference import setup
from atft.market import MarketSpec, embedded_panel
from atft.phases import PHASES
from atft.project import project_root
from atft.specs import RunSpec
from atft.trainer import Trainer

SMALL = dict(hidden=8, lookback=10, embargo=5, days_per_step=2, spread=3, seed=3)


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    market = embedded_panel(MarketSpec(codes=100, days=220, clusters=5), cache=project_root()/'runs/cache')
    return setup(RunSpec(run_dir=str(tmp_path_factory.mktemp('deal')/'run'), **SMALL), market)


def trainer_of(shared, phase=PHASES[0]):
    trainer = Trainer(shared, 0, phase, shared.network())
    trainer.history = [dict(score=0.)]
    trainer.partial = trainer.nothing_yet()
    return trainer


def rows_of(hand): return [(day.date, code) for day in hand for code in day.codes]


def test_every_row_is_taken_once_and_steps_are_as_many_as_of_whole_days(shared):
    trainer = trainer_of(shared)
    assert trainer.spread == 3
    passes = list(trainer.passes())
    assert [nth for nth, _ in passes] == list(range(trainer.steps_an_epoch))
    taken = Counter(row for _, hand in passes for row in rows_of(hand))
    whole = Counter(row for day in shared.days('train') for row in rows_of([day]))
    assert taken == whole


def test_steps_that_follow_each_other_take_other_days(shared):
    hands = [{day.date for day in hand} for _, hand in trainer_of(shared).passes()]
    assert {len(days) for days in hands} <= {5, 6}  # the last days are dealt to fewer passes
    assert all(not one & other for one, other in zip(hands, hands[1:]))


@pytest.mark.parametrize('behind', [1, 2, 5, 7])
def test_an_epoch_goes_on_in_the_middle_of_a_deal(shared, behind):
    whole = [(nth, rows_of(hand)) for nth, hand in trainer_of(shared).passes()]
    later = trainer_of(shared)
    later.partial['passes'] = behind
    assert [(nth, rows_of(hand)) for nth, hand in later.passes()] == whole[behind:]


def test_who_looks_at_neighbours_gets_whole_days(shared):
    trainer = trainer_of(shared, PHASES[1])
    assert trainer.spread == 1
    nth, hand = next(trainer.passes())
    whole = {day.date: len(day) for day in shared.days('train')}
    assert nth == 0 and len(hand) == 2
    assert all(len(day) == whole[day.date] for day in hand)


def test_a_deal_depends_on_seed_and_epoch(shared):
    def first(seed, trained):
        trainer = trainer_of(shared._replace(spec=replace(shared.spec, training=replace(
            shared.spec.training, seed=seed))))
        trainer.history *= trained+1
        return rows_of(next(trainer.passes())[1])
    assert first(3, 0) == first(3, 0)
    assert first(3, 0) != first(3, 1) and first(3, 0) != first(4, 0)


def test_few_codes_are_not_dealt_to_pieces(shared):
    wide = trainer_of(shared._replace(spec=replace(shared.spec, training=replace(
        shared.spec.training, spread=50))))
    assert wide.spread == 3  # a hundred codes, thirty or so a pass
    _, hand = next(wide.passes())
    assert all(len(day) >= 25 for day in hand)  # not every code is listed on every day


def test_a_frozen_group_does_not_move(shared):
    phase = replace(PHASES[1], rates=dict(encoder=0, graph=2.), epochs=1)
    trainer = trainer_of(shared, phase)
    before = {n: p.clone() for n, p in trainer.net.named_parameters()}
    trainer.history = []
    trainer.partial = None
    trainer.epoch()
    moved = {n for n, p in trainer.net.named_parameters() if not torch.equal(before[n], p)}
    assert not any(n.startswith(('lstm', 'select', 'feed')) for n in moved)
    assert any(n.startswith('graph') for n in moved) and any(n.startswith('heads') for n in moved)
