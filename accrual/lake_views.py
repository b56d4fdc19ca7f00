"""Views that answer what the lake is asked most (docs/analysts.md has the questions that are asked of them)."""

from __future__ import annotations

SCORED = """
    select stream, model, prediction_id, predicted_at, label,
        case task when 'score' then (try_cast(said as double) >= 0.5) = (try_cast(label as double) >= 0.5)
            when 'multilabel' then list_sort(string_split(said, ',')) = list_sort(string_split(label, ','))
            else said = label end::int as hit,
        coalesce(2 * list_avg(list_transform(each, lambda d: d * d)), squares - 2 * of_label + 1) as brier
    from (
        select stream, model, prediction_id, predicted_at, label,
            output->>'task' as task, output->>'label' as said,
            coalesce((output->'probabilities'->>label)::double, 0) as of_label,
            list_sum(list_transform((output->'$.probabilities.*')::double[], lambda p: p * p)) as squares,
            case output->>'task'
                when 'score' then [(output->'probabilities'->>'score')::double - try_cast(label as double)]
                when 'multilabel' then list_transform(
                    map_entries((output->'probabilities')::map(varchar, double)),
                    lambda entry: entry.value - list_contains(string_split(label, ','), entry.key)::int)
            end as each
        from ground_truth where label is not null
    )
"""
"""Labeled rows: whether what was said is right, and its Brier score, both as in accrual/scores.py. `each` has the
distances of the classes where each of them stands by itself."""

QUESTIONS: dict[str, str] = {
    # `coverage`: the share of a model's captured predictions that have a label.
    "accuracy_by_version": f"""
        with captured as (
            select stream, model, count(distinct prediction_id) as predictions from predictions group by all
        ),
        judged as ({SCORED})
        select stream, model, any_value(predictions) as predictions, count(label) as labeled,
            labeled / any_value(predictions) as coverage, avg(hit) as accuracy, avg(brier) as brier,
            min(predicted_at) as first_prediction, max(predicted_at) as last_prediction
        from captured left join judged using (stream, model) group by all order by all
    """,
    # Reliability of the likeliest class: of the predictions that were so sure, how many were right? Fifteen bins of
    # equal width (Guo et al. 2017); `ece` is the version's expected calibration error, the same in each of its rows.
    # Where each class stands by itself, every class of every row is a question, and `accuracy` how often it was there.
    "calibration_by_version": """
        with judged as (
            select stream, model, (output->'probabilities'->>(output->>'label'))::double as confidence,
                (output->>'label' = label)::double as hit
            from ground_truth where label is not null and coalesce(output->>'task', 'text') = 'text'
            union all
            select stream, model, said.value, case when task = 'score' then try_cast(label as double)
                else list_contains(string_split(label, ','), said.key)::double end
            from (
                select stream, model, label, output->>'task' as task,
                    unnest(map_entries((output->'probabilities')::map(varchar, double))) as said
                from ground_truth where label is not null and (output->>'task') in ('multilabel', 'score')
            )
        ),
        bins as (
            select stream, model, least(floor(confidence * 15), 14)::int as bin, count(*) as labeled,
                avg(confidence) as confidence, avg(hit) as accuracy
            from judged group by all
        )
        select stream, model, bin, bin / 15 as "from", (bin + 1) / 15 as "to", labeled, confidence, accuracy,
            sum(labeled * abs(confidence - accuracy)) over version / sum(labeled) over version as ece
        from bins window version as (partition by stream, model) order by stream, model, bin
    """,
    # From the prediction to its first label, of those that have one: on young days only the quick ones are there.
    "label_delay": """
        with firsts as (
            select stream, model, day, prediction_id,
                (epoch_us(min(observed_at)) - epoch_us(predicted_at)) / 3.6e9 as delay
            from ground_truth_history where status = 'labeled' group by stream, model, day, prediction_id, predicted_at
        )
        select stream, model, day, count(*) as labeled,
            quantile_cont(delay, 0.5) as p50_hours,
            quantile_cont(delay, 0.95) as p95_hours,
            quantile_cont(delay, 0.99) as p99_hours,
            max(delay) as max_hours
        from firsts group by stream, model, day order by stream, day, model
    """,
    # What `accrual pending` lists, counted. Age is event time: a stream is as far as its latest event. A row's
    # ages begin at `older_than_hours` and end where an hour, a day, a week, 30, 90 or 365 days are over.
    "pending_by_age": """
        with reached as (
            select stream, max(moment) as moment from (
                select stream, max(predicted_at) as moment from predictions group by all
                union all select stream, max(observed_at) from outcomes group by all
            ) group by all
        ),
        waiting as (
            select p.stream, prediction_id, predicted_at
            from predictions p
            anti join ground_truth_history g using (stream, prediction_id)
            anti join dead_letters l on ends_with(l.topic, '.predictions')
                and l."partition" = p."partition" and l."offset" = p."offset"
            qualify row_number() over (partition by p.stream, prediction_id order by p.arrived_at, p."offset") = 1
        )
        select stream, list_max(list_filter(
                [0, 1, 24, 7 * 24, 30 * 24, 90 * 24, 365 * 24],
                lambda step: step <= greatest(epoch_us(moment) - epoch_us(predicted_at), 0) / 3.6e9
            )) as older_than_hours, count(*) as pending, min(predicted_at) as oldest
        from waiting join reached using (stream) group by all order by stream, older_than_hours
    """,
    # Population stability index of a day's classes against those of the stream's first sealed window:
    #     sum over classes of (now - before) * ln(now / before), of shares,
    # with half a row added to each class on both sides, since one that is missing would make it infinite. `what` is
    # `label` or `prediction`, the class that the model said; of scores, their tenth. Texts have no classes. Days of few
    # rows are noise.
    "drift": """
        with first_window as (select stream, from_time, to_time from windows where "window" = 1),
        said as (
            select stream, day, predicted_at, 'label' as what,
                if(output->>'task' = 'score', left(label, 3), label) as class
            from ground_truth where label is not null and coalesce(output->>'task', '') <> 'text'
            union all
            select stream, day, any_value(predicted_at), 'prediction',
                any_value(if(output->>'task' = 'score', left(output->>'label', 3), output->>'label'))
            from predictions where coalesce(output->>'task', '') <> 'text' group by stream, day, prediction_id
        ),
        before as (
            select stream, what, class, count(*) as n
            from said join first_window using (stream) where predicted_at >= from_time and predicted_at < to_time
            group by all
        ),
        days as (select stream, what, day, class, count(*) as n from said semi join before using (stream) group by all),
        classes as (select stream, what, class from before union select stream, what, class from days),
        grid as (
            select stream, what, day, class, coalesce(d.n, 0) as now, coalesce(b.n, 0) as before
            from (select distinct stream, what, day from days) join classes using (stream, what)
            left join days d using (stream, what, day, class) left join before b using (stream, what, class)
        ),
        shares as (
            select stream, what, day, now as n, (now + 0.5) / sum(now + 0.5) over side as now,
                (before + 0.5) / sum(before + 0.5) over side as before
            from grid window side as (partition by stream, what, day)
        )
        select stream, day, what, sum(n)::bigint as rows, sum((now - before) * ln(now / before)) as psi
        from shares group by all order by stream, what, day
    """,
}
