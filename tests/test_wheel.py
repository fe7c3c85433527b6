"The built wheel, installed into a folder of its own and used where no repository is"
import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import ROOT

from atft.data import DayBatch
from atft.panel import Panel
from atft.trading import Trading

SCRIPTS = ('atft_phases', 'atft_predict', 'atft_bars', 'atft_folds')
MODULES = ('phases', 'predict', 'bars', 'folds')

OUTSIDE = '''
from pathlib import Path
import atft
from atft.core import AtftError
from atft.panel import Panel
from atft.project import assert_exported, project_root
from atft.reports import git_commit

print(Path(atft.__file__).parent)
print(project_root())
print(git_commit())
print(issubclass(AtftError, Exception))
assert_exported()
panel = Panel('panel')
print(len(panel.codes), len(panel.dates), panel.num_rows)
'''


def settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def run(*command, folder, env=None):
    "Run a command in a folder; what it printed"
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built of a source distribution that is built of a copy: nothing is left in the repository"
    source = tmp_path_factory.mktemp('source')
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith('.'): shutil.copy(path, source)
    shutil.copytree(ROOT/'atft', source/'atft', ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', 'dist', folder=source)
    (built,) = (source/'dist').glob('*.whl')
    return built


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp('installed')
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--disable-pip-version-check']
    run(*pip, '--no-index', '--no-deps', '--target', target, wheel, folder=target)
    return target


@pytest.fixture(scope='module')
def outside(tmp_path_factory):
    "An empty folder; none above it belongs to a project"
    folder = tmp_path_factory.mktemp('outside')
    assert not any((above/'settings.ini').exists() for above in folder.parents)
    return folder


@pytest.fixture(scope='module')
def env(installed):
    "The installed package comes first; the other packages are those of the tests"
    return os.environ | dict(PYTHONPATH=str(installed))


def test_the_wheel_holds_the_package_its_stubs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if '.dist-info/' not in name}
    here = {f'atft/{path.name}' for path in (ROOT/'atft').glob('*.py')}
    stubs = {name for name in packed if name.endswith('.pyi')}
    assert packed-stubs == here | {'atft/py.typed'}
    assert {'atft/panel.pyi', 'atft/trading.pyi'} <= stubs <= {f'{name}i' for name in here}


def methods(text, kind):
    "The names of the methods that stand in a class"
    (found,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == kind]
    return {node.name for node in found.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize('module, kind', [('panel', Panel), ('trading', Trading), ('data', DayBatch)])
def test_a_stub_has_the_methods_that_a_class_was_given_later(module, kind, wheel):
    text = zipfile.ZipFile(wheel).read(f'atft/{module}.pyi').decode()
    given = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    there = methods((ROOT/f'atft/{module}.py').read_text(), kind.__name__)
    late = {name for name in given-there if not name.startswith('__')}
    assert late and late <= methods(text, kind.__name__)


def test_the_wheel_says_what_settings_say(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith('dist-info/METADATA')]
        text = archive.read(metadata).decode()
    told = settings()
    assert f'\nVersion: {told["version"]}\n' in text
    assert f'\nRequires-Python: >={told["min_python"]}\n' in text
    needed = re.findall(r'^Requires-Dist: ([\w-]+)(?:(?!extra ==).)*$', text, re.M)
    wanted = [re.match(r'[\w-]+', word)[0] for word in told['requirements'].split()]
    assert sorted(needed) == sorted(wanted)


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_command_says_what_it_takes_outside_the_repository(name, installed, outside, env):
    assert '--help' in run(installed/'bin'/name, '--help', folder=outside, env=env)


@pytest.mark.parametrize('name', MODULES)
def test_a_module_says_what_it_takes_outside_the_repository(name, outside, env):
    said = run(sys.executable, '-m', f'atft.{name}', '--help', folder=outside, env=env)
    assert '--help' in said


def write_bars(path):
    "Six codes by 80 sessions of a random walk"
    rng = np.random.default_rng(0)
    days = np.datetime64('2024-01-01')+np.arange(80)
    table = pl.DataFrame(dict(code=list('ABCDEF'))).join(pl.DataFrame(dict(date=days)), how='cross')
    close = 100*np.exp(np.cumsum(.01*rng.normal(size=(6, 80)), axis=1)).ravel()
    prices = dict(open=close, high=1.01*close, low=.99*close, close=close, volume=1e5)
    table.with_columns(**{name: pl.lit(value) for name, value in prices.items()}).write_csv(path)


def test_bars_become_a_panel_outside_the_repository(installed, outside, env):
    write_bars(outside/'bars.csv')
    run(installed/'bin/atft_bars', 'bars.csv', '--out', 'panel', folder=outside, env=env)
    said = run(sys.executable, '-c', OUTSIDE, folder=outside, env=env).splitlines()
    assert Path(said[0]) == installed/'atft'  # and not the repository's
    assert Path(said[1]) == outside
    assert said[2:4] == ['unknown', 'True']
    codes, days, rows = map(int, said[4].split())
    assert (codes, rows) == (6, 6*days) and days > 0
