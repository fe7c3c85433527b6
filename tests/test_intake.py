"A table may come in any form: what is read is the plain table, to the last bit, or one line says why not."
import datetime
import gzip
import tempfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atft.core import AtftError
from atft.intake import Reading, take
from atft.predictions import load_predictions

NUMBERS = ('close', 'volume')
KEYS = ['code', 'date']
CODES = ('0050', '7203', '0001', '9984')
DAY = datetime.date(2024, 1, 2)


# The plain table, and what may be done to it --------------------------------------------------

@st.composite
def plain_tables(draw):
    "Rows of some codes on some days; numbers that every type can hold, some unknown"
    days = draw(st.lists(st.integers(0, 700), min_size=1, max_size=5, unique=True))
    codes = draw(st.lists(st.sampled_from(CODES), min_size=1, max_size=3, unique=True))
    rows = [(DAY+datetime.timedelta(days=day), code) for day in days for code in codes]
    quarters = st.none() | st.integers(-4000, 4000)
    closes = draw(st.lists(quarters, min_size=len(rows), max_size=len(rows)))
    volumes = draw(st.lists(st.none() | st.integers(0, 10**6), min_size=len(rows), max_size=len(rows)))
    table = pl.DataFrame(rows, schema=dict(date=pl.Date, code=pl.String), orient='row')
    close = pl.Series([None if q is None else q/4 for q in closes], dtype=pl.Float64)
    volume = pl.Series(volumes, dtype=pl.Float64)
    sector = pl.Series([f'sector {code[-1]}' for _, code in rows])
    return table.with_columns(close=close, volume=volume, sector=sector)


DATES = pl.col('date')
STAMP = DATES.cast(pl.Datetime('us'))


def stamps(zone, hour=0):
    return (STAMP+pl.duration(hours=hour)).dt.replace_time_zone(zone)


DATE_FORMS = { # how days may be written, and what must be told of it
    'date': (DATES, {}),
    'naive ms': (DATES.cast(pl.Datetime('ms')), {}),
    'naive ns': (DATES.cast(pl.Datetime('ns')), {}),
    'naive, at its close': (STAMP+pl.duration(hours=14), dict(zone='Asia/Tokyo')),
    'Tokyo': (stamps('Asia/Tokyo'), {}),
    'Tokyo at nine': (stamps('Asia/Tokyo', 9), dict(zone='Asia/Tokyo')),
    'New York': (stamps('America/New_York'), {}),
    'Berlin, told': (stamps('Europe/Berlin'), dict(zone='Europe/Berlin')),
    'UTC': (stamps('UTC'), {}),
    'Tokyo in UTC': (stamps('Asia/Tokyo').dt.convert_time_zone('UTC'), dict(zone='Asia/Tokyo')),
    'ISO': (DATES.dt.strftime('%Y-%m-%d'), {}),
    'ISO midnight': (DATES.dt.strftime('%Y-%m-%d 00:00:00'), {}),
    'ISO midnight of New York': (DATES.dt.strftime('%Y-%m-%d 00:00:00-05:00'), {}),
    'ISO in UTC': (DATES.dt.strftime('%Y-%m-%dT01:30:00Z'), dict(zone='Asia/Tokyo')),
    'compact': (DATES.dt.strftime('%Y%m%d'), dict(dates='%Y%m%d')),
    'German': (DATES.dt.strftime('%d.%m.%Y'), dict(dates='%d.%m.%Y')),
    'with a time': (DATES.dt.strftime('%Y/%m/%d 00:00'), dict(dates='%Y/%m/%d %H:%M')),
    'number': (DATES.dt.strftime('%Y%m%d').cast(pl.Int32), dict(dates='%Y%m%d')),
    'float': (DATES.dt.strftime('%Y%m%d').cast(pl.Float64), dict(dates='%Y%m%d')),
    's': (STAMP.dt.epoch('s'), dict(dates='s')),
    'ms': (STAMP.dt.epoch('ms'), dict(dates='ms')),
    'ns': (STAMP.dt.epoch('ns'), dict(dates='ns')),
    'seconds of Tokyo': (stamps('Asia/Tokyo').dt.epoch('s'), dict(dates='s', zone='Asia/Tokyo'))}
CODE = pl.col('code')
CODE_FORMS = {
    'string': (CODE, {}),
    'categorical': (CODE.cast(pl.Categorical), {}),
    'enum': (CODE.cast(pl.Enum(CODES)), {}),
    'blanks': (pl.format(' {} ', CODE), {}),
    'number': (CODE.cast(pl.Int64), dict(codes=4)),
    'small number': (CODE.cast(pl.UInt16), dict(codes=4)),
    'text of a number': (CODE.cast(pl.Int64).cast(pl.String), dict(codes=4))}
NUMBER_FORMS = {
    'close': (pl.Float64, pl.Float32, pl.Decimal(18, 4), pl.String),
    'volume': (pl.Float64, pl.Int64, pl.UInt32, pl.Decimal(18, 0), pl.String)}
THEIRS = dict(date='Trade Date', code='Ticker', close='PX_LAST', volume='Vol.')


@st.composite
def written(draw, dates=tuple(DATE_FORMS), codes=tuple(CODE_FORMS)):
    "How columns are written: expressions, and what is told"
    date, told_date = DATE_FORMS[draw(st.sampled_from(dates))]
    code, told_code = CODE_FORMS[draw(st.sampled_from(codes))]
    numbers = [pl.col(c).cast(draw(st.sampled_from(kinds))) for c, kinds in NUMBER_FORMS.items()]
    theirs = draw(st.sampled_from([{}, THEIRS]))
    told = told_date | told_code
    if theirs: told = told | dict(columns={theirs: ours for ours, theirs in THEIRS.items()})
    return [date.alias('date'), code.alias('code'), *numbers, 'sector'], theirs, told


def plain_of(taken):
    return taken.table.collect().sort(KEYS)


def check(source, told, plain, keep=('sector',)):
    found = plain_of(take(source, NUMBERS, Reading(**told), keep=keep))
    assert found.equals(plain.select(found.columns).sort(KEYS)), (found, plain)


def large(table):
    "As arrow has it from others: large strings and dictionaries"
    arrow = table.to_arrow()
    for at, field in enumerate(arrow.schema):
        if pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type):
            kind = pa.large_string() if at % 2 else pa.string()
            arrow = arrow.set_column(at, field.name, arrow[field.name].cast(kind).dictionary_encode())
    return arrow


def indexed(table):
    "As pandas has it after a group: days and codes in the index"
    frame = table.to_pandas()
    return frame.set_index(list(frame.columns[:2]))


IN_MEMORY = (lambda t: t, lambda t: t.lazy(), lambda t: t.to_arrow(), large, lambda t: t.to_pandas(),
             indexed)


def save_csv_gz(table, path):
    path.write_bytes(gzip.compress(table.write_csv().encode()))


def save_stream(table, path):
    arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
    with pa.ipc.new_stream(str(path), arrow.schema) as writer:
        writer.write_table(arrow)


SAVED = { # how a file's name ends -> how it is written
    '.parquet': lambda t, path: t.write_parquet(path), '.csv': lambda t, path: t.write_csv(path),
    '.csv.gz': save_csv_gz, '.arrow': lambda t, path: t.write_ipc(path), '.feather': save_stream}
EASY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@EASY
@given(plain_tables(), written(), st.sampled_from(IN_MEMORY), st.randoms())
def test_a_table_in_memory_is_the_plain_one(plain, how, form, random):
    expressions, theirs, told = how
    rows = list(range(len(plain)))
    random.shuffle(rows)
    check(form(plain[rows].select(expressions).rename(theirs)), told, plain)


CSV_DATES = tuple(name for name in DATE_FORMS if name != 'float')


@EASY
@given(plain_tables(), written(CSV_DATES), st.sampled_from(list(SAVED)), st.integers(1, 3), st.data())
def test_files_are_the_plain_table(plain, how, ending, count, data):
    "In any number of files with odd names, some in folders, each with types of its own"
    expressions, theirs, told = how
    with tempfile.TemporaryDirectory(prefix='of [odd] *') as folder:
        for i in range(count):
            part = plain[i::count]
            if not len(part): continue
            within = Path(folder, data.draw(st.sampled_from(['.', 'b [1]', 'year=2024/month=1'])))
            within.mkdir(parents=True, exist_ok=True)
            kinds = [data.draw(st.sampled_from(NUMBER_FORMS[c])) for c in NUMBERS]
            mine = [pl.col(c).cast(kind) for c, kind in zip(NUMBERS, kinds)]
            made = part.select(*expressions[:2], *mine, 'sector').rename(theirs)
            SAVED[ending](made, within/f'{data.draw(st.sampled_from("ab[?*"))}{i}{ending}')
        Path(folder, f'._a{ending}').write_bytes(b'left by a Mac')
        check(folder, told, plain)
        taken = take(Path(folder), NUMBERS, Reading(**told))
        assert taken.counts['hidden files left out'] == 1 and len(taken.files) <= count


@EASY
@given(plain_tables(), st.sampled_from(list(SAVED)), st.booleans())
def test_a_file_for_each_ticker_is_named_by_it(plain, ending, as_folder):
    with tempfile.TemporaryDirectory() as folder:
        for (code,), part in plain.group_by('code'):
            path = Path(folder, f'symbol={code}/data{ending}' if as_folder else f'{code}{ending}')
            path.parent.mkdir(exist_ok=True)
            SAVED[ending](part.drop('code'), path)
        check(folder, {}, plain)
        counts = take(folder, NUMBERS).counts
        assert ('codes from file names' in counts) != as_folder


@EASY
@given(plain_tables(), st.sampled_from(['polars', 'pandas', 'csv', 'fields first', 'codes first']))
def test_a_matrix_is_the_plain_table(plain, form):
    "Of one column, or of several as downloads have it"
    known = plain.filter(pl.col('close').is_not_null())
    if not len(known): return
    matrix = known.pivot('code', index='date', values='close')
    told = dict(wide='close')
    frame = plain.with_columns(STAMP).to_pandas()
    if form in ('fields first', 'codes first'):
        table = frame[['date', 'code', 'close', 'volume']].pivot(index='date', columns='code')
        table.columns = table.columns.set_names([None, None])
        if form == 'codes first': table = table.swaplevel(axis=1)
        found = plain_of(take(table, NUMBERS))
        known = plain.filter(pl.col('close').is_not_null() | pl.col('volume').is_not_null())
        assert found.equals(known.select(found.columns).sort(KEYS))
        return
    if form == 'pandas': matrix = matrix.with_columns(STAMP).to_pandas().set_index('date')
    with tempfile.TemporaryDirectory() as folder:
        if form == 'csv':
            matrix.write_csv(Path(folder, 'm.csv'))
            matrix = Path(folder, 'm.csv')
        taken = take(matrix, NUMBERS, Reading(**told))
        found = plain_of(taken)
    assert found.drop('volume').equals(known.select('date', 'code', 'close').sort(KEYS))
    assert found['volume'].null_count() == len(found)


@EASY
@given(plain_tables(), written(), st.sampled_from(IN_MEMORY))
def test_predictions_of_any_form_are_the_plain_ones(plain, how, form):
    expressions, theirs, told = how
    theirs = {c: t for c, t in theirs.items() if c in ('date', 'code')}
    if theirs: told = told | dict(columns={t: c for c, t in theirs.items()})
    plain = plain.rename(dict(close='prediction', volume='target')).with_columns(horizon=5)
    made = plain.select(*expressions[:2], 'prediction', 'target', 'horizon', 'sector')
    found = load_predictions(form(made.rename(theirs)), Reading(**told))
    assert found.equals(load_predictions(plain).select(found.columns))
