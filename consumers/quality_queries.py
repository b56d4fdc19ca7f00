"""The metrics of a window as SQL over two relations of typed rows: `kept`, and `before` (the last sealed window's).

Each query gives columns of the table `quality`: metric, field, part, value. docs/quality.md has formulas and sources.
"""

from __future__ import annotations

from accrual.contract import Contract
from consumers.expression_sql import quoted
from consumers.rule_sql import column_of
from consumers.typed_views import typed_view

# A text with more values than this is described by its length, not by the values.
MOST_CATEGORIES = 100
_BINS = 10

_ONE = "select '{}' as metric, '' as field, '' as part, {} as value"

LABEL_SHARES = """
select 'label_share' as metric, label as field, '' as part, count(*) / sum(count(*)) over () as value
from kept where label is not null group by label
"""
LABEL_NAME_SHARES = """
select 'label_share' as metric, name as field, '' as part, count(*) / (select count(label) from kept) as value
from (select unnest(list_distinct(string_split(label, ','))) as name from kept where label is not null) group by name
"""
DUPLICATES = (
    _ONE.format("duplicates", "1 - count(distinct inputs::varchar) / count(*)") + " from kept having count(*) > 0"
)
LABEL_CONFLICTS = (
    _ONE.format("label_conflicts", "count(*) filter (labels > 1) / count(*)")
    + """
from (
    select count(distinct label) over (partition by inputs::varchar) as labels from kept where label is not null
) having count(*) > 0
"""
)

# Confident learning (Northcutt, Jiang & Chuang 2021, arXiv:1911.00068, equations 1 and 2): the threshold of a class is
# the mean probability that rows labeled so were given of it. A row is counted under the likeliest of the classes whose
# threshold its probability reaches; where that is not its label, the label is suspected. The model had predicted before
# the label was known: its probabilities are held out by themselves. A label that the model did not know says nothing.
LABEL_ERRORS = """
create or replace temp table suspected as
with said as (
    select prediction_id, label, unnest(map_entries((output::json -> 'probabilities')::map(varchar, double))) as p
    from kept where label is not null
),
thresholds as (select label as class, avg(p.value) as threshold from said where p.key = label group by label),
confident as (
    select prediction_id, label, p.key as class, p.value as probability
    from said join thresholds on p.key = class
    where p.value >= threshold and prediction_id in (select prediction_id from said where p.key = label)
    qualify row_number() over (partition by prediction_id order by p.value desc, p.key = label desc, p.key) = 1
)
select prediction_id, label, class as likelier, probability from confident where class <> label
"""
LABEL_ERROR_SHARE = (
    _ONE.format("label_errors", "(select count(*) from suspected) / count(*)")
    + " from kept where label is not null having count(*) > 0"
)

# Drift: the share of every bin, with half a row added to each so that none is empty (p now, q before).
#   population stability index = sum of (p - q) ln(p / q)
#   Jensen-Shannon divergence = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in bits (Lin 1991)
DRIFT = """
with counted as (
    select field, part, count(*) filter (side = 'now') as a, count(*) filter (side = 'before') as b
    from binned group by all
),
shares as (
    select field, (a + 0.5) / sum(a + 0.5) over (partition by field) as p,
        (b + 0.5) / sum(b + 0.5) over (partition by field) as q
    from counted
),
measured as (
    select field, sum((p - q) * ln(p / q)) as psi,
        greatest(0, sum(p * log2(2 * p / (p + q)) + q * log2(2 * q / (p + q))) / 2) as js
    from shares group by field
)
select 'psi' as metric, field, '' as part, psi as value from measured
union all select 'jensen_shannon', field, '', js from measured
"""
BARS = """
select field, part, count(*) filter (side = 'now') as now, count(*) filter (side = 'before') as before
from binned group by field, part order by field, try_cast(part as int), before desc, now desc, part
"""


def binned(contract: Contract, many_valued: set[str]) -> str:
    """Statement that makes the relation `binned`: side, field, part, for every input and the label.

    Numbers fall into the tenths of the last window; a text that is `many_valued`, by its length, into tenths of those.
    """
    edges: list[str] = []
    of_label = {"score": "try_cast(label as double)", "text": "length(label)"}.get(contract.output.task)
    parts = [("label", "label")] if of_label is None else []
    fields = {**contract.input_types, **({} if of_label is None else {"label": "number"})}
    for name, kind in fields.items():
        column = of_label if of_label is not None and name == "label" else column_of(name)
        value = f"length({column})" if name in many_valued else column
        if kind in ("string", "boolean") and name not in many_valued:
            parts.append((name, f"{value}::varchar"))
        else:
            quantiles = ", ".join(str(n / _BINS) for n in range(1, _BINS))
            edges.append(f"list_distinct(quantile_cont({value}::double, [{quantiles}])) as e{len(edges)}")
            bins = f"len(list_filter(e{len(edges) - 1}, lambda edge: edge < {value}::double))::varchar"
            parts.append((name, f"case when {value} is not null then {bins} end"))
    listed = ", ".join(f"{{'field': {quoted(name)}, 'part': coalesce({part}, 'none')}}" for name, part in parts)
    sides = (
        "select 'now' as side, inputs, label from kept"
        " union all by name select 'before' as side, inputs, label from before"
    )
    return f"""
        create or replace temp table binned as
        with edges as (select {", ".join(edges) or "null as none"} from before)
        select side, unnest([{listed}], recursive := true) from ({sides}), edges
    """


def many_valued(contract: Contract) -> str:
    """A query for the names of the texts that have many values."""
    texts = [name for name, kind in contract.input_types.items() if kind == "string"]
    counted = " union all ".join(
        f"select {quoted(name)} as field, count(distinct {column_of(name)}) as n from before" for name in texts
    )
    return f"select field from ({counted or 'select null as field, 0 as n'}) where n > {MOST_CATEGORIES}"


def everyone(contract: Contract) -> str:
    """Statement that makes `everyone`: all predictions of the window, pending ones too, with their labels if any."""
    source = '(select *, null::varchar as "values" from lake.predictions)'
    return f"""
        create or replace temp table everyone as
        select p.inputs, c.label from ({typed_view(contract, source)}) p left join checked c using (prediction_id)
        where p.predicted_at >= ? and p.predicted_at < ?
        qualify row_number() over (partition by p.prediction_id order by p."offset") = 1
    """


def slice_metrics(name: str) -> str:
    """A query for coverage and representation of one slicing, over all predictions of the window."""
    return f"""
        with slices as (
            select coalesce({column_of(name)}::varchar, 'none') as part, count(*) as n, count(label) as labeled
            from everyone group by all
        ),
        shares as (
            select labeled / nullif(sum(labeled) over (), 0) as p, n / sum(n) over () as q from slices
        )
        select 'coverage' as metric, {quoted(name)} as field, part, labeled / n as value from slices
        union all
        select 'representation', {quoted(name)}, '', greatest(0, sum(
            case when p > 0 then p * log2(2 * p / (p + q)) else 0 end + q * log2(2 * q / (p + q))) / 2)
        from shares having count(p) > 0
    """
