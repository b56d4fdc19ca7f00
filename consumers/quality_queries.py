"""The statements of `consumers.quality`, over the temporary tables `inspected` and, for drift, `reference`."""

# {view}: the stream's typed view. `inputs` is a struct.
ROWS = """
create or replace temp table {name} as
select prediction_id, revision, label, output, inputs, "values", inputs_json
from ({view}) where predicted_at >= ? and predicted_at < ?
"""

# {conditions}: for each rule, its name if the row breaks it, else null.
BROKEN = """
select prediction_id, revision, unnest(list_filter([{conditions}], lambda rule: rule is not null)) as rule
from inspected
"""

LARGEST_LABEL = """
select max(n) / sum(n) as value from (select count(*) as n from inspected where label is not null group by label)
"""

# The population stability index, sum of (p - q) ln(p / q) over bins (Yurdakul 2018, "Statistical properties of
# population stability index", eq. 1), and the Jensen-Shannon divergence in nats (Lin 1991, IEEE Trans. Inf. Theory
# 37:145). Every bin gets half a row more, so that an empty one has a share. Numbers fall into tenths of the reference,
# texts are their own bins while there are few, else their lengths are numbers.
DRIFT = """
with both_sides as (
    select true as sealed, {value} as value from reference union all select false, {value} from inspected
),
cuts as (select list_distinct(quantile_cont({number}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])) as tenths
    from both_sides where sealed),
binned as (select sealed, coalesce({bin}, 'missing') as bin from both_sides, cuts),
counted as (select bin, count(*) filter (not sealed) as p, count(*) filter (sealed) as q from binned group by all),
shares as (
    select (p + 0.5) / (sum(p) over () + 0.5 * count(*) over ()) as p,
        (q + 0.5) / (sum(q) over () + 0.5 * count(*) over ()) as q
    from counted
)
select sum((p - q) * ln(p / q)) as psi, sum(p * ln(2 * p / (p + q)) + q * ln(2 * q / (p + q))) / 2 as js from shares
"""

# Rows with the same inputs and another label than others of them.
CONFLICTS = """
select coalesce(sum(n) filter (labels > 1), 0) / sum(n) as value
from (select count(*) as n, count(distinct label) as labels from inspected where label is not null group by inputs_json)
"""

# Rows whose texts are nearly those of an earlier one: shingles of three words with a Jaccard similarity of 0.8 or more.
# Candidates share one of 8 bands of 4 MinHash values (Broder 1997, "On the resemblance and containment of documents";
# Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3.4): 98% of the pairs at 0.8. Each text is compared
# with the first one of every band it is in, so that many alike do not cost their square. {text}: a row's texts.
NEAR_DUPLICATES = """
with texts as (
    select row_number() over () as id, count(*) as copies, text
    from (select {text} as text from inspected) group by text
),
worded as (
    select *, list_filter(regexp_split_to_array(lower(text), '[^\\pL\\pN]+'), lambda w: w <> '') as words from texts
),
shingled as (
    select id, copies, list_distinct(if(len(words) < 4, [array_to_string(words, ' ')],
        list_transform(range(1, len(words) - 1), lambda i: array_to_string(words[i:i + 2], ' ')))) as shingles
    from worded
),
signed as (
    select *, list_transform(range(32), lambda k: list_min(list_transform(shingles, lambda s: hash(s, k)))) as minima
    from shingled
),
bands as (select id, b as band, hash(minima[4 * b + 1:4 * b + 4]) as value from signed, range(8) t(b)),
pairs as (
    select distinct earlier, id as later
    from (select id, min(id) over (partition by band, value) as earlier from bands) where earlier < id
),
near as (
    select distinct later as id from pairs join signed a on a.id = earlier join signed b on b.id = later
    where len(list_intersect(a.shingles, b.shingles)) >= 0.8 * len(list_distinct(a.shingles || b.shingles))
)
select sum(copies - if(n.id is null, 1, 0)) / sum(copies) as value from texts left join near n using (id)
"""

# Confident learning (Northcutt, Jiang, Chuang 2021, arXiv:1911.00068, sec. 3.1): a label's threshold is the mean
# probability that the model gave it where it was the label. A row is suspected if of the labels whose threshold its
# probabilities reach the likeliest is another than its own. The probabilities are those of the model that was in
# service, which cannot have learned from the row.
SUSPECTS = """
create or replace temp table suspects as
with told as (
    select prediction_id, revision, label, (output -> '$.probabilities')::map(varchar, double) as said
    from inspected where label is not null
),
thresholds as (select label, avg(coalesce(said[label], 0)) as threshold from told group by label),
confident as (
    select prediction_id, revision, t.label, e.key as guess, e.value as p
    from (select *, unnest(map_entries(said)) as e from told) t join thresholds h on h.label = e.key
    where e.value >= h.threshold
)
select prediction_id, any_value(revision) as revision, any_value(label) as label, arg_max(guess, p) as guess
from confident group by prediction_id having arg_max(guess, p) <> any_value(label)
"""

# For each value of an input, among at least 20 predictions, its share of the labeled rows over its share of all
# predictions. {value}: the input of a record of `predictions`.
SLICES = """
with everyone as (
    select prediction_id, any_value({value}) as slice from predictions
    where stream = ? and predicted_at >= ? and predicted_at < ? group by prediction_id
),
counted as (
    select coalesce(slice, 'missing') as slice, count(*) as predictions, count(label) as labeled
    from everyone left join inspected using (prediction_id) group by all
)
select slice, (labeled / sum(labeled) over ()) / (predictions / sum(predictions) over ()) as value, predictions
from counted qualify predictions >= 20 order by value, slice
"""
