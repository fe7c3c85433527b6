"A table may come in any form: what is read is the plain table, to the last bit, or one line says why not."
import datetime
import gzip
import tempfile
from pathlib import Path

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
EASY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


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


def test_a_download_that_was_saved_is_the_download(tmp_path):
    "pandas saves columns in two levels as three rows of names"
    frame = pl.DataFrame(dict(
        date=[DAY, DAY, DAY+datetime.timedelta(days=1)], code=['AAPL', '0050', 'AAPL'],
        close=[1.5, 2., 3.], volume=[7., None, 9.])).with_columns(STAMP)
    wide = frame.to_pandas().rename(columns=dict(close='Close', volume='Volume'))
    wide = wide.pivot(index='date', columns='code').rename_axis('Date').sort_index(axis=1)
    wide.columns.names = ['Price', 'Ticker']
    told = Reading(columns='Date=date,Close=close,Volume=volume')
    expected = frame.with_columns(pl.col('date').dt.date()).sort(KEYS)
    for saved in (wide, wide.swaplevel(axis=1)):
        saved.to_csv(tmp_path/'download.csv')
        assert plain_of(take(saved, NUMBERS, told)).equals(expected)
        taken = take(tmp_path/'download.csv', NUMBERS, told)
        assert plain_of(taken).equals(expected)
        assert taken.counts == {'empty cells of the wide matrix': 1}


# What cannot be read right is refused in one line ---------------------------------------------

PLAIN = pl.DataFrame(dict(
    date=[DAY, DAY+datetime.timedelta(days=1)]*2, code=['0050', '0050', '7203', '7203'],
    close=[1., 2., 3., 4.]))


def with_column(**columns):
    "The plain table with a column that says something else"
    return PLAIN.with_columns(**{c: value if isinstance(value, pl.Expr) else pl.lit(value)
                                 for c, value in columns.items()})


STAMPED = datetime.datetime(2024, 1, 1, 15)
FRAME = PLAIN.to_pandas()
TOKYO_NINE = pl.lit(STAMPED).dt.replace_time_zone('UTC')
MATRIX = FRAME.assign(code=[50, 50, 7203, 7203]).pivot(index='date', columns='code', values='close')
OFFSETS = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (-5, -4)]
REFUSED = { # what a table has: the table, what is told, what the line says
    'a code of 50.0': (with_column(code=50.), {}, "column 'code' is Float64, found 50.0"),
    'a code of 50.0 in text': (with_column(code='50.0'), {}, 'a number with decimals'),
    'codes as numbers': (with_column(code=50), {}, '--codes 4'),
    'codes too wide': (with_column(code=123456), dict(codes=4), 'at most 4 digits'),
    'negative codes': (with_column(code=-5), dict(codes=4), 'at most 4 digits'),
    'codes of two types': (FRAME.assign(code=[50, 50, '7203', '7203']), {}, '2 types, int and str'),
    'hours': (with_column(date=STAMPED), {}, 'tell whose day it is: zone=Asia/Tokyo'),
    'hours in UTC': (with_column(date=TOKYO_NINE), {}, 'tell whose day it is'),
    'naive midnights of Tokyo in UTC': (with_column(date=STAMPED), dict(zone='Asia/Tokyo'), 'give them UTC'),
    'a zone of yesterday': (with_column(date=TOKYO_NINE.dt.offset_by('9h')),
                            dict(zone='America/New_York'), 'would make them the day before'),
    'hours of a zone': (pl.concat([with_column(date=TOKYO_NINE.dt.offset_by(h)) for h in ('0h', '1h')]),
                        dict(zone='Asia/Tokyo'), 'make daily rows of hours'),
    'stamps of two zones': (FRAME.assign(date=[STAMPED.replace(tzinfo=OFFSETS[i%2]) for i in range(4)]),
                            {}, 'stamps of several zones'),
    'a date and a stamp': (FRAME.assign(date=[DAY, STAMPED]*2), {}, '2 types, date and datetime'),
    'compact dates': (with_column(date='20240102'), {}, '--dates %Y%m%d'),
    'American dates': (with_column(date='01/02/2024'), {}, "found '01/02/2024'"),
    'a day that is none': (with_column(date='2024-02-30'), {}, "found '2024-02-30'"),
    'dates of another form': (with_column(date='2024-01-02'), dict(dates='%Y%m%d'), 'that was told'),
    'dates as numbers': (with_column(date=20240102), {}, 'wanted a Date'),
    'epoch of another unit': (with_column(date=1704153600000), dict(dates='s'), 'is another unit'),
    'a time of the day': (with_column(date=datetime.time(9)), {}, 'wanted a Date'),
    'prices with commas': (with_column(close='1,234.50'), {}, "found '1,234.50' (4 rows), wanted a number"),
    'prices of true': (with_column(close=True), {}, "column 'close' is Boolean"),
    'prices of days': (with_column(close=DAY), {}, "column 'close' is Date"),
    'no close': (PLAIN.rename({'close': 'Close'}), {}, '--columns Close=close'),
    'names of theirs': (PLAIN.rename({'date': 'Date', 'code': 'Symbol'}), {}, 'Symbol=code,Date=date'),
    'a map to nothing': (PLAIN, dict(columns='px=close'), "columns names 'px', which the table has not"),
    'a map onto another': (with_column(adj=1.), dict(columns='adj=close'), 'is there too'),
    'no code': (with_column(code=pl.when(pl.col('close') > 1).then('code')), {},
                '1 rows have no date or no code, the first is the table row 1'),
    'an empty code': (with_column(code=' '), {}, '4 rows have no date or no code'),
    'differing rows': (pl.concat([PLAIN, with_column(close=9.)]), {},
                       '7203 has more than one row on 2024-01-02'),
    'no rows': (PLAIN[:0], {}, 'no rows'),
    'a matrix of numbers': (MATRIX, dict(wide='close'), 'numbers for codes, 50'),
    'a matrix of another': (PLAIN.pivot('code', index='date', values='close'), dict(wide='open'),
                            'wide=open is none of'),
    'two columns of one name': (pd.concat([FRAME, FRAME[['close']]], axis=1), {},
                                "more than one column 'close'"),
    'an index beside its column': (FRAME.set_index('code', drop=False).assign(code='A'), {}, 'both named'),
    'no table': ({'close': [1.]}, {}, 'a dict is no table'),
    'no file': ('nowhere.parquet', {}, 'does not exist')}


def refusal(source, *args, **kwargs):
    "The one line in which a table is refused"
    with pytest.raises(AtftError) as caught:
        take(source, *args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_read_right_is_refused_in_one_line(what):
    source, told, says = REFUSED[what]
    assert says in refusal(source, ('close',), Reading(**told))


SPOILT = { # what lies among good files: its name, its bytes, what the line says
    'empty': ('b.parquet', b'', 'is an empty file'),
    'cut off': ('b.parquet', b'PAR1', 'is cut off or not Parquet'),
    'no Parquet': ('b.parquet', bytes(100), 'is cut off or not Parquet'),
    'two kinds': ('b.csv', b'date,code,close\n', 'two kinds of tables, a.parquet and b.csv')}
SPOILT_TEXT = {
    'empty': ('b.csv', b'', 'is an empty file'),
    'a row too long': ('b.csv', b'date,code,close\n2024-01-02,A,1,2\n', 'found more fields'),
    'a row cut off': (
        'b.csv', b'date,code,close\n2024-01-02,A,1\n2024-01-03,00', 'its last row is short'),
    'a name twice': ('b.csv', b'date,code,close,close\n', "more than one column 'close'"),
    'not UTF-8': ('b.csv', b'date,code,close\n2024-01-02,\x83,1\n', 'invalid utf-8'),
    'Shift-JIS': ('b.csv', 'date,code,close\n2024-01-02,東証,1\n'.encode('shift-jis'), 'in UTF-8'),
    'UTF-16': ('b.csv', 'date,code,close\n2024-01-02,A,1\n'.encode('utf-16'), 'in UTF-8'),
    'another separator': (
        'b.csv', b'date;code;close\n2024-01-02;A;1\n',
        "has one column 'date;code;close'; write it with commas"),
    'cut off and packed': (
        'b.csv.gz', gzip.compress(b'date,code,close\n2024-01-02,A,1\n'*99)[:-9], 'is cut off or not CSV')}


@pytest.mark.parametrize('what', SPOILT)
def test_a_spoilt_file_is_named(tmp_path, what):
    name, content, says = SPOILT[what]
    PLAIN.write_parquet(tmp_path/'a.parquet')
    (tmp_path/name).write_bytes(content)
    line = refusal(tmp_path, ('close',))
    assert says in line and (name in line)


@pytest.mark.parametrize('what', SPOILT_TEXT)
def test_a_spoilt_text_file_is_named(tmp_path, what):
    name, content, says = SPOILT_TEXT[what]
    PLAIN.write_csv(tmp_path/'a.csv')
    (tmp_path/name).write_bytes(content)
    line = refusal(tmp_path, ('close',))
    assert says in line and (name in line)


def test_a_column_missing_in_one_file_names_the_file(tmp_path):
    PLAIN[:2].write_parquet(tmp_path/'a.parquet')
    PLAIN[2:].rename({'close': 'Close'}).write_parquet(tmp_path/'b.parquet')
    line = refusal(tmp_path, ('close',))
    assert 'b.parquet' in line and 'Close=close' in line


def test_codes_are_no_file_names_where_a_column_looks_like_codes(tmp_path):
    PLAIN.rename({'code': 'Ticker'}).write_parquet(tmp_path/'2024.parquet')
    assert 'Ticker=code' in refusal(tmp_path, ('close',))


def test_a_further_column_in_one_file_is_no_matter(tmp_path):
    PLAIN[:2].write_parquet(tmp_path/'a.parquet')
    PLAIN[2:].with_columns(dividend=0.).write_parquet(tmp_path/'b.parquet')
    assert take(tmp_path, ('close',)).table.collect().equals(PLAIN)
    kept = take(tmp_path, ('close',), keep=('dividend',), optional=('dividend',)).table.collect()
    assert kept['dividend'].to_list() == [None, None, 0., 0.]


def test_what_is_dropped_is_counted_and_shown():
    nameless = with_column(code=pl.when(pl.col('close') > 1).then('code'))
    taken = take(pl.concat([PLAIN, nameless, PLAIN]), ('close',), drop_nameless=True)
    assert taken.table.collect().sort('code', 'date').equals(PLAIN)
    assert taken.counts == {'rows without date or code': 1, 'identical duplicate rows': 7}
    assert taken.examples == {'rows without date or code': ['the table row 5']}


READINGS = st.fixed_dictionaries(dict(
    columns=st.none() | st.dictionaries(st.sampled_from(['Date', 'px last', 'a=b', 'é']),
                                        st.just('close'), max_size=1),
    dates=st.sampled_from([None, '%Y%m%d', 's', 'ns']), zone=st.sampled_from([None, 'Asia/Tokyo', 'UTC']),
    codes=st.none() | st.integers(1, 9), wide=st.sampled_from([None, 'close'])))


@given(READINGS)
def test_a_reading_is_told_by_texts(fields):
    reading = Reading(**fields)
    assert reading.names == (fields['columns'] or {})
    assert Reading(**fields | dict(columns=reading.columns)) == reading
