"""Near-duplicate texts by MinHash (Broder 1997) over word shingles, in SQL.

A text is the set of its runs of three words, in lower case. Hash i of a set is the least (a_i x + b_i) mod (2^31 - 1)
over its hashed shingles x: two sets agree in one with the probability of their Jaccard similarity J. In 16 bands of 4
hashes, two texts share a band with probability 1 - (1 - J^4)^16: 0.9998 at J = 0.8 (Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, 3.4). Each text is compared, exactly, with the first one of every band that it shares, so
that a thousand copies cost a thousand comparisons.
"""

from __future__ import annotations

import random

import pyarrow as pa

from accrual.lake import Lake

LEAST_SIMILARITY = 0.8
_WORDS = 3
_BANDS, _HASHES = 16, 4
_PRIME = 2**31 - 1

_SHINGLES = f"""
create or replace temp table shingles as
with texts as (
    select text, list_filter(regexp_split_to_array(lower(text), '[^\\pL\\pN]+'), lambda w: w <> '') as words
    from (select distinct {{column}} as text from kept where {{column}} is not null)
),
numbered as (
    select row_number() over (order by text) as id, text, list_distinct(list_transform(
        range(1, greatest(len(words) - {_WORDS - 1}, 1) + 1),
        lambda i: array_to_string(list_slice(words, i, i + {_WORDS - 1}), ' '))) as shingles
    from texts where len(words) > 0
)
from numbered
"""
_NEAR = f"""
create or replace temp table near as
with hashed as (
    select id, (md5_number_lower(shingle) % {_PRIME})::bigint as x
    from (select id, unnest(shingles) as shingle from shingles)
),
signatures as (
    select id, i // {_HASHES} as band, i, min((a * x + b) % {_PRIME}) as least
    from hashed cross join permutations group by all
),
bands as (select id, band, string_agg(least::varchar, ',' order by i) as key from signatures group by all),
pairs as (
    select distinct id, first from (
        select id, min(id) over (partition by band, key) as first from bands
    ) where id <> first
)
select a.text, b.text as like_text, len(list_intersect(a.shingles, b.shingles)) as shared,
    shared / (len(a.shingles) + len(b.shingles) - shared) as similarity
from pairs join shingles a using (id) join shingles b on b.id = first
where similarity >= {LEAST_SIMILARITY}
"""
SHARE = """
select 'near_duplicates' as metric, '' as field, '' as part,
    (select count(distinct text) from near) / count(*) as value
from shingles having count(*) > 0
"""


def find_near_duplicates(lake: Lake, column: str) -> None:
    """Make the temporary tables `shingles` (a distinct text each) and `near` (text, like_text, similarity)."""
    chance = random.Random(0)
    count = _BANDS * _HASHES
    permutations = pa.table(
        {
            "i": pa.array(range(count), pa.int64()),
            "a": pa.array([chance.randrange(1, _PRIME) for _ in range(count)], pa.int64()),
            "b": pa.array([chance.randrange(_PRIME) for _ in range(count)], pa.int64()),
        }
    )
    lake.rows(_SHINGLES.format(column=column))
    with lake.with_tables({"permutations": permutations}):
        lake.rows(_NEAR)
