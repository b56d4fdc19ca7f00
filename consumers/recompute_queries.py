"""The statements of `recompute`, in the order in which it runs them."""

# A record that the join refused and that became a row all the same: a sink with a later contract has read it. It is the
# dead letter that it was; when it is replayed, the copy is what is joined.
REFUSED = """
select distinct "partition", "offset" from lake.dead_letters
where topic = ? and reason in
    ('unknown_stream', 'unsupported_version', 'invalid_inputs', 'invalid_values', 'time_out_of_range')
"""

# Outcomes by the prediction they belong to. One that names an entity belongs to the latest prediction that was made for
# the entity before it, within the horizon, or to all of them; one that has none keeps an id that no prediction has.
JOINABLE_OUTCOMES = """
create or replace temp table joinable_outcomes as
with letters as (
    select "partition", "offset" from lake.dead_letters
    where topic = ? and reason in ('conflicting_prediction', 'too_old')
),
made as (
    select p.stream, p.entity, p.prediction_id, min(p.predicted_at) as predicted_at
    from accepted_predictions p anti join letters using ("partition", "offset")
    where p.entity is not null group by all
)
select o.* from accepted_outcomes o where o.entity is null
union all by name
select o.* replace (coalesce(m.prediction_id, chr(1) || o.entity) as prediction_id)
from accepted_outcomes o join terms t using (stream)
left join made m on m.stream = o.stream and m.entity = o.entity
    and m.predicted_at <= o.observed_at and o.observed_at <= m.predicted_at + to_microseconds(t.horizon_us)
where o.entity is not null
qualify t.join_to = 'all' or row_number() over (
    partition by o."partition", o."offset" order by m.predicted_at desc nulls last, m.prediction_id desc
) = 1
"""

# A record that was forwarded is in the log twice; the copy in its home partition is the one that was joined.
CAPTURED = """
create or replace temp table captured as
with letters as (
    select partition, "offset", min(reason) as reason from dead_letters
    where topic = ? and reason in ('conflicting_prediction', 'too_old') group by all
),
records as (
    select
        p.stream, p.prediction_id, p.entity, p.partition, p."offset", p.arrived_at, p.predicted_at, p.day,
        hash(p.model, p.predicted_at, p.inputs, p.output) as content,
        letters.reason as letter,
        p.partition <> coalesce(h.home, p.partition) as astray
    from scoped_predictions p
    left join letters using (partition, "offset") left join homes h on h."key" = coalesce(p.entity, p.prediction_id)
),
firsts as (
    select stream, prediction_id, min("offset") as "offset", arg_min(content, "offset") as content,
        arg_min(predicted_at, "offset") as predicted_at
    from records where not astray and letter is distinct from 'too_old' group by all
)
select
    r.*,
    case
        when r.letter = 'too_old' then 'too_old'
        when r.astray then 'forwarded'
        when r."offset" = f."offset" then 'first'
        when r.content = f.content then 'duplicate'
        else 'conflicting'
    end as kind
from records r left join firsts f using (stream, prediction_id)
where coalesce(f.predicted_at, r.predicted_at) >= ? and coalesce(f.predicted_at, r.predicted_at) < ?
"""

# Distinct outcomes. A copy that ended as an orphan took those with it that came between it and its dead letter: they
# were its duplicates. A copy before it was joined (then the prediction was forgotten), one after it began anew.
EVIDENCE = """
create or replace temp table evidence as
with letters as (
    select partition, "offset", reason, min(arrived_at) as given_up_at from dead_letters
    where topic = ? and reason in ('late', 'orphan') group by all
),
records as (
    select
        o.stream, o.prediction_id, o.observed_at, o."values", o.source, o.arrived_at, o."offset",
        l.reason as letter, l.given_up_at,
        o.partition <> coalesce(h.home, o.partition) as astray
    from scoped_outcomes o
    left join letters l using (partition, "offset") left join homes h on h."key" = coalesce(o.entity, o.prediction_id)
),
given_up as (
    select stream, prediction_id, observed_at, "values", source, "offset" from (
        select *, max(given_up_at) filter (letter = 'orphan') over earlier as taken_until
        from records
        where (stream, prediction_id) in (select stream, prediction_id from records where letter = 'orphan')
            and not astray
        window earlier as (
            partition by stream, prediction_id, observed_at, "values", source order by "offset"
        )
    ) where arrived_at <= taken_until
),
contents as (
    select
        stream, prediction_id, observed_at, "values", source,
        count(*) as copies,
        count(*) filter (letter = 'late') as late_letters,
        count(*) filter (letter = 'orphan') as orphan_letters,
        min(arrived_at) filter (letter = 'orphan') as orphan_came_at,
        min(arrived_at) filter (not astray and g."offset" is null) as came_at
    from records r left join given_up g using (stream, prediction_id, observed_at, "values", source, "offset")
    group by all
)
select
    c.*,
    c.observed_at <= f.predicted_at + to_microseconds(t.horizon_us) as in_time,
    f.prediction_id is not null and (in_time or t.late = 'revise') and c.came_at is not null as counts
from contents c
left join (from captured where kind = 'first') f using (stream, prediction_id)
left join terms t on t.stream = c.stream
"""

# What each outcome that counts says by the contract's field. Contracts with an expression have a statement each.
SAID = """
create or replace temp table said as
with texts as (
    select
        e.stream, e.prediction_id, e.observed_at, e."values", e.source, t.field_type, t.mapped,
        -- Of a key that is there twice the last one holds, so keys are searched from behind.
        json_extract_string(e."values", '$.*')
            [-list_position(list_reverse(json_keys(e."values")), t.field)::bigint] as text
    from evidence e join terms t using (stream)
    where e.counts and t.field is not null
)
select
    stream, prediction_id, observed_at, "values", source,
    case field_type when 'boolean' then upper(text[1]) || text[2:]
                    when 'number' then (try_cast(text as double) + 0.0)::varchar
                    when 'integer' then coalesce(try_cast(text as hugeint)::varchar, text)
                    else text end as says
from texts
"""

# {columns}: the texts of the outcome's fields by name. {says}: the expression over them.
SAID_BY_EXPRESSION = """
insert into said
select stream, prediction_id, observed_at, "values", source, {says}
from (
    select stream, prediction_id, observed_at, "values", source, {columns}
    from (
        select *, list_reverse(json_keys("values")) as keys, list_reverse(json_extract_string("values", '$.*')) as texts
        from evidence where counts and stream = ?
    )
)
"""

# What the outcomes of one prediction say together. Where the last one decides, that is it. Else they are grouped by
# rank of source and label; a group of a sum is a whole rank, and has a label if it reaches a threshold. Of the groups
# with a label the best one decides.
EXPECTED = """
create or replace temp table expected as
with last_ones as (
    select stream, prediction_id, count(*) as outcomes,
        max(struct_pack(at := observed_at, content := "values", source := source, says := says)) as it
    from said join terms t using (stream)
    where t.take = 'last' and t.sources is null
    group by all
),
ballots as (
    select
        s.stream, s.prediction_id,
        coalesce(list_position(t.sources, s.source), 1 + coalesce(len(t.sources), 0)) as rank,
        case when t.take <> 'sum' then case when t.mapped then m.label else s.says end end as label,
        count(*) as votes,
        sum(case when t.take = 'sum' then round(try_cast(s.says as double) * 1e6)::hugeint end) as total,
        min(struct_pack(at := observed_at, content := "values", source := source)) as first,
        max(struct_pack(at := observed_at, content := "values", source := source)) as last
    from said s join terms t using (stream)
    left join translations m on m.stream = s.stream and m.value = s.says
    where t.take <> 'last' or t.sources is not null
    group by all
),
labeled as (
    select b.* replace (
        case when t.take = 'sum'
            then list_filter(  -- the cast gives null for -inf, which every sum reaches
                t.thresholds, lambda x: coalesce(total >= try_cast(round(x.floor * 1e6) as hugeint), true)
            )[1].label
            else b.label end as label
    )
    from ballots b join terms t using (stream)
),
best_ones as (
    select
        stream, prediction_id, sum(votes)::bigint as outcomes,
        case any_value(t.take)
            when 'first' then arg_min(struct_pack(label := l.label, outcome := first), (rank, first))
            when 'majority' then arg_max(struct_pack(label := l.label, outcome := last), (-rank, votes, last))
            else arg_max(struct_pack(label := l.label, outcome := last), (-rank, last))
                filter (l.label is not null or t.take <> 'sum') end as it
    from labeled l join terms t using (stream)
    group by all
),
together as (
    select stream, prediction_id, outcomes, it.at as observed_at, it.content as "values", it.source as source,
        case when t.mapped then m.label else it.says end as label, true as decided
    from last_ones o join terms t using (stream)
    left join translations m on m.stream = o.stream and m.value = o.it.says
    union all
    select stream, prediction_id, outcomes, it.outcome.at, it.outcome.content, it.outcome.source, it.label,
        it is not null
    from best_ones
)
select
    f.stream, f.prediction_id, f.predicted_at, f.day, f.partition, f.arrived_at, f.content,
    coalesce(c.outcomes, 0) as outcomes,
    case when c.decided and c.outcomes >= t.complete_when then c.outcomes else 0 end as revision,
    case when revision > 0 then c.observed_at end as observed_at,
    case when revision > 0 then c."values" end as "values",
    case when revision > 0 then c.source end as source,
    case when revision > 0 then c.label end as label,
    t.stream is not null as has_contract,
    f.predicted_at + to_microseconds(t.horizon_us) as deadline,
    t.expired_label
from (from captured where kind = 'first') f
left join together c using (stream, prediction_id)
left join terms t on t.stream = f.stream
"""

# {changed}: the condition of a scope that is limited to what changed.
COMPARED = """
create or replace temp table compared as
with have as (
    select *, hash(model, predicted_at, inputs, output) as content from ground_truth_history
    where (?::varchar is null or stream = ?) and predicted_at >= ? and predicted_at < ? and {changed}
    qualify row_number() over (partition by stream, prediction_id order by revision desc, "offset") = 1
)
select
    coalesce(e.stream, g.stream) as stream, coalesce(e.prediction_id, g.prediction_id) as prediction_id,
    e.predicted_at, e.day, e.partition, e.has_contract, e.deadline, e.outcomes, e.revision, e.label, e.expired_label,
    g.status, g.revision as got_revision, g.label as got_label,
    g.prediction_id is not null as known, e.prediction_id is not null as predicted,
    e.content is distinct from g.content as other_prediction,
    (e.observed_at, e."values", e.source) is distinct from (g.observed_at, g."values", g.source) as other_outcome
from expected e full join have g using (stream, prediction_id)
"""

# One finding a prediction: the first that applies.
DIFFERENCES = """
create or replace temp table differences as
select stream, prediction_id, case
        when predicted and not has_contract then 'no contract'
        when not predicted then 'not predicted'
        when revision > 0 and (not known or status = 'expired') then 'missing'
        when known and other_prediction then 'prediction'
        when status = 'labeled' and got_revision <> revision then 'revision'
        when status = 'labeled' and got_label is distinct from label then 'label'
        when status = 'labeled' and other_outcome then 'outcome'
        when status = 'expired' and (got_revision, got_label) is distinct from (0, expired_label) then 'expired label'
    end as kind,
    case kind
        when 'no contract' then 'its stream has no contract any more'
        when 'not predicted' then 'ground truth of a prediction that was never captured'
        when 'missing' then format('{} outcomes count, and there is no label', revision)
        when 'prediction' then 'model, time, inputs or output are not those of the first prediction captured'
        when 'revision' then format('revision {}, recomputed {}', got_revision, revision)
        when 'label' then format('label {}, recomputed {}', coalesce(got_label, 'none'), coalesce(label, 'none'))
        when 'outcome' then 'the label comes from another outcome than the one that decides'
        when 'expired label'
            then format('expired as {}, by contract {}', coalesce(got_label, 'none'), coalesce(expired_label, 'none'))
    end as detail,
    partition, deadline, revision - coalesce(got_revision, 0) as outcomes
from compared where kind is not null
"""

# When event time came how far: `moment` is the latest in the stream's partition among all that had arrived by then.
PASSAGE = """
create or replace temp view passage as
select stream, "partition", arrived_at, max(moment) over so_far as moment
from (
    select stream, "partition", arrived_at, predicted_at as moment from accepted_predictions
    union all select stream, "partition", arrived_at, observed_at from accepted_outcomes
    union all select stream, "partition", arrived_at, moment from lake.ticks
) window so_far as (partition by stream, "partition" order by arrived_at)
"""

# After horizon + remember the join forgets a prediction. An id that comes again later is a new prediction to it.
REUSED = """
update captured set kind = 'reused' where kind = 'conflicting' and letter is null
and (stream, prediction_id, "offset") in (
    with forgotten as (
        select f.stream, f.prediction_id, f."partition",
            f.predicted_at + to_microseconds(t.horizon_us + t.remember_us + t.disorder_us) as forgotten_at
        from captured f join terms t using (stream)
        where f.kind = 'first'
            and (stream, prediction_id) in (select stream, prediction_id from captured where kind = 'conflicting')
    ),
    passed as (
        select f.stream, f.prediction_id, min(p.arrived_at) as passed_at
        from forgotten f asof join passage p
            on p.stream = f.stream and p."partition" = f."partition" and f.forgotten_at < p.moment
        group by all
    )
    select c.stream, c.prediction_id, c."offset"
    from captured c join passed p using (stream, prediction_id)
    where c.kind = 'conflicting' and c.arrived_at >= p.passed_at
)
"""

# And an outcome that comes later rightly finds none.
EXCUSED = """
insert into excused
with forgotten as (
    select d.stream, d.prediction_id, d.outcomes,
        d."partition", d.deadline + to_microseconds(t.remember_us + t.disorder_us) as forgotten_at
    from differences d join terms t using (stream)
    where kind in ('missing', 'revision', 'label', 'outcome')
),
passed as (
    select f.stream, f.prediction_id, f.outcomes, min(p.arrived_at) as passed_at
    from forgotten f asof join passage p
        on p.stream = f.stream and p."partition" = f."partition" and f.forgotten_at < p.moment
    group by all
)
select distinct p.stream, p.prediction_id, p.outcomes
from passed p join evidence e using (stream, prediction_id)
where e.counts and e.came_at >= p.passed_at
"""
