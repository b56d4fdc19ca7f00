"""The audit's questions in SQL, over the lake and the temporary tables of `recompute`. $1 and $2 are the raw topics."""

# Given by the join after an event was read as valid; every other reason means that it never became a row.
LETTERS = """
create or replace temp view letters as
select *, reason in ('conflicting_prediction', 'too_old', 'late', 'orphan') as judged from lake.dead_letters
"""


BALANCES = """
with rows as (
    select stream, day, count(*) as captured,
        count(*) filter (kind = 'too_old' or kind = 'conflicting' and letter is not null) as dead_lettered,
        count(*) filter (kind in ('duplicate', 'forwarded', 'reused')) as duplicate
    from captured group by all
),
joined as (
    select stream, day, count(*) filter (status = 'labeled') as labeled,
        count(*) filter (status = 'expired') as expired, count(*) filter (not known) as pending
    from compared where predicted group by all
),
unread as (
    select coalesce(stream, '') as stream, arrived_at::date as day, count(distinct (partition, "offset")) as n
    from letters
    where topic = $1 and not judged
        and ($2::varchar is null or stream = $2) and arrived_at >= $3 and arrived_at < $4
    group by all
),
gone as (
    select stream, day, count(*) as erased from lake.erasures
    where topic = $1 and ($2::varchar is null or stream = $2) and day >= $3::date and day < $4::date group by all
)
select stream, day,
    coalesce(captured, 0) + coalesce(n, 0) + coalesce(erased, 0) as captured, coalesce(labeled, 0) as labeled,
    coalesce(expired, 0) as expired, coalesce(pending, 0) as pending,
    coalesce(dead_lettered, 0) + coalesce(n, 0) as dead_lettered, coalesce(duplicate, 0) as duplicate,
    coalesce(erased, 0) as erased
from rows full join joined using (stream, day) full join unread using (stream, day)
full join gone using (stream, day)
order by stream, day
"""

OUTCOMES = """
with found as (
    select stream, sum(copies)::bigint as captured, (sum(copies) - count(*))::bigint as duplicate,
        count(*) filter (not counts and orphan_letters = 0 and in_time is not null) as late,
        count(*) filter (not counts and orphan_letters > 0) as orphaned,
        count(*) filter (not counts and orphan_letters = 0 and in_time is null) as waiting
    from evidence group by all
),
joined as (
    select stream, sum(got_revision)::bigint as in_labels,
        sum(outcomes) filter (revision = 0)::bigint as incomplete
    from compared group by all
),
forgotten as (select stream, sum(outcomes)::bigint as n from excused group by all),
unread as (
    select coalesce(stream, '') as stream, count(distinct (partition, "offset")) as dead_lettered from letters
    where topic = $1 and not judged and ($2::varchar is null or stream = $2) group by all
),
gone as (
    select stream, count(*) as erased from lake.erasures
    where topic = $1 and ($2::varchar is null or stream = $2) group by all
)
select stream,
    coalesce(captured, 0) + coalesce(dead_lettered, 0) + coalesce(erased, 0) as captured,
    coalesce(in_labels, 0) as in_labels,
    coalesce(incomplete, 0) as incomplete, coalesce(duplicate, 0) as duplicate,
    coalesce(late, 0) + coalesce(n, 0) as late,
    coalesce(orphaned, 0) as orphaned, coalesce(waiting, 0) as waiting, coalesce(dead_lettered, 0) as dead_lettered,
    coalesce(erased, 0) as erased
from found full join joined using (stream) full join unread using (stream) full join gone using (stream)
left join forgotten using (stream)
order by stream
"""

# What the two topics of a partition have reached in event time (without what belonged elsewhere), less the contract's
# disorder: the join's watermark is never beyond `furthest`, and no less than `nearest` once it has read everything.
# A tick says it of both.
REACHED = """
create or replace temp table reached as
with moments as (
    select stream, "partition", 'predictions' as topic, predicted_at as moment
    from accepted_predictions left join homes on "key" = coalesce(entity, prediction_id)
    where home is null or home = "partition"
    union all
    select stream, "partition", 'outcomes', observed_at
    from accepted_outcomes left join homes on "key" = coalesce(entity, prediction_id)
    where home is null or home = "partition"
    union all
    select stream, "partition", unnest(['predictions', 'outcomes']), moment from lake.ticks
    union all
    select stream, "partition", "table", moment from lake.erasures where moment is not null
),
events as (select stream, "partition", max(moment) as moment from moments group by stream, "partition", topic)
select stream, "partition",
    max(moment) - to_microseconds(any_value(disorder_us)) as furthest,
    case when count(*) = 2 then min(moment) - to_microseconds(any_value(disorder_us)) end as nearest
from events join terms using (stream) group by all
"""

# Rows that appear twice, dead letters that should not be or are not there, expiry at the wrong time.
MORE_DIFFERENCES = """
with known as (
    select c.*, c.predicted_at + to_microseconds(t.horizon_us) as deadline,
        deadline + to_microseconds(t.remember_us) as forgotten_at, r.furthest
    from captured c join terms t using (stream) join reached r using (stream, "partition")
),
firsts as (from known where kind = 'first'),
claims as (
    select e.*, t.late, f.arrived_at as predicted_came_at, f.forgotten_at, f.furthest,
        -- Whose an outcome of an entity is, is settled as soon as event time has passed it.
        e.observed_at + to_microseconds(if(t.join_to is null, t.horizon_us + t.disorder_us, 0)) as orphaned_at,
        (select max(furthest) from reached r where r.stream = e.stream) as furthest_of_all,
        (select if(count(nearest) = count(*), min(nearest), null) from reached r where r.stream = e.stream)
            as nearest_of_all
    from evidence e join terms t using (stream) left join firsts f using (stream, prediction_id)
),
due as (from compared c join reached r using (stream, "partition") where c.predicted and c.revision = 0),
judged as (
    select stream, topic, "partition", "offset", count(*) as letters from letters
    where judged and topic in ($1, $2) group by all
),
rows as (
    select $1 as topic, "partition", "offset" from predictions
    union all select $2, "partition", "offset" from outcomes
)
select stream, prediction_id as id, 'double row' as kind, format('revision {} is there {} times', revision, n) as detail
from (select stream, prediction_id, revision, count(*) as n from scoped_ground_truth_history
      group by all having n > 1)
union all
select stream, prediction_id, 'no dead letter', 'a conflicting prediction' from known
where kind = 'conflicting' and letter is null
union all
select stream, prediction_id, 'wrong dead letter', 'conflicting_prediction, and it does not conflict' from known
where letter = 'conflicting_prediction' and kind <> 'conflicting'
union all
select stream, prediction_id, 'wrong dead letter', 'too_old, and it was not' from known
where letter = 'too_old' and forgotten_at >= furthest and not exists (  -- an outcome that was given away before it came
    from accepted_outcomes o where o.stream = known.stream and o.entity = known.entity
        and o.observed_at >= known.predicted_at and o.observed_at <= known.deadline and o.observed_at < known.furthest
)
union all
select stream, prediction_id, 'no dead letter', 'an outcome after the horizon' from claims
where late = 'dead_letter' and not in_time and late_letters = 0 and orphan_letters = 0 and observed_at <= forgotten_at
union all
select stream, prediction_id, 'no dead letter', 'an outcome without prediction' from claims
where predicted_came_at is null and orphan_letters = 0 and orphaned_at < nearest_of_all
union all
select stream, prediction_id, 'wrong dead letter', 'late, and it was not' from claims
where late_letters > 0 and (late <> 'dead_letter' or in_time is distinct from false)
union all
select stream, prediction_id, 'wrong dead letter', 'orphan, before its time' from claims
where orphan_letters > 0 and orphaned_at >= furthest_of_all
union all
select stream, prediction_id, 'wrong dead letter', 'orphan, and its prediction was there' from claims
where orphan_letters > 0 and predicted_came_at < orphan_came_at and forgotten_at > furthest
union all
select stream, prediction_id, 'expired early', format('the horizon ends at {}', deadline) from due
where status = 'expired' and deadline > furthest
union all
select stream, prediction_id, 'not expired', format('the horizon ended at {}', deadline) from due
where not known and deadline <= nearest
union all
select stream, format('{}[{}]@{}', topic, "partition", "offset"), 'dead letter twice', format('{} times', letters)
from judged where letters > 1
union all
select stream, format('{}[{}]@{}', topic, "partition", "offset"), 'letter without record',
    'the record that was refused is not in the lake'
from judged j join offsets o using (topic, "partition") anti join rows r using (topic, "partition", "offset")
where j."offset" < o.next_offset
"""

# What the sink kept out of ground truth because it came twice on the topic. $1 to $3: stream (or null), from, to.
DOUBLES = """
select stream, prediction_id as id, 'double record' as kind,
    format('revision {}: offset {} of partition {} came at offset {} again, {}',
           revision, first_offset, "partition", "offset", why) as detail
from doubles where ($1::varchar is null or stream = $1) and predicted_at >= $2 and predicted_at < $3
"""

TAKEN = """
create or replace temp table taken as
with records as (
    select $1 as topic, "partition", "offset", 'row' as what from accepted_predictions
    union all select $2, "partition", "offset", 'row' from accepted_outcomes
    union all select $1, "partition", "offset", 'row' from lake.ticks
    union all select topic, "partition", "offset", 'letter' from letters where not judged
    union all select topic, "partition", "offset", 'erased' from lake.erasures where topic in ($1, $2)
)
select r.* from records r join lake.offsets o using (topic, "partition") where r."offset" < o.next_offset
"""

COVERAGE = """
with found as (
    select topic, "partition",
        count(*) filter (what = 'row') as rows, count(*) filter (what = 'letter') as dead_letters,
        count(distinct "offset") as covered, count(*) - covered as twice
    from taken group by all
),
marked as (
    select topic, "partition", sum(next_offset - first_offset)::bigint as markers from markers group by all
)
select o.topic, o."partition", first_offset, next_offset,
    coalesce(rows, 0) as rows, coalesce(dead_letters, 0) as dead_letters, coalesce(markers, 0) as markers,
    next_offset - first_offset - coalesce(markers, 0) - coalesce(covered, 0) as missing,
    coalesce(twice, 0) as twice
from offsets o left join found using (topic, "partition") left join marked using (topic, "partition")
where o.topic in ($1, $2)
order by o.topic, o."partition"
"""

HOLES = """
with edges as (
    select topic, "partition", "offset" as first, "offset" + 1 as "end" from taken
    union all select topic, "partition", first_offset, next_offset from markers
    union all select topic, "partition", first_offset, first_offset from offsets where topic in ($1, $2)
    union all select topic, "partition", next_offset, next_offset from offsets where topic in ($1, $2)
),
holes as (
    select topic, "partition", "end" as hole, lead(first) over in_order as next
    from edges window in_order as (partition by topic, "partition" order by first, "end")
)
select null as stream, format('{}[{}]@{}', topic, "partition", hole) as id, 'gap' as kind,
    format('{} offsets are neither rows nor dead letters', next - hole) as detail
from holes where next > hole
union all
select null, format('{}[{}]@{}', topic, "partition", "offset"), 'twice',
    'the record is in the lake more than once, or as a row and as a dead letter'
from taken group by topic, "partition", "offset" having count(*) > 1
"""

# Sealed windows in scope whose rows are no longer those that were sealed, though none was erased. {digest} is the
# expression that sealed them.
ALTERED = """
with sealed as (
    select * from sealed_rows
    where not later and ($1::varchar is null or stream = $1) and predicted_at >= $2 and predicted_at < $3
    qualify row_number() over (
        partition by stream, "window", prediction_id order by revision desc, "offset"
    ) = 1
),
digests as (select stream, "window", {digest} as found from sealed group by all)
select w.stream, format('window {{}}', w."window") as id, 'window altered' as kind,
    format('sealed with digest {{}}, its rows now have {{}}', w.digest[:12], coalesce(d.found[:12], 'none')) as detail
from windows w left join digests d using (stream, "window")
where ($1::varchar is null or stream = $1) and w.from_time >= $2 and w.to_time <= $3
    and d.found is distinct from w.digest
    and not exists (select 1 from erasures e where e.stream = w.stream and e."window" = w."window")
"""
