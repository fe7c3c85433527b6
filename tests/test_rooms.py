"Who imports whom: the rooms of a later pillar know those of an earlier one, and never the other way round."
import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import atft

PACKAGE = Path(atft.__file__).parent
ROOMS = {path.stem: path.read_text() for path in PACKAGE.glob('[!_]*.py')}


def pillar(room):
    "The number of the notebook that a module is exported from"
    return int(re.search(r'File to edit: \.\./nbs/(\d+)', ROOMS[room])[1])


def named_by(statement):
    "The rooms that an import statement names"
    if isinstance(statement, ast.Import):
        paths = [name.name for name in statement.names]
    else:
        home = 'atft' if statement.level else None
        module = '.'.join(part for part in (home, statement.module) if part)
        paths = [module, *(f'{module}.{name.name}' for name in statement.names)]
    found = [re.fullmatch(r'atft\.(\w+)', path) for path in paths]
    return {match[1] for match in found if match} & set(ROOMS)


def imports(room, inside_functions):
    "The rooms that a module imports when it is loaded, or also later"
    tree = ast.parse(ROOMS[room])
    statements = ast.walk(tree) if inside_functions else tree.body
    found = [named_by(s) for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))]
    return set().union(*found)


def test_every_room_has_a_notebook_with_a_number():
    assert len(ROOMS) > 20
    for room in ROOMS:
        assert 0 <= pillar(room) <= 9, room


@pytest.mark.parametrize('room', sorted(ROOMS))
def test_a_room_imports_nothing_of_a_later_pillar(room):
    known = imports(room, inside_functions=True)
    assert not {other for other in known if pillar(other) > pillar(room)}


def test_no_room_is_needed_to_load_itself():
    graph = {room: imports(room, inside_functions=False) for room in ROOMS}
    assert 'core' in graph['judge'] and 'predictions' in graph['judge']
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def written(text):
    "Lines of a module that somebody wrote: no blank ones, no marks of the export"
    lines = [line for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith('# %%')]


@pytest.mark.parametrize('room', sorted(set(ROOMS)-{'data'}))
def test_a_room_is_small_enough_to_be_read(room):
    "The stream alone may be longer"
    assert len(written(ROOMS[room])) <= 400


FORBIDDEN = ('atft.network', 'atft.kernels', 'atft.graph', 'torch_geometric', 'numba')

JUDGING = '''
import atft.judge, atft.backtest, atft.predictions
atft.predictions.load_predictions(path)
atft.judge.evaluate(path, draws=20)
atft.judge.compare(path, path)
atft.backtest.performance(atft.backtest.backtest(path), draws=20)
'''


def loaded_by(code, path):
    "Which of `FORBIDDEN` a fresh process has loaded after some code"
    asked = f'import sys\npath = {str(path)!r}\n{code}\n'
    asked += f'print([name for name in {FORBIDDEN} if name in sys.modules])'
    return subprocess.check_output([sys.executable, '-c', asked], text=True).strip()


@pytest.fixture
def predictions(tmp_path):
    rng = np.random.default_rng(0)
    days = np.datetime64('2024-01-01')+np.arange(60)
    codes = pl.DataFrame(dict(code=list('ABCDEFGHIJ')))
    rows = pl.DataFrame(dict(date=days)).join(codes, how='cross')
    numbers = rng.normal(size=(2, len(rows)))
    rows = rows.with_columns(horizon=1, prediction=numbers[0], target=.01*numbers[1])
    rows.write_parquet(tmp_path/'predictions.parquet')
    return tmp_path/'predictions.parquet'


def test_who_judges_a_table_loads_neither_the_network_nor_numba(predictions):
    assert loaded_by(JUDGING, predictions) == '[]'


def test_baselines_wait_with_what_they_may_not_need(predictions):
    assert loaded_by('import atft.baselines', predictions) == '[]'


def test_the_report_loads_neither_the_network_nor_numba(predictions):
    assert loaded_by('import atft.eval', predictions) == '[]'
